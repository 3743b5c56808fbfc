"""When the moving average of the policy moves, and how much of it is still the start."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from fastrlhf.algorithms.protocols import MovingAverage
from fastrlhf.algorithms.rewards import OnDevice
from fastrlhf.config import PPOConfig

logger = logging.getLogger(__name__)
_LARGE_SHARE = 0.1
"""Part of the average that may be the start at the end of a run without a warning."""


class PolicyAverage:
    """Moves an average (none: does nothing) after updates or iterations, as `ppo.ema_every` says.

    The average begins at the policy's weights, so it needs no correction of its bias; after n moves
    decay^n of it is still the start.
    """

    def __init__(self, average: MovingAverage | None, config: PPOConfig, steps: int | None) -> None:
        self._average = average
        self._decay = config.ema_decay or 0.0
        self._every = config.ema_every
        self._steps = steps or 0
        self._warned = False
        self.on_device: OnDevice = nullcontext
        self.moves = 0
        """Moves since the start of the run."""

    def after(self, event: str) -> None:
        """Move the average towards the current weights if `event` is ppo.ema_every."""
        if self._average is not None and event == self._every:
            with self.on_device(self._average.model):
                self._average.update()
            self.moves += 1

    def metrics(self, iteration: int, updates: int, *, is_main: bool) -> dict[str, float]:
        """Return ema_start_share, the part of the average that is the start; iterations from 1.

        Warns once if it will be above 0.1 at the end of the run, with as many `updates` in each
        iteration as in this one.
        """
        if self._average is None:
            return {}
        left = (self._steps - iteration) * (updates if self._every == "update" else 1)
        final = self._decay ** (self.moves + max(left, 0))
        if final > _LARGE_SHARE and not self._warned:
            self._warned = True
            if is_main:
                logger.warning(
                    "warning: ema-start: at the end of this run %.0f %% of the averaged policy, which is"
                    " evaluated and exported, will be the policy's start; lower ppo.ema_decay (%g), or"
                    " raise train.steps",
                    *(100 * final, self._decay),
                )
        return {"ema_start_share": self._decay**self.moves}
