"""PPO-ptx (InstructGPT, equation 2).

Maximises E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))] + gamma E_pretrain[log pi(x)].

An iteration samples responses on the training weights, scores them with the reward, reference and
value models, shapes the rewards with the per-token KL, estimates advantages, and updates policy and
value over minibatches; the pretraining gradient is added to the policy's. Sizes: B episodes of the
iteration over all data-parallel ranks, R the longest response, T the tokens of a packed
micro-batch. Every rank holds all of an iteration's rollouts. docs/ppo.md compares each equation
with the paper's.

    torchrun --nproc-per-node 8 -m fastrlhf ppo configs/instructgpt/1.3b/ppo_ptx.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, cast

import torch
import torch.distributed as dist

from fastrlhf import ops
from fastrlhf.algorithms.episode_scores import EpisodeScorer, label_logprobs
from fastrlhf.algorithms.kl_controller import KLController
from fastrlhf.algorithms.offload import Offload
from fastrlhf.algorithms.policy_average import PolicyAverage
from fastrlhf.algorithms.ppo_metrics import PhaseTimer, average_updates, rollout_metrics
from fastrlhf.algorithms.ppo_warnings import RunMonitor
from fastrlhf.algorithms.protocols import Learner, MovingAverage
from fastrlhf.algorithms.rewards import OnDevice, Rewards
from fastrlhf.algorithms.rollouts import (
    PPOBatch,
    Rollouts,
    SampleRecord,
    gather,
    own_rows,
    sample_records,
    training_batch,
)
from fastrlhf.algorithms.sft import counted_tokens, language_loss
from fastrlhf.checkpoint.soundness import check_losses_finite
from fastrlhf.config import Config
from fastrlhf.data.batches import PackedBatch, TokenizedPrompt
from fastrlhf.data.loader import Loader, permutation
from fastrlhf.data.tokenize import stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import Generated, SamplingParams, generate_all
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tensor = torch.Tensor
logger = logging.getLogger(__name__)
_POLICY_METRICS = ("policy_loss", "entropy", "clip_fraction", "approx_kl")
_VALUE_METRICS = ("value_loss", "value_clip_fraction")
"""Fields of `ops.PPOLoss` that a micro-batch reports."""


@dataclass(kw_only=True)
class Models:
    """The models of PPO, all without dropout."""

    policy: Learner
    value: Learner
    reference: GPT
    """The policy at the start of the run, never changed."""
    rewards: Rewards
    average: MovingAverage | None = None
    """Moving average of the policy."""


class PPOState(TypedDict):
    """State of a run in addition to its models and prompts, for JSON."""

    iteration: int
    average_moves: int
    """Moves of the policy's average."""
    kl_coefficient: float
    pretraining: dict[str, object] | None
    """State of the loader of pretraining windows; None without the ptx term."""
    reference_model: str | None
    """ppo.reference_model, from which the run's KL is measured."""


