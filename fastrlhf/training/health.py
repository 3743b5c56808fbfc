"""Health of a run, for every trainer: checks that stop it, warnings, and the way back.

Warnings are one line each, with a name, the observation and a remedy. They are derived from the
metrics of each step, so they cost nothing. Out of scope: warnings that only make sense for PPO
(algorithms/ppo_warnings.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping

from fastrlhf.checkpoint.checkpointer import Checkpointable, Checkpointer
from fastrlhf.checkpoint.names import step_of
from fastrlhf.checkpoint.soundness import DivergedError, check_losses_finite, check_weights_finite
from fastrlhf.errors import UserError

logger = logging.getLogger(__name__)
WINDOW = 20
"""Steps that a condition must hold before it is a warning, and between two equal warnings.

The default loss scale of fp16, 2^16, reaches 1 after 18 overflows.
"""
_JUMP = 10.0
"""A loss above this multiple of the largest sound one says that the weights before it are damaged.

Losses below 1 are never a sign of damage.
"""


class HealthMonitor:
    """Checks the metrics of each step, and knows which checkpoint precedes a divergence.

    The weights of step s are sound if the loss of step s + 1, which reads them, is finite and not
    far above all earlier ones.
    """

    def __init__(self, algorithm: Checkpointable, checkpointer: Checkpointer, done: int) -> None:
        self._algorithm = algorithm
        self._checkpointer = checkpointer
        self._is_main = checkpointer.mesh.rank == 0
        self._skipped = self._still = 0
        self._last_loss: float | None = None
        self._largest_loss: float | None = None
        self._sound_step = 0
        if done and self._is_main:
            for step, loss in checkpointer.saved_losses(done):
                self._observe(step, loss)

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check the metrics of a step and log its warnings.

        Raises DivergedError if a loss is not finite, unless fp16 has skipped its update.
        """
        skipped = any(metrics[name] > 0 for name in metrics if name.endswith("skipped"))
        if not skipped:
            check_losses_finite(f"step {step}", metrics, "stopped after this update")
        for line in self._warnings(step, metrics):
            if self._is_main:
                logger.warning("warning: %s", line)
        self._observe(step, metrics.get("loss"))

    def check_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn if a metric of a validation is not finite."""
        for name, value in metrics.items():
            if self._is_main and not math.isfinite(value):
                logger.warning(
                    "warning: validation-not-finite: step %d: %s is %s; look for held-out records"
                    " that are far from the training data",
                    *(step, name, value),
                )

    def check_weights(self, step: int) -> None:
        """Raise DivergedError if a weight is not finite after `step`; a collective."""
        device = self._checkpointer.mesh.device
        check_weights_finite(f"step {step}", self._algorithm.models(), device)

    def check_applied(self) -> None:
        """Raise UserError if a model has never been updated, at the end of a run."""
        for name, learner in self._algorithm.learners().items():
            if learner.state_dict()["updates"] == 0:
                raise UserError(
                    f"no update of {name} was applied: fp16 gradients overflowed in every step, so the"
                    " model is as it was at the start; use model.dtype=bf16, a smaller model.init_std,"
                    " or a lower optimizer.lr"
                )

    @contextlib.contextmanager
    def advice(self) -> Iterator[None]:
        """Add to a DivergedError of the block which checkpoint to continue from."""
        try:
            yield
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._way_back()}") from None

    def _warnings(self, step: int, metrics: Mapping[str, float]) -> Iterator[str]:
        """Yield the warnings of a step and count the steps of each condition."""
        self._skipped = self._skipped + 1 if metrics.get("skipped", 0.0) >= 1.0 else 0
        if self._skipped and self._skipped % WINDOW == 0:
            yield (
                f"skipped-updates: step {step}: fp16 gradients overflowed in the last {self._skipped}"
                " steps, so nothing was learned; use model.dtype=bf16, a smaller model.init_std, or a"
                " lower optimizer.lr"
            )
        loss = metrics.get("loss")
        same = loss is not None and loss == self._last_loss
        still = not self._skipped and (same or metrics.get("grad_norm") == 0.0)
        self._still = self._still + 1 if still else 0
        self._last_loss = loss
        if self._still and self._still % WINDOW == 0:
            yield (
                f"dead-loss: step {step}: for {self._still} steps the loss ({loss:.4g}) has not changed"
                " or the gradient was 0, so nothing is learned; check the data, optimizer.lr and"
                " model.load"
                if loss is not None
                else f"dead-loss: step {step}: the gradient was 0 for {self._still} steps"
            )

    def _observe(self, step: int, loss: float | None) -> None:
        """Record that the weights after step - 1 have given `loss`."""
        if loss is None or not math.isfinite(loss):
            return
        largest = self._largest_loss
        if largest is None or abs(loss) <= _JUMP * max(largest, 1.0):
            self._largest_loss = max(largest or 0.0, abs(loss))
            self._sound_step = max(self._sound_step, step - 1)

    def _way_back(self) -> str:
        """Return what the user can continue from; rank 0 makes it the latest checkpoint."""
        lower = "with a lower optimizer.lr"
        if not self._is_main:
            return f"start again {lower}"
        checkpoints = self._checkpointer.checkpoints()
        if not checkpoints:
            return f"there is no checkpoint yet: start again {lower}"
        sound = [path for path in checkpoints if step_of(path) <= self._sound_step]
        if not sound:
            return (
                f"no checkpoint in {self._checkpointer.folder} precedes the damage: start again with"
                f" checkpoint.resume=never and {lower.removeprefix('with ')}"
            )
        newest = sound[-1]
        if newest == checkpoints[-1]:
            return f"{newest.name} precedes the damage: give the same command {lower} to continue from it"
        try:
            self._checkpointer.point_to(newest)
        except OSError:
            return f"{newest.name} precedes the damage: start from it (model.load) {lower}"
        return (
            f"{newest.name} precedes the damage and is the latest checkpoint now: give the same command"
            f" {lower} to continue from it"
        )
