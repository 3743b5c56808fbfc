"""The numbers of a PPO iteration: what the episodes were like, how the updates went, where the time went.

Means of losses come from the updates themselves (ppo.py); nothing here changes training.
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
    """Means over the iteration's episodes.

    `score` [B] with penalties but without the KL, `reward` (rewards [B, R] summed over a response) with it; `kl` (k1)
    and `kl_k3` in nats a response: log-ratio and its low-variance estimate, both of KL(policy || reference).
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


def over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the updates of an iteration, but that `trained_tokens` are added up; what only the first one reports
    (ratio_deviation, the norms of the two parts) as it is; and the number of `updates`.
    """
    total = {name: sum(update[name] for update in updates) for name in updates[-1]}
    mean = {name: value / len(updates) for name, value in total.items()}
    counts = {"trained_tokens": total["trained_tokens"], "updates": float(len(updates))}
    return {**updates[0], **mean, **counts}


class PhaseTimer:
    """Wall-clock seconds of an iteration's phases, each named to the watchdog too."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with phase(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what the phase has queued is its own
        self._seconds[name] = time.perf_counter() - start

    def metrics(self, *, sampled_tokens: float, trained_tokens: float) -> dict[str, float]:
        """seconds_* and share_* of each phase; tokens a second over all ranks: response tokens in the rollout, tokens
        of episodes and pretraining windows in the update.
        """
        total = sum(self._seconds.values())
        return {
            **{f"seconds_{name}": seconds for name, seconds in self._seconds.items()},
            **{f"share_{name}": seconds / total for name, seconds in self._seconds.items()},
            "rollout_tokens_per_second": sampled_tokens / self._seconds["rollout"],
            "train_tokens_per_second": trained_tokens / self._seconds["update"],
        }
