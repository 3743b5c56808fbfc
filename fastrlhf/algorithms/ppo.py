"""PPO-ptx: maximise E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))] + gamma E_pretrain[log pi(x)] (InstructGPT, equation
2).

An iteration: sample responses on the training weights; score them with the reward, reference and value models; shape
the rewards with the per-token KL, estimate advantages; update policy and value over minibatches, the pretraining
gradient summed into the policy's. Sizes: B episodes of the iteration over all data-parallel ranks, R the longest
response, T the tokens of a packed micro-batch. Every rank holds all of an iteration's rollouts. docs/ppo.md sets each
equation beside the paper's.

    torchrun --nproc-per-node 8 -m fastrlhf ppo configs/instructgpt/1.3b/ppo_ptx.yaml
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fastrlhf import ops
from fastrlhf.algorithms.offload import Offload
from fastrlhf.algorithms.ppo_metrics import PhaseTimer, over_updates, rollout_metrics
from fastrlhf.algorithms.ppo_warnings import RunMonitor
from fastrlhf.algorithms.rewards import Rewards
from fastrlhf.algorithms.rollouts import (
    PPOBatch,
    Rollouts,
    counted_places,
    gather,
    own_rows,
    sample_records,
    training_batch,
)
from fastrlhf.algorithms.sft import counted_tokens, language_loss
from fastrlhf.config import Config, PPOConfig
from fastrlhf.data.batches import PackedBatch
from fastrlhf.data.loader import Loader, permutation
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import Generated, SamplingParams, generate_all
from fastrlhf.ops import RolloutTargets
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
Metrics = dict[str, Tensor]
logger = logging.getLogger(__name__)


class KLController:
    """The KL coefficient: fixed, or adapted to hold a target (Ziegler et al. 2019, section 2.2; arXiv 1909.08593)."""

    def __init__(self, config: PPOConfig) -> None:
        self.coefficient = config.kl_coef
        self._target = config.adaptive_kl_target
        self._horizon = config.adaptive_kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        """`kl` in nats a response, measured over `episodes`; one that is not finite (fp16) changes nothing."""
        if self._target is not None and math.isfinite(kl):
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * episodes / self._horizon


@dataclass(kw_only=True)
class Models:
    """What PPO runs, all without dropout; `policy` and `value` are learners, the others stages."""

    policy: Any
    value: Any
    reference: Any
    """The policy's start, never changed."""
    rewards: Rewards
    average: Any | None = None
    """Running average of the policy (`ExponentialAverage`)."""


