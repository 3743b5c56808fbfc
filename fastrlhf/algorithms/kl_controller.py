"""The KL coefficient of PPO: fixed, or adapted to a target."""

from __future__ import annotations

import math

from fastrlhf.config import PPOConfig


class KLController:
    """KL coefficient, fixed or adapted to hold ppo.adaptive_kl_target.

    The rule is that of Ziegler et al. 2019, section 2.2 (arXiv 1909.08593).
    """

    def __init__(self, config: PPOConfig) -> None:
        self.coefficient = config.kl_coef
        self._target = config.adaptive_kl_target
        self._horizon = config.adaptive_kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        """Adapt the coefficient to `kl`, in nats per response, measured over `episodes`.

        A `kl` that is not finite (fp16) changes nothing.
        """
        if self._target is not None and math.isfinite(kl):
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * episodes / self._horizon