class PPO:
    """Proximal policy optimization, one iteration a step.

    `pretraining` loads the windows of the ptx term (None: plain PPO). `write_samples(iteration,
    records)` is called after each iteration with some of its responses; only the rank that writes
    files passes it.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: Config,
        models: Models,
        tokenizer: PreTrainedTokenizerFast,
        *,
        pretraining: Loader[list[int], PackedBatch] | None = None,
        write_samples: Callable[[int, list[SampleRecord]], None] | None = None,
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
        self.rewards.timeout_s = config.parallel.timeout_s
        self.average = models.average
        self.tokenizer = tokenizer
        self.pretraining = pretraining
        self._windows = iter(pretraining) if pretraining is not None else None
        self.write_samples = write_samples
        self.samples = config.log.samples
        self.kl = KLController(config.ppo)
        self.monitor = RunMonitor(config.model.dtype, config.ppo.adaptive_kl_target)
        self.iteration = 0
        self._on_device: OnDevice = self._offload() if config.ppo.offload else nullcontext
        self.scorer = EpisodeScorer(
            mesh=mesh,
            train=config.train,
            tokenizer=tokenizer,
            reference=models.reference,
            value=models.value.model,
            rewards=models.rewards,
            temperature=self.sampling.temperature,
            on_device=self._on_device,
        )
        self.averaging = PolicyAverage(models.average, config.ppo, config.train.steps)
        self.averaging.on_device = self._on_device

    def step(self, prompts: Sequence[Sequence[TokenizedPrompt]]) -> dict[str, float]:
        """Run one iteration on this rank's prompts, in micro-batches as loaded; return metrics."""
        timer = PhaseTimer()
        own = [prompt for micro_batch in prompts for prompt in micro_batch]
        with timer("rollout"):
            episodes = self.sample([prompt.tokens for prompt in own])
        with timer("scoring"):
            rollouts = self.score(gather(self.mesh, episodes, self.rewards.records_of(own)))
        with timer("update"):
            metrics = self.learn(rollouts)
        self.iteration += 1
        metrics |= timer.metrics(
            sampled_tokens=rollouts.response_lengths.sum().item(),
            trained_tokens=metrics.pop("trained_tokens"),
        )
        self._report(rollouts, metrics)
        return metrics

    # ---- rollout --------------------------------------------------------------------------------

    def sample(self, prompts: list[list[int]]) -> list[tuple[list[int], Generated]]:
        """Sample one response to each of this rank's prompts; return (prompt, response) pairs.

        Sampling noise is keyed by global episode index, so the result does not depend on the
        parallel layout.
        """
        first = self.iteration * self.config.batch_size + self.mesh.data_rank * len(prompts)
        return self.respond(prompts, range(first, first + len(prompts)), self.sampling)

    def respond(
        self, prompts: list[list[int]], ids: Sequence[int], sampling: SamplingParams
    ) -> list[tuple[list[int], Generated]]:
        """Sample one response to each of `prompts` from the current weights.

        `ids[i]` and `sampling.seed` choose the noise of response i.
        """
        generated = generate_all(
            self.policy.model,
            prompts,
            sampling,
            mesh=self.mesh,
            eos=stop_token_ids(self.tokenizer),
            tokenizer=self.tokenizer,
            slots=self.slots,
            ids=ids,
        )
        return list(zip(prompts, generated, strict=True))

    def score(self, rollouts: Rollouts) -> Rollouts:
        """Fill in reference log-probs, values and scores; data-parallel ranks share the work."""
        return self.scorer.score(rollouts)

    # ---- update ---------------------------------------------------------------------------------

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """Estimate advantages, then update policy and value over minibatches; return metrics."""
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
            self.averaging.after("update")
        self.averaging.after("iteration")
        is_main = self.mesh.rank == 0
        metrics |= self.averaging.metrics(self.iteration + 1, len(updates), is_main=is_main)
        self.kl.update(metrics["kl"], rollouts.scores.numel())
        metrics |= average_updates(updates)
        # The sum of all losses that are minimised, as in the other algorithms.
        loss = metrics["policy_loss"] - config.entropy_coef * metrics["entropy"]
        loss += metrics["value_loss"]
        metrics["loss"] = loss + config.gamma_ptx * metrics.get("ptx_loss", 0.0)
        return metrics

    def apply_no_stop_penalty(self, rollouts: Rollouts) -> Tensor:
        """Return the scores [B], with ppo.no_stop_penalty for responses without a stop token."""
        if self.config.no_stop_penalty is None:
            return rollouts.scores
        return torch.where(rollouts.stopped, rollouts.scores, self.config.no_stop_penalty)

    def targets(self, rollouts: Rollouts, scores: Tensor) -> ops.RolloutTargets:
        """Return KL-shaped rewards, advantages and returns [B, R].

        Whitening is over all B episodes, which every rank has.
        """
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
        """Yield the rows of each minibatch, int64, the same on every rank.

        There are ppo.inner_epochs passes over all episodes, each in a new order.
        """
        first = self.iteration * self.config.inner_epochs
        for epoch in range(first, first + self.config.inner_epochs):
            order = torch.from_numpy(permutation(episodes, self.train.seed, epoch))
            yield from order.split(self.config.minibatch_size)

    def update(self, batches: Sequence[PPOBatch], first: bool) -> dict[str, float] | None:
        """Update policy and value once, on this rank's micro-batches of a minibatch.

        Returns the metrics; None if nothing was updated because approx_kl is above ppo.target_kl.
        """
        metrics = self.policy_gradient(batches, first)
        if not first and self._exceeds_target_kl(metrics["approx_kl"]):
            return None
        metrics |= self.value_gradient(batches)
        if not self.policy.model.config.fp16:  # its optimizer skips updates that are not finite
            check_losses_finite(f"iteration {self.iteration + 1}", metrics)
        value = self.value.step()
        metrics |= {"value_grad_norm": value["grad_norm"], "value_lr": value["lr"]}
        if "skipped" in value:
            metrics["value_skipped"] = value["skipped"]
        return metrics | self.policy.step()

    def _exceeds_target_kl(self, approx_kl: float) -> bool:
        """Return whether rank 0's `approx_kl` is above ppo.target_kl.

        Rank 0 decides for all: the ranks of a tensor-parallel group may differ in the last bits of
        values that each computes itself, and a rank that stops while others continue would leave
        them waiting.
        """
        if self.config.target_kl is None:
            return False
        is_above = approx_kl > self.config.target_kl
        exceeds = torch.tensor(is_above, dtype=torch.uint8, device=self.mesh.device)
        dist.broadcast(exceeds, src=0)
        return bool(exceeds)

    def policy_gradient(self, batches: Sequence[PPOBatch], first: bool) -> dict[str, float]:
        """Accumulate PPO and pretraining gradients in the same buffers; return the metrics.

        The first minibatch of an iteration also measures the norm of each (`ppo_grad_norm`, and
        `ptx_grad_norm` with gamma), which takes one more gradient reduction and pipeline flush than
        the others.
        """
        tokens = counted_tokens(self.mesh, batches)
        pretraining: list[PackedBatch] = []
        if self._windows is not None:
            pretraining = [batch.to(self.mesh.device) for batch in next(self._windows)]
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
        extra = {"ratio_deviation": first, "ptx_loss": bool(pretraining)}
        names = [*_POLICY_METRICS, *(name for name, is_measured in extra.items() if is_measured)]
        metrics = self.mesh.sum_metrics(rows, names, largest=("ratio_deviation",)) | norms
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
        metrics = {name: getattr(loss, name) for name in _POLICY_METRICS}
        if first:
            # Rollouts run on the training weights: the first update's ratios are 1 up to rounding.
            with torch.no_grad():
                now = label_logprobs(self.policy.model, hidden, batch, self.sampling.temperature)
            metrics["ratio_deviation"] = torch.expm1((now - batch.old_logprobs).abs().max())
        return loss.loss, metrics

    def value_gradient(self, batches: Sequence[PPOBatch]) -> dict[str, float]:
        """Accumulate the gradients of the clipped squared error; return the metrics."""
        tokens = counted_tokens(self.mesh, batches)

        def head(hidden: Tensor, batch: PPOBatch) -> tuple[Tensor, Metrics]:
            # Zero advantages switch off the terms of the policy, which is another model.
            zeros = torch.zeros_like(batch.old_values)
            loss = ops.ppo_loss(
                *(zeros, zeros, zeros),
                batch.loss_mask,
                values=self.value.model.score(hidden),
                old_values=batch.old_values,
                returns=batch.returns,
                value_clip=self.config.value_clip,
                denominator=tokens,
            )
            return loss.loss, {name: getattr(loss, name) for name in _VALUE_METRICS}

        return self.mesh.sum_metrics(self.value.accumulate(batches, head), _VALUE_METRICS)

    # ---- reporting and memory -------------------------------------------------------------------

    def _report(self, rollouts: Rollouts, metrics: dict[str, float]) -> None:
        """Log warnings and write samples."""
        for line in self.monitor.check(self.iteration, metrics):
            if self.mesh.rank == 0:
                logger.warning("warning: %s", line)
        if self.write_samples is not None and self.samples:
            scores = self.apply_no_stop_penalty(rollouts)
            records = sample_records(rollouts, scores, self.tokenizer, self.samples)
            self.write_samples(self.iteration, records)

    def _offload(self) -> Offload:
        """Move the models that only some phases use to host memory."""
        offload = Offload(self.mesh.device)
        self.rewards.on_device = offload
        averaged = [self.average.model] if self.average is not None else []
        for model in (self.reference, *(model for _, model in self.rewards.models), *averaged):
            offload.to_host(model)
        return offload

    # ---- contents of a checkpoint ---------------------------------------------------------------

    def models(self) -> dict[str, GPT]:
        """Return the models that a checkpoint holds."""
        average = {"ema": self.average.model} if self.average is not None else {}
        return {"policy": self.policy.model, "value": self.value.model, **average}

    def learners(self) -> dict[str, Learner]:
        """Return the learners whose optimizer state a checkpoint holds."""
        return {"policy": self.policy, "value": self.value}

    def statistics(self) -> dict[str, float]:
        """Return nothing: only reward models have statistics."""
        return {}

    def state_dict(self) -> PPOState:
        """Return the state of the run in addition to its models and prompts, for JSON."""
        pretraining = self.pretraining.state_dict() if self.pretraining is not None else None
        return {
            "iteration": self.iteration,
            "average_moves": self.averaging.moves,
            "kl_coefficient": self.kl.coefficient,
            "pretraining": pretraining,
            "reference_model": self.config.reference_model,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned.

        Without pretraining state (ppo.gamma_ptx was 0) the windows start from the beginning. Without
        average_moves the run moved the average once an iteration. Raises UserError if the run had
        another ppo.reference_model.
        """
        saved = cast("PPOState", state)
        reference = state.get("reference_model", self.config.reference_model)
        if reference != self.config.reference_model:
            raise UserError(
                f"ppo.reference_model is {self.config.reference_model or 'null'}, but the run to"
                f" resume measures its KL from {reference or 'null'}; set it back, or give another"
                " output_dir"
            )
        self.iteration = saved["iteration"]
        self.averaging.moves = cast("int", state.get("average_moves", self.iteration))
        self.kl.coefficient = saved["kl_coefficient"]
        if self.pretraining is not None and saved["pretraining"] is not None:
            self.pretraining.load_state_dict(saved["pretraining"])
            self._windows = iter(self.pretraining)
