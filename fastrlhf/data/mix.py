"""Pretraining rows mixed into demonstrations, for the model that PPO starts from.

InstructGPT mixed in 10 % (arXiv 2203.02155, appendix C).
"""

from __future__ import annotations

import logging

from fastrlhf.data.batches import TokenizedDemonstration
from fastrlhf.data.loader import Dataset
from fastrlhf.data.pretrain import PretrainWindows
from fastrlhf.errors import UserError

logger = logging.getLogger(__name__)


class Mixture:
    """A data set of all demonstrations, then pretraining rows that make up `fraction` of the total.

    The Loader's shuffle mixes them. The rows are windows drawn with `seed`, without repetition if
    there are enough. A row is the window's first L tokens with every label counting, so it is no
    longer than `sequence_length`. Raises UserError if `fraction` is outside [0, 1).
    """

    def __init__(
        self,
        demonstrations: Dataset[TokenizedDemonstration],
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
        self.fraction = fraction
        self.rows = round(len(demonstrations) * fraction / (1.0 - fraction))
        if self.rows > len(windows):
            logger.warning(
                "%d pretraining rows are drawn from only %d windows, so some repeat",
                self.rows,
                len(windows),
            )
        self._order = windows.order(seed, epoch=0)

    def __len__(self) -> int:
        """Return the number of demonstrations and pretraining rows."""
        return len(self.demonstrations) + self.rows

    def __getitem__(self, index: int) -> TokenizedDemonstration:
        """Return demonstration `index`, or after them a pretraining row with prompt length 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index < len(self.demonstrations):
            return self.demonstrations[index]
        row = (index - len(self.demonstrations)) % len(self.windows)
        tokens = self.windows[int(self._order[row])][:-1]
        return TokenizedDemonstration(tokens, 0, is_pretraining=True)

    def loss_weight(self) -> float:
        """Return the weight of a pretraining token that makes `fraction` its share of the loss.

        With D counted labels of demonstrations and P of pretraining rows, w P / (w P + D) is the
        fraction f for w = f / (1 - f) * D / P. Returns 1 without pretraining rows.
        """
        trained = sum(self.demonstrations[i].num_labels for i in range(len(self.demonstrations)))
        mixed = self.rows * (self.windows.sequence_length - 1)
        if not mixed:
            return 1.0
        return self.fraction / (1.0 - self.fraction) * trained / mixed
