"""Detection of training that has diverged: losses, gradients and weights that are not finite.

Every trainer and every command that reads weights uses these checks. Out of scope: warnings, which
do not stop a run (training/health.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from fastrlhf.checkpoint.shards import SavedStage
from fastrlhf.errors import UserError


class DivergedError(UserError):
    """Training has diverged; the loop adds which checkpoint precedes the damage."""


def is_loss(name: str) -> bool:
    """Return whether the metric `name` is a loss of training: "loss" or "..._loss"."""
    return (name == "loss" or name.endswith("_loss")) and not name.startswith(("valid", "eval"))


def check_losses_finite(
    where: str, metrics: Mapping[str, float], after: str = "stopped before this update"
) -> None:
    """Raise DivergedError if a loss in `metrics` is NaN or infinite.

    `where` names the step; `after` says what the run did.
    """
    for name, value in metrics.items():
        if is_loss(name) and not math.isfinite(value):
            raise DivergedError(f"{where}: {name} is {value}; {after}")


def nonfinite_models(models: Mapping[str, SavedStage], device: torch.device) -> list[str]:
    """Return the names of the models that have a weight which is NaN or infinite.

    A collective: every rank passes its stages of the same models and gets the same answer. It reads
    each weight once and allocates no copy.
    """
    flags = torch.zeros(len(models), dtype=torch.int32, device=device)
    for number, stage in enumerate(models.values()):
        ends = [
            torch.stack(torch.aminmax(parameter.detach())).float()
            for _, parameter, _ in stage.parameter_boxes()
            if parameter.numel()
        ]
        if ends:  # minimum and maximum propagate NaN
            flags[number] = (~torch.cat(ends).isfinite().all()).int().to(device)
    if len(models):
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [name for name, flag in zip(models, flags.tolist(), strict=True) if flag]


def check_weights_finite(
    where: str, models: Mapping[str, SavedStage], device: torch.device
) -> None:
    """Raise DivergedError on every rank if a weight of `models` is NaN or infinite; a collective.

    `where` names the step.
    """
    if broken := nonfinite_models(models, device):
        raise DivergedError(
            f"{where}: the weights of {', '.join(broken)} are not finite, so they are not saved"
        )


def check_policy_finite(name: str, model: SavedStage) -> None:
    """Raise UserError if a weight of a loaded model is NaN or infinite; a collective.

    `name` is the model's folder or role.
    """
    device = next(parameter.device for _, parameter, _ in model.parameter_boxes())
    if nonfinite_models({name: model}, device):
        raise UserError(
            f"{name}: its weights are not finite: the training that wrote them diverged; take an"
            " earlier checkpoint, or train again with a lower optimizer.lr"
        )
