"""PPO-ptx: maximise E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))] + gamma E_pretrain[log pi(x)] (InstructGPT, equation
2).

An iteration: sample responses on the training weights; score them with the reward, reference and value models; shape
the rewards with the per-token KL, estimate advantages; update policy and value over minibatches, the pretraining
gradient summed into the policy's. Sizes: B episodes of the iteration over all data-parallel ranks, R the longest
response, T the tokens of a packed micro-batch. Every rank of a model-parallel group holds the same rollouts.

    torchrun --nproc-per-node 8 -m fastrlhf ppo configs/instructgpt/1.3b/ppo_ptx.yaml
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastrlhf import ops
from fastrlhf.algorithms.sft import counted_tokens, language_loss
from fastrlhf.config import PPOConfig
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.data.loader import Loader
from fastrlhf.generation.engine import Generated, SamplingParams, generate_all
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import phase

Tensor = torch.Tensor
Metrics = dict[str, Tensor]


@dataclass
class Rollouts:
    """Episodes and what is known of them; rows are episodes, response columns count from the first response token."""

    tokens: Tensor
    """int64 [B, L]: prompt and response, 0 behind them."""
    prompt_lengths: Tensor
    """int64 [B]."""
    response_lengths: Tensor
    """int64 [B], the stop token included."""
    stopped: Tensor
    """bool [B]: the response ended with a stop token."""
    logprobs: Tensor
    """fp32 [B, R]: of the sampled tokens, by the policy that sampled them, at the sampling temperature."""
    ref_logprobs: Tensor
    """fp32 [B, R]: of the same tokens, by the reference."""
    values: Tensor
    """fp32 [B, R]: value of the state before each token."""
    scores: Tensor
    """fp32 [B]: the reward model's score at the last token."""

    @property
    def mask(self) -> Tensor:
        """bool [B, R]: real response tokens."""
        R = self.logprobs.shape[1]
        return torch.arange(R, device=self.tokens.device) < self.response_lengths[:, None]

    def packed(self, rows: Tensor) -> PackedBatch:
        """The given episodes as one packed micro-batch; its loss_mask marks the positions that predict response
        tokens.
        """
        lengths = (self.prompt_lengths + self.response_lengths)[rows].tolist()
        sequences = [self.tokens[row, :n].tolist() for row, n in zip(rows.tolist(), lengths, strict=True)]
        return pack(sequences, self.prompt_lengths[rows].tolist()).to(self.tokens.device)


