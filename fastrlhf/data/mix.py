"""Pretraining rows mixed into demonstrations, for the RL starting point (arXiv 2203.02155, appendix C: 10 %)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastrlhf.data.batches import DemonstrationTokens
from fastrlhf.data.pretrain import PretrainWindows
from fastrlhf.errors import UserError

log = logging.getLogger(__name__)


class Mixture(Sequence[DemonstrationTokens]):
    """All demonstrations, then as many pretraining rows as make `fraction` of the whole; the Loader's shuffle mixes
    them.

    The rows are windows drawn by `seed` without repetition as long as there are enough. A row is the window's first L
    tokens with every label counting, so that it is no longer than `sequence_length`.
    """

    def __init__(
        self,
        demonstrations: Sequence[DemonstrationTokens],
        windows: PretrainWindows,
        fraction: float,
        seed: int,
    ) -> None:
        if not 0.0 <= fraction < 1.0:
            raise UserError(
                f"data.pretrain_fraction is {fraction}; expected a number from 0 to below 1"
            )
        self.demonstrations = demonstrations
        self.windows = windows
        self.rows = round(len(demonstrations) * fraction / (1.0 - fraction))
        if self.rows > len(windows):
            log.warning(
                "%d pretraining rows are drawn from only %d windows, so some repeat",
                self.rows,
                len(windows),
            )
        self._order = windows.order(seed, epoch=0)

    def __len__(self) -> int:
        """Demonstrations and pretraining rows."""
        return len(self.demonstrations) + self.rows

    def __getitem__(self, index: Any) -> Any:
        """Demonstration `index`, or after them a pretraining row with a prompt length of 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index < len(self.demonstrations):
            return self.demonstrations[index]
        row = (index - len(self.demonstrations)) % len(self.windows)
        return DemonstrationTokens(self.windows[int(self._order[row])][:-1], 0)
