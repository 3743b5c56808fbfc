"""The reward r(x, y) of a whole response: a weighted sum of reward models, a Python function, or both.

A model reads prompt and response; its score is taken at the last real token (InstructGPT, section 3.5). Left out on
purpose: rewards of single tokens, and the KL penalty, which PPO adds per token.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fastrlhf.algorithms.rm import score_responses
from fastrlhf.algorithms.rollouts import Rollouts, texts
from fastrlhf.data.batches import PackedBatch
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""f(prompts, responses) -> one score for each response."""


@dataclass
class Rewards:
    """What scores the episodes."""

    models: Sequence[tuple[float, Any]] = ()
    """(weight, stage with a scalar head)."""
    function: RewardFunction | None = None
    name: str = "the reward function"
    """What to call the function in errors."""
    on_device: Callable[[Any], AbstractContextManager[None]] = field(default=nullcontext)
    """Holds a model on the device while it is used (offload.py)."""

    def score(
        self,
        mesh: Mesh,
        rollouts: Rollouts,
        rows: Tensor,
        batches: Sequence[PackedBatch],
        tokenizer: Any,
    ) -> Tensor:
        """Scores of the episodes `rows`, packed in that order in `batches`: fp32 [rows], the same on every rank of the
        model-parallel group. Raises `UserError` when a score is not a finite number.
        """
        total = torch.zeros(rows.numel(), device=mesh.device)
        for weight, stage in self.models:
            with self.on_device(stage):
                scored = score_responses(mesh, stage, [batches])
            if not scored.isfinite().all():
                raise UserError(
                    f"a reward model scored {scored[~scored.isfinite()][0].item()}; check the checkpoint in "
                    "ppo.reward_model (fastrlhf rm reports its loss), or use model.dtype=bf16 where fp16 overflows"
                )
            total += weight * scored
        if self.function is not None:
            total += self._by_function(mesh, rollouts, rows, tokenizer)
        return total

    def _by_function(self, mesh: Mesh, rollouts: Rollouts, rows: Tensor, tokenizer: Any) -> Tensor:
        """Called once in a model-parallel group, so that a function that is not deterministic gives its ranks one
        answer.
        """
        assert self.function is not None
        scores = torch.zeros(rows.numel(), device=mesh.device)
        if mesh.is_last_stage and mesh.tensor_rank == 0:
            prompts, responses = texts(rollouts, rows, tokenizer)
            checked = checked_scores(self.function(prompts, responses), responses, self.name)
            scores = torch.tensor(checked, device=mesh.device)
        if mesh.is_last_stage and mesh.tensor_size > 1:
            dist.broadcast(
                scores, src=dist.get_global_rank(mesh.tensor_group, 0), group=mesh.tensor_group
            )
        return mesh.from_last_stage(scores if mesh.is_last_stage else None)


def checked_scores(scores: Any, responses: Sequence[str], name: str) -> list[float]:
    """The scores that the function `name` gave. Raises `UserError` unless they are one finite number a response."""
    got = list(scores)
    if len(got) != len(responses):
        raise UserError(
            f"{name} returned {len(got)} scores for {len(responses)} responses; expected one each"
        )
    for score, response in zip(got, responses, strict=True):
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise UserError(
                f"{name} scored {score!r} for the response {response[:60]!r}; expected a finite float"
            )
    return [float(score) for score in got]


def load_reward_function(spec: str, key: str = "ppo.reward_function") -> RewardFunction:
    """The function that "module:function" names, as the setting `key` does; the module may lie in the working
    directory.

    Raises `UserError` when there is no such module or function.
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:  # the console script's path starts elsewhere
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import inside the user's module
        raise UserError(
            f"{key} {spec}: no module {error.name}; run where {module_name.replace('.', '/')}.py lies, "
            "or add its folder to PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{key} {spec}: {module.__file__} defines no function {name}; expected "
            f"def {name}(prompts: list[str], responses: list[str]) -> list[float]"
        )
    return function