@dataclass(kw_only=True)
class PPOBatch(PackedBatch):
    """A packed micro-batch of episodes with what the losses need, fp32 [T], 0 outside loss_mask."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor


class KLController:
    """The KL coefficient: fixed, or adapted to hold a target (Ziegler et al. 2019, section 2.2; arXiv 1909.08593)."""

    def __init__(self, config: PPOConfig) -> None:
        self.coefficient = config.kl_coef
        self._target = config.adaptive_kl_target
        self._horizon = config.adaptive_kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        """`kl` in nats a response, measured over `episodes`."""
        if self._target is not None:
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * episodes / self._horizon


class PPO:
    """PPO-ptx on four models. `step(prompts)` is one iteration; `prompts` are this rank's, in micro-batches as
    loaded.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: PPOConfig,
        sampling: SamplingParams,
        *,
        policy: Any,
        value: Any,
        reference: Any,
        reward: Any,
        average: Any | None,
        pretraining: Loader | None,
        tokenizer: Any,
        slots: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        self.mesh = mesh
        self.config = config
        self.sampling = sampling
        self.policy = policy
        self.value = value
        self.reference = reference
        self.reward = reward
        self.average = average
        self.pretraining = pretraining
        self._windows = iter(pretraining) if pretraining is not None else None
        self.tokenizer = tokenizer
        self.slots = slots
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.kl = KLController(config)
        self.iteration = 0

    def step(self, prompts: Sequence[Sequence[list[int]]]) -> dict[str, float]:
        times = {}
        start = time.perf_counter()
        with phase("rollout"):
            generated = self.sample([prompt for micro_batch in prompts for prompt in micro_batch])
        times["seconds_rollout"] = time.perf_counter() - start
        with phase("scoring"):
            rollouts = self.score(generated)
        times["seconds_scoring"] = time.perf_counter() - start - times["seconds_rollout"]
        with phase("update"):
            metrics = self.learn(rollouts)
        times["seconds_update"] = time.perf_counter() - start - sum(times.values())
        self.iteration += 1
        return metrics | times

    # ---- rollout ----------------------------------------------------------------------------------------------------

    def sample(self, prompts: list[list[int]]) -> list[tuple[list[int], Generated]]:
        """One response to each of this rank's prompts; randomness follows the episode's global number, not the
        layout.
        """
        first = self.iteration * self.config.batch_size + self.mesh.data_rank * len(prompts)
        generated = generate_all(
            self.policy.stage,
            prompts,
            self.sampling,
            mesh=self.mesh,
            eos=self.tokenizer.eos_token_id,
            tokenizer=self.tokenizer,
            slots=self.slots,
            ids=list(range(first, first + len(prompts))),
        )
        return list(zip(prompts, generated, strict=True))

    def score(self, episodes: list[tuple[list[int], Generated]]) -> Rollouts:
        """Adds reference log-probs, values and scores, then gathers the episodes of all data-parallel ranks."""
        local = self._tensors(episodes)
        batches = [local.packed(rows) for rows in torch.arange(len(episodes)).split(self.micro_batch_size)]
        reference = schedule.forward(self.mesh, self.reference, batches, self._response_logprobs)
        values = schedule.forward(self.mesh, self.value.stage, batches, self._response_values)
        scores = schedule.forward(self.mesh, self.reward, batches, self._final_scores)
        last = self.mesh.is_last_stage
        local.ref_logprobs[local.mask] = self.mesh.from_last_stage(torch.cat(reference) if last else None)
        local.values[local.mask] = self.mesh.from_last_stage(torch.cat(values) if last else None)
        local.scores = self.mesh.from_last_stage(torch.cat(scores) if last else None)
        return replace(local, **{f.name: self.mesh.gather_over_data(getattr(local, f.name)) for f in fields(local)})

    def _tensors(self, episodes: list[tuple[list[int], Generated]]) -> Rollouts:
        """The episodes as padded tensors, of the same shape on all data-parallel ranks."""
        device = self.mesh.device
        prompt_lengths = torch.tensor([len(prompt) for prompt, _ in episodes], device=device)
        response_lengths = torch.tensor([len(answer.tokens) for _, answer in episodes], device=device)
        longest = torch.stack([(prompt_lengths + response_lengths).max(), response_lengths.max()])
        L, R = self.mesh.max_over_data(longest).tolist()
        logprobs = [torch.as_tensor(answer.logprobs, dtype=torch.float32, device=device) for _, answer in episodes]
        tokens = [torch.tensor(prompt + list(answer.tokens), device=device) for prompt, answer in episodes]
        return Rollouts(
            tokens=torch.stack([F.pad(row, (0, L - row.numel())) for row in tokens]),
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            stopped=torch.tensor([answer.stopped for _, answer in episodes], device=device),
            logprobs=torch.stack([F.pad(row, (0, R - row.numel())) for row in logprobs]),
            ref_logprobs=torch.zeros(len(episodes), R, device=device),
            values=torch.zeros(len(episodes), R, device=device),
            scores=torch.zeros(len(episodes), device=device),
        )

    def _response_logprobs(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        logprobs = ops.linear_logprobs(
            hidden,
            labels=batch.labels,
            mask=batch.loss_mask,
            temperature=self.sampling.temperature,
            **self.reference.lm_head(),
        ).logprobs
        return logprobs[batch.loss_mask]

    def _response_values(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.value.stage.score(hidden[batch.loss_mask])

    def _final_scores(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.reward.score(hidden[batch.cu_seqlens[1:].long() - 1])

    # ---- update -----------------------------------------------------------------------------------------------------

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """Advantages, then `inner_epochs` passes of minibatch updates over a fresh shuffle; returns their mean
        metrics.
        """
        config = self.config
        mask = rollouts.mask
        scores = rollouts.scores
        if config.no_stop_penalty is not None:
            scores = torch.where(rollouts.stopped, scores, config.no_stop_penalty)
        rewards, kl = ops.shaped_rewards(
            scores,
            rollouts.logprobs,
            rollouts.ref_logprobs,
            mask,
            self.kl.coefficient,
            estimator=config.kl_estimator,
            clip=config.kl_clip,
        )
        shaped = rewards
        if config.whiten_rewards:
            shaped = ops.masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = ops.gae(shaped, rollouts.values, mask, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages = ops.masked_whiten(advantages, mask)
        metrics = rollout_metrics(rollouts, scores, rewards, kl, returns) | {"kl_coef": self.kl.coefficient}

        generator = torch.Generator().manual_seed(self.seed + self.iteration)
        updates: list[dict[str, float]] = []
        for _ in range(config.inner_epochs):
            order = torch.randperm(rollouts.scores.numel(), generator=generator)
            for rows in order.split(config.minibatch_size):
                batches = self._minibatch(rollouts, rows, advantages, returns)
                updates.append(self.update_policy(batches, first=not updates) | self.update_value(batches))
        if self.average is not None:
            self.average.update()
        self.kl.update(metrics["kl"], rollouts.scores.numel())
        metrics |= _mean_over_updates(updates)
        # The sum of all that is minimised, as the other algorithms report it.
        metrics["loss"] = metrics["policy_loss"] - config.entropy_coef * metrics["entropy"] + metrics["value_loss"]
        metrics["loss"] += config.gamma_ptx * metrics.get("ptx_loss", 0.0)
        return metrics

    def _minibatch(self, rollouts: Rollouts, rows: Tensor, advantages: Tensor, returns: Tensor) -> list[PPOBatch]:
        """This rank's share of a minibatch, in packed micro-batches."""
        mask = rollouts.mask
        share = rows.chunk(self.mesh.data_size)[self.mesh.data_rank]
        batches = []
        for part in share.split(self.micro_batch_size):
            batch = rollouts.packed(part)

            def spread(per_response: Tensor, part: Tensor = part, batch: PackedBatch = batch) -> Tensor:
                row = per_response.new_zeros(batch.tokens.numel())
                row[batch.loss_mask] = per_response[part][mask[part]]
                return row

            batches.append(
                PPOBatch(
                    **vars(batch),
                    old_logprobs=spread(rollouts.logprobs),
                    advantages=spread(advantages),
                    old_values=spread(rollouts.values),
                    returns=spread(returns),
                )
            )
        return batches

    def update_policy(self, batches: Sequence[PPOBatch], first: bool) -> dict[str, float]:
        """One policy update: PPO gradients, then pretraining gradients, summed in the same buffers."""
        tokens = counted_tokens(self.mesh, batches)
        pretraining = [b.to(self.mesh.device) for b in next(self._windows)] if self._windows is not None else []
        pretraining_tokens = counted_tokens(self.mesh, pretraining) if pretraining else tokens

        def head(hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Metrics]:
            if isinstance(batch, PPOBatch):
                return self._ppo_loss(hidden, batch, tokens, first)
            loss = language_loss(self.policy.stage, hidden, batch, pretraining_tokens)
            return self.config.gamma_ptx * loss, {"ptx_loss": loss.detach()}

        rows = self.policy.accumulate([*batches, *pretraining], head)
        metrics = self.mesh.sum_metrics(rows, largest=("ratio_deviation",))
        return metrics | self.policy.step()

    def _ppo_loss(self, hidden: Tensor, batch: PPOBatch, tokens: Tensor, first: bool) -> tuple[Tensor, Metrics]:
        config, head = self.config, self.policy.stage.lm_head()
        loss = ops.linear_ppo_loss(
            hidden,
            labels=batch.labels,
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            mask=batch.loss_mask,
            clip=config.clip,
            entropy_coef=config.entropy_coef,
            temperature=self.sampling.temperature,
            denominator=tokens,
            **head,
        )
        metrics = {
            "policy_loss": loss.policy_loss,
            "entropy": loss.entropy,
            "clip_fraction": loss.clip_fraction,
            "approx_kl": loss.approx_kl,
        }
        if first:
            # Rollouts run on the training weights, so the first update's ratios are 1 but for rounding.
            with torch.no_grad():
                now = ops.linear_logprobs(
                    hidden, labels=batch.labels, mask=batch.loss_mask, temperature=self.sampling.temperature, **head
                ).logprobs
            metrics["ratio_deviation"] = torch.expm1((now - batch.old_logprobs).abs().max())
        return loss.loss, metrics

    def update_value(self, batches: Sequence[PPOBatch]) -> dict[str, float]:
        """One value update on the clipped squared error."""
        config = self.config
        tokens = counted_tokens(self.mesh, batches)

        def head(hidden: Tensor, batch: PPOBatch) -> tuple[Tensor, Metrics]:
            # The value model shares nothing with the policy, so the policy's terms are switched off by zero advantages.
            nothing = torch.zeros_like(batch.old_values)
            loss = ops.ppo_loss(
                nothing,
                nothing,
                nothing,
                batch.loss_mask,
                values=self.value.stage.score(hidden),
                old_values=batch.old_values,
                returns=batch.returns,
                value_clip=config.value_clip,
                denominator=tokens,
            )
            return loss.loss, {"value_loss": loss.value_loss, "value_clip_fraction": loss.value_clip_fraction}

        metrics = self.mesh.sum_metrics(self.value.accumulate(batches, head))
        step = self.value.step()
        return metrics | {"value_grad_norm": step["grad_norm"], "value_lr": step["lr"]}

    # ---- what a checkpoint holds ------------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        average = {"ema": self.average.stage} if self.average is not None else {}
        return {"policy": self.policy.stage, "value": self.value.stage, **average}

    def learners(self) -> dict[str, Any]:
        return {"policy": self.policy, "value": self.value}

    def statistics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        pretraining = self.pretraining.state_dict() if self.pretraining is not None else None
        return {"iteration": self.iteration, "kl_coefficient": self.kl.coefficient, "pretraining": pretraining}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.kl.coefficient = state["kl_coefficient"]
        if self.pretraining is not None:
            self.pretraining.load_state_dict(state["pretraining"])
            self._windows = iter(self.pretraining)


def rollout_metrics(
    rollouts: Rollouts, scores: Tensor, rewards: Tensor, kl: Tensor, returns: Tensor
) -> dict[str, float]:
    """Means over the iteration's episodes. `kl` in nats a response (k1), `reward` with the KL penalty, `score`
    without.
    """
    mask = rollouts.mask
    errors = returns - rollouts.values
    variance = returns[mask].var(unbiased=False)
    log_ratio = rollouts.ref_logprobs - rollouts.logprobs
    metrics = {
        "score": scores.mean(),
        "reward": (rewards * mask).sum(1).mean(),
        "kl": (kl * mask).sum(1).mean(),
        "kl_k3": ((log_ratio.exp() - 1 - log_ratio) * mask).sum(1).mean(),
        "response_length": rollouts.response_lengths.float().mean(),
        "no_stop": 1.0 - rollouts.stopped.float().mean(),
        "explained_variance": 1.0 - errors[mask].var(unbiased=False) / variance.clamp_min(1e-12),
    }
    return {name: value.item() for name, value in metrics.items()}


def _mean_over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates of an iteration; what only the first one reports (ratio_deviation) as it is."""
    mean = {name: sum(update[name] for update in updates) / len(updates) for name in updates[-1]}
    return updates[0] | mean
