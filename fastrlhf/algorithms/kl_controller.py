"""The KL coefficient of PPO: fixed, or adapted to a target."""

from __future__ import annotations

import math

from fastrlhf.config import PPOConfig


class KLController:
    """KL coefficient, fixed or adapted to hold ppo.adaptive_kl_target.

    The rule is that of Ziegler et al. 2019, section 2.2 (arXiv 1909.08593), for a horizon above the
    episodes of an iteration. Below a fifth of them its factor 1 + 0.2 episodes / horizon would be 0
    or negative and reward the KL, so the factor is limited to 0.1 .. 10 and the coefficient to
    1e-9 .. 1e9 times its start.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.coefficient = self._start = config.kl_coef
        self._target = config.adaptive_kl_target
        self._horizon = config.adaptive_kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        """Adapt the coefficient to `kl`, in nats per response, measured over `episodes`.

        A `kl` that is not finite (fp16) changes nothing.
        """
        if self._target is not None and math.isfinite(kl):
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            factor = _limited(1.0 + error * episodes / self._horizon, 0.1, 10.0)
            low, high = self._start * 1e-9, self._start * 1e9
            self.coefficient = _limited(self.coefficient * factor, low, high)


def _limited(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
