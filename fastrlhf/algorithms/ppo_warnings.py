"""Warnings of a PPO run: one line each, with a name, the observation and a remedy.

They are derived from the metrics of each iteration, so they cost nothing. Out of scope: acting on
them (ppo.target_kl and ppo.adaptive_kl_target do), and losses of fp32 and bf16 that are not finite,
which stop the run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Literal

WINDOW = 10
"""Iterations of history that a warning uses, and iterations before the same warning is repeated."""
RATIO_LIMIT = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}
"""Largest deviation of the first ratio from 1 that rounding explains, by the models' dtype."""
_RUNAWAY_FACTOR = 4.0
_RUNAWAY_KL = 10.0  # nats per response; growth of a KL below it is no sign of trouble
_MIN_HISTORY = 3  # iterations before their median KL counts as usual


class RunMonitor:
    """Checks the metrics of each iteration against those of the last `WINDOW` iterations."""

    def __init__(
        self, dtype: Literal["fp32", "bf16", "fp16"], kl_target: float | None = None
    ) -> None:
        self._ratio_limit = RATIO_LIMIT[dtype]
        self._kl_target = kl_target
        self._kl: deque[float] = deque(maxlen=WINDOW)
        self._score: deque[float] = deque(maxlen=WINDOW)
        self._bad_value_iterations = 0
        self._last_warned: dict[str, int] = {}

    def check(self, iteration: int, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings for the metrics of `iteration`; call once per iteration.

        Each is a line "name: iteration N: observation; remedy".
        """
        lines = []
        for name, text in self._warnings(metrics):
            if iteration - self._last_warned.get(name, -WINDOW) >= WINDOW:
                self._last_warned[name] = iteration
                lines.append(f"{name}: iteration {iteration}: {text}")
        self._kl.append(metrics["kl"])
        self._score.append(metrics["score"])
        return lines

    def _warnings(self, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Yield (name, text) of every condition that holds, repeated ones too."""
        yield from self._runaway(metrics["kl"], metrics["score"])
        broken = [
            name
            for name in ("loss", "policy_loss", "value_loss")
            if not math.isfinite(metrics.get(name, 0.0))
        ]
        if broken:
            yield (
                "not-finite",
                f"{broken[0]} is {metrics[broken[0]]}, so fp16 updates were skipped; try model.dtype=bf16, or a lower "
                "optimizer.lr",
            )
        explains_nothing = metrics["explained_variance"] <= 0
        self._bad_value_iterations = self._bad_value_iterations + 1 if explains_nothing else 0
        if self._bad_value_iterations >= WINDOW:
            yield (
                "dead-value-function",
                f"explained_variance has been 0 or below for {self._bad_value_iterations} iterations, so advantages "
                "are noise; try a higher ppo.value_lr, a larger ppo.value_clip, or another ppo.value_model",
            )
        if metrics["no_stop"] >= 1.0:
            yield (
                "no-stop",
                "no response ended with a stop token; try a larger generation.max_new_tokens, a lower "
                "ppo.no_stop_penalty, or an SFT model that stops",
            )
        deviation = metrics.get("ratio_deviation", 0.0)
        if not deviation <= self._ratio_limit:
            yield (
                "ratio-deviation",
                f"the first minibatch's ratio is off 1 by {deviation:.2g}, more than rounding ({self._ratio_limit:g}): "
                "rollout and training disagree; try model.dtype=fp32 to distinguish rounding from a bug, and report it",
            )

    def _runaway(self, kl: float, score: float) -> Iterator[tuple[str, str]]:
        enough = len(self._kl) >= _MIN_HISTORY
        usual = self._kl_target or (median(self._kl) if enough else math.inf)
        limit = max(_RUNAWAY_FACTOR * usual, _RUNAWAY_KL)
        if not kl > limit:
            return
        excess = f"{kl:.3g} nats a response, more than {limit:.3g}"
        if self._score and score > max(self._score):
            yield (
                "reward-runaway",
                f"the score rises to {score:.3g} while the KL reaches {excess}: the policy may be exploiting the "
                "reward (read samples.jsonl); try a higher ppo.kl_coef, ppo.adaptive_kl_target, or fewer train.steps",
            )
        else:
            yield (
                "kl-runaway",
                f"the KL from the reference is {excess}; try a lower optimizer.lr, a higher ppo.kl_coef, or "
                "ppo.target_kl",
            )
