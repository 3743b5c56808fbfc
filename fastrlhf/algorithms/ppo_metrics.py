"""Metrics of a PPO iteration: of its episodes, of its updates, and of the time of its phases.

Mean losses come from the updates themselves (ppo.py). Nothing in this module changes training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fastrlhf.algorithms.rollouts import Rollouts
from fastrlhf.parallel.watchdog import phase

Tensor = torch.Tensor


def rollout_metrics(
    rollouts: Rollouts, scores: Tensor, rewards: Tensor, returns: Tensor
) -> dict[str, float]:
    """Return means over the iteration's episodes; scores [B], rewards and returns [B, R].

    `score` includes penalties but not the KL; `reward`, summed over a response, includes both. `kl`
    (k1) and `kl_k3` are in nats per response: the log-ratio and its low-variance estimate, both of
    KL(policy || reference).
    """
    mask = rollouts.mask
    log_ratio = (rollouts.ref_logprobs - rollouts.logprobs) * mask
    errors = returns - rollouts.values
    variance = returns[mask].var(unbiased=False)
    metrics = {
        "score": scores.mean(),
        "reward": (rewards * mask).sum(1).mean(),
        "kl": -log_ratio.sum(1).mean(),
        "kl_k3": (torch.expm1(log_ratio) - log_ratio).sum(1).mean(),
        "response_length": rollouts.response_lengths.float().mean(),
        "no_stop": 1.0 - rollouts.stopped.float().mean(),
        "explained_variance": 1.0 - errors[mask].var(unbiased=False) / variance.clamp_min(1e-12),
    }
    return {name: value.item() for name, value in metrics.items()}


def average_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the metrics of an iteration's updates.

    `trained_tokens` is summed; metrics that only the first update reports (ratio_deviation,
    ppo_grad_norm, ptx_grad_norm) are kept as they are; `updates` counts them.
    """
    total = {name: sum(update[name] for update in updates) for name in updates[-1]}
    mean = {name: value / len(updates) for name, value in total.items()}
    counts = {"trained_tokens": total["trained_tokens"], "updates": float(len(updates))}
    return {**updates[0], **mean, **counts}


class PhaseTimer:
    """Wall-clock seconds of an iteration's phases, whose names the watchdog reports too."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the phase `name`, a block."""
        start = time.perf_counter()
        with phase(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # work that the phase has queued belongs to it
        self._seconds[name] = time.perf_counter() - start

    def metrics(self, *, sampled_tokens: float, trained_tokens: float) -> dict[str, float]:
        """Return seconds_* and share_* of each phase, and tokens per second over all ranks.

        The rollout counts response tokens, the update the tokens of episodes and pretraining
        windows.
        """
        total = sum(self._seconds.values())
        return {
            **{f"seconds_{name}": seconds for name, seconds in self._seconds.items()},
            **{f"share_{name}": seconds / total for name, seconds in self._seconds.items()},
            "rollout_tokens_per_second": sampled_tokens / self._seconds["rollout"],
            "train_tokens_per_second": trained_tokens / self._seconds["update"],
        }