class PPO:
    """`step(prompts)` is one iteration; `prompts` are this rank's, in micro-batches as loaded.

    `pretraining` is the stream of the ptx term (None: plain PPO). `write_samples(iteration, records)` takes a few
    responses of each iteration, on the rank that writes files.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: Config,
        models: Models,
        tokenizer: Any,
        pretraining: Loader | None = None,
        write_samples: Callable[[int, list[dict[str, Any]]], None] | None = None,
    ) -> None:
        self.mesh = mesh
        self.config = config.ppo
        self.train = config.train
        self.slots = config.generation.slots
        self.sampling = SamplingParams.from_config(config.generation, config.train.seed)
        self.policy = models.policy
        self.value = models.value
        self.reference = models.reference
        self.rewards = models.rewards
        self.average = models.average
        self.tokenizer = tokenizer
        self.pretraining = pretraining
        self._windows = iter(pretraining) if pretraining is not None else None
        self.write_samples = write_samples
        self.samples = config.log.samples
        self.kl = KLController(config.ppo)
        self.watch = RunMonitor(config.model.dtype, config.ppo.adaptive_kl_target)
        self.iteration = 0
        self._on_device: Callable[[Any], Any] = (
            self._offload() if config.ppo.offload else nullcontext
        )

    def step(self, prompts: Sequence[Sequence[list[int]]]) -> dict[str, float]:
        clock = PhaseTimer()
        with clock("rollout"):
            episodes = self.sample([prompt for micro_batch in prompts for prompt in micro_batch])
        with clock("scoring"):
            rollouts = self.score(gather(self.mesh, episodes))
        with clock("update"):
            metrics = self.learn(rollouts)
        self.iteration += 1
        metrics |= clock.metrics(
            sampled_tokens=rollouts.response_lengths.sum().item(),
            trained_tokens=metrics.pop("trained_tokens"),
        )
        self._report(rollouts, metrics)
        return metrics

    # ---- rollout ----------------------------------------------------------------------------------------------------

    def sample(self, prompts: list[list[int]]) -> list[tuple[list[int], Generated]]:
        """One response to each of this rank's prompts; randomness follows the episode's global number, not the
        layout.
        """
        first = self.iteration * self.config.batch_size + self.mesh.data_rank * len(prompts)
        generated = generate_all(
            self.policy.model,
            prompts,
            self.sampling,
            mesh=self.mesh,
            eos=self.tokenizer.eos_token_id,
            tokenizer=self.tokenizer,
            slots=self.slots,
            ids=list(range(first, first + len(prompts))),
        )
        return list(zip(prompts, generated, strict=True))

    def score(self, rollouts: Rollouts) -> Rollouts:
        """With reference log-probs, values and scores, each data-parallel rank those of its share of the tokens."""
        mesh = self.mesh
        micro_batches = own_rows(
            mesh, torch.arange(rollouts.scores.numel()), rollouts.lengths, self.train
        )
        batches = [rollouts.pack(rows) for rows in micro_batches]
        rows = torch.cat(micro_batches)
        with self._on_device(self.reference):
            reference = schedule.forward(mesh, self.reference, batches, self._reference_logprobs)
        values = schedule.forward(mesh, self.value.model, batches, self._values)
        scores = self.rewards.score(mesh, rollouts, rows, batches, self.tokenizer)

        def per_token(parts: list[Tensor]) -> Tensor:
            own = mesh.from_last_stage(torch.cat(parts) if mesh.is_last_stage else None)
            return rollouts.all_gather_rows(mesh, rows, rollouts.to_padded(rows, own))

        return replace(
            rollouts,
            ref_logprobs=per_token(reference),
            values=per_token(values),
            scores=rollouts.all_gather_rows(mesh, rows, scores),
        )

    def _reference_logprobs(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self._logprobs(self.reference, hidden, batch)[counted_places(batch)]

    def _logprobs(self, stage: Any, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Of the labels, at the sampling temperature, fp32 [T], 0 outside loss_mask."""
        return ops.linear_logprobs(
            hidden,
            labels=batch.labels,
            mask=batch.loss_mask,
            num_counted=batch.num_counted,
            temperature=self.sampling.temperature,
            **stage.lm_head(),
        ).logprobs

    def _values(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.value.model.score(hidden[counted_places(batch)])

    # ---- update -----------------------------------------------------------------------------------------------------

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """Advantages, then minibatch updates of policy and value; returns the iteration's metrics."""
        config = self.config
        scores = self.apply_no_stop_penalty(rollouts)
        targets = self.targets(rollouts, scores)
        metrics = rollout_metrics(rollouts, scores, targets.rewards, targets.returns)
        metrics["kl_coef"] = self.kl.coefficient
        updates: list[dict[str, float]] = []
        for rows in self.minibatches(rollouts.scores.numel()):
            micro_batches = own_rows(self.mesh, rows, rollouts.lengths, self.train)
            batches = [
                training_batch(rollouts, targets.advantages, targets.returns, own)
                for own in micro_batches
            ]
            update = self.update(batches, first=not updates)
            if update is None:
                break
            tokens = float(rollouts.lengths[rows].sum()) + update.pop("ptx_tokens", 0.0)
            updates.append(update | {"trained_tokens": tokens})
        if self.average is not None:
            with self._on_device(self.average.model):
                self.average.update()
        self.kl.update(metrics["kl"], rollouts.scores.numel())
        metrics |= over_updates(updates)
        # The sum of all that is minimised, as the other algorithms report it.
        metrics["loss"] = (
            metrics["policy_loss"]
            - config.entropy_coef * metrics["entropy"]
            + metrics["value_loss"]
        )
        metrics["loss"] += config.gamma_ptx * metrics.get("ptx_loss", 0.0)
        return metrics

    def apply_no_stop_penalty(self, rollouts: Rollouts) -> Tensor:
        """Scores [B]; a response without a stop token has ppo.no_stop_penalty instead of its own."""
        if self.config.no_stop_penalty is None:
            return rollouts.scores
        return torch.where(rollouts.stopped, rollouts.scores, self.config.no_stop_penalty)

    def targets(self, rollouts: Rollouts, scores: Tensor) -> RolloutTargets:
        """KL-shaped rewards, advantages and returns [B, R]; whitening is over the whole batch, which every rank has."""
        config, mask = self.config, rollouts.mask
        targets = ops.rollout_targets(
            scores,
            rollouts.logprobs,
            rollouts.ref_logprobs,
            rollouts.values,
            mask,
            kl_coef=self.kl.coefficient,
            estimator=config.kl_estimator,
            clip=config.kl_clip,
            gamma=config.gamma,
            lam=config.lam,
            whiten=config.whiten_advantages,
        )
        if not config.whiten_rewards:
            return targets
        shaped = ops.masked_whiten(targets.rewards, mask, shift_mean=False)
        advantages, returns = ops.gae(
            shaped, rollouts.values, mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            advantages = ops.masked_whiten(advantages, mask)
        return targets._replace(advantages=advantages, returns=returns)

    def minibatches(self, episodes: int) -> Iterator[Tensor]:
        """Rows of each minibatch, int64, the same on every rank: `inner_epochs` passes, each a fresh shuffle."""
        first = self.iteration * self.config.inner_epochs
        for epoch in range(first, first + self.config.inner_epochs):
            order = torch.from_numpy(permutation(episodes, self.train.seed, epoch))
            yield from order.split(self.config.minibatch_size)

    def update(self, batches: Sequence[PPOBatch], first: bool) -> dict[str, float] | None:
        """One update of both models on this rank's micro-batches. None, and nothing updated, when the policy is
        further from the sampling policy than ppo.target_kl.
        """
        metrics = self.policy_gradient(batches, first)
        if not first and self._too_far(metrics["approx_kl"]):
            return None
        metrics |= self.value_gradient(batches)
        self._check_finite(metrics)
        value = self.value.step()
        metrics |= {"value_grad_norm": value["grad_norm"], "value_lr": value["lr"]}
        return metrics | self.policy.step()

    def _too_far(self, approx_kl: float) -> bool:
        """Rank 0's answer: the ranks of a tensor-parallel group may differ in the last bits of what each holds whole,
        and one that stops while others go on leaves them waiting.
        """
        if self.config.target_kl is None:
            return False
        too_far = torch.tensor(
            approx_kl > self.config.target_kl, dtype=torch.uint8, device=self.mesh.device
        )
        dist.broadcast(too_far, src=0)
        return bool(too_far)

    def policy_gradient(self, batches: Sequence[PPOBatch], first: bool) -> dict[str, float]:
        """PPO gradients, then pretraining gradients, summed in the same buffers.

        The first minibatch of an iteration also measures the norm of each (`ppo_grad_norm`, and `ptx_grad_norm` with
        gamma), which takes a gradient reduction and a pipeline flush more than the others.
        """
        tokens = counted_tokens(self.mesh, batches)
        pretraining = (
            [b.to(self.mesh.device) for b in next(self._windows)]
            if self._windows is not None
            else []
        )
        pretraining_tokens = counted_tokens(self.mesh, pretraining) if pretraining else tokens

        def head(hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Metrics]:
            if isinstance(batch, PPOBatch):
                return self._ppo_loss(hidden, batch, tokens, first)
            loss = language_loss(self.policy.model, hidden, batch, pretraining_tokens)
            return self.config.gamma_ptx * loss, {"ptx_loss": loss.detach()}

        norms: dict[str, float] = {}
        if first and pretraining:
            rows, (ppo, ptx) = self.policy.accumulate_with_norms([batches, pretraining], head)
            norms = {"ppo_grad_norm": ppo, "ptx_grad_norm": ptx}
        else:
            rows = self.policy.accumulate([*batches, *pretraining], head)
        metrics = self.mesh.sum_metrics(rows, largest=("ratio_deviation",)) | norms
        return metrics | ({"ptx_tokens": float(pretraining_tokens)} if pretraining else {})

    def _ppo_loss(
        self, hidden: Tensor, batch: PPOBatch, tokens: Tensor, first: bool
    ) -> tuple[Tensor, Metrics]:
        config = self.config
        loss = ops.linear_ppo_loss(
            hidden,
            labels=batch.labels,
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            mask=batch.loss_mask,
            num_counted=batch.num_counted,
            clip=config.clip,
            entropy_coef=config.entropy_coef,
            temperature=self.sampling.temperature,
            denominator=tokens,
            **self.policy.model.lm_head(),
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
                now = self._logprobs(self.policy.model, hidden, batch)
            metrics["ratio_deviation"] = torch.expm1((now - batch.old_logprobs).abs().max())
        return loss.loss, metrics

    def value_gradient(self, batches: Sequence[PPOBatch]) -> dict[str, float]:
        """Gradient of the clipped squared error."""
        tokens = counted_tokens(self.mesh, batches)

        def head(hidden: Tensor, batch: PPOBatch) -> tuple[Tensor, Metrics]:
            # The value model shares nothing with the policy, so the policy's terms are switched off by zero advantages.
            nothing = torch.zeros_like(batch.old_values)
            loss = ops.ppo_loss(
                nothing,
                nothing,
                nothing,
                batch.loss_mask,
                values=self.value.model.score(hidden),
                old_values=batch.old_values,
                returns=batch.returns,
                value_clip=self.config.value_clip,
                denominator=tokens,
            )
            return loss.loss, {
                "value_loss": loss.value_loss,
                "value_clip_fraction": loss.value_clip_fraction,
            }

        return self.mesh.sum_metrics(self.value.accumulate(batches, head))

    def _check_finite(self, metrics: dict[str, float]) -> None:
        """Stops before a loss that is NaN or infinite reaches the weights. With fp16 the optimizer skips such updates
        by itself and lowers its loss scale.
        """
        if self.policy.model.config.fp16:
            return
        for name in ("policy_loss", "value_loss", "ptx_loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise UserError(
                    f"iteration {self.iteration + 1}: {name} is {metrics[name]}; stopped before this update, and the "
                    "last checkpoint is untouched: resume from it with a lower optimizer.lr (or ppo.value_lr), and "
                    "check the scores in samples.jsonl"
                )

    # ---- reporting and memory ---------------------------------------------------------------------------------------

    def _report(self, rollouts: Rollouts, metrics: dict[str, float]) -> None:
        for line in self.watch.check(self.iteration, metrics):
            if self.mesh.rank == 0:
                logger.warning("warning: %s", line)
        if self.write_samples is not None and self.samples:
            scores = self.apply_no_stop_penalty(rollouts)
            self.write_samples(
                self.iteration, sample_records(rollouts, scores, self.tokenizer, self.samples)
            )

    def _offload(self) -> Offload:
        """Sends what only some phases use to host memory."""
        offload = Offload(self.mesh.device)
        self.rewards.on_device = offload
        averaged = [self.average.model] if self.average is not None else []
        for stage in (self.reference, *(stage for _, stage in self.rewards.models), *averaged):
            offload.park(stage)
        return offload

    # ---- what a checkpoint holds ------------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        average = {"ema": self.average.model} if self.average is not None else {}
        return {"policy": self.policy.model, "value": self.value.model, **average}

    def learners(self) -> dict[str, Any]:
        return {"policy": self.policy, "value": self.value}

    def statistics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        pretraining = self.pretraining.state_dict() if self.pretraining is not None else None
        return {
            "iteration": self.iteration,
            "kl_coefficient": self.kl.coefficient,
            "pretraining": pretraining,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.kl.coefficient = state["kl_coefficient"]
        if (
            self.pretraining is not None and state["pretraining"] is not None
        ):  # None: gamma_ptx was 0
            self.pretraining.load_state_dict(state["pretraining"])
            self._windows = iter(self.pretraining)
