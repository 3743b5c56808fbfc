"""The reward r(x, y) of a response: a weighted sum of reward models, a Python function, or both.

A model reads prompt and response; its score is taken at the last token that is not padding
(InstructGPT, section 3.5). Not supported: rewards of single tokens. Out of scope: the KL penalty,
which PPO adds per token.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastrlhf.algorithms.rm import score_responses
from fastrlhf.algorithms.rollouts import Rollouts, decode_texts
from fastrlhf.data.batches import PackedBatch
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tensor = torch.Tensor
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""function(prompts, responses) -> one score for each response."""
OnDevice = Callable[[GPT], AbstractContextManager[object]]
"""`with on_device(model):` holds a model on the device for a block (offload.py)."""


@dataclass
class Rewards:
    """The reward models and the reward function that score episodes."""

    models: Sequence[tuple[float, GPT]] = ()
    """(weight, model with a scalar head)."""
    function: RewardFunction | None = None
    name: str = "the reward function"
    """Name of the function in errors."""
    on_device: OnDevice = field(default=nullcontext)

    def score(
        self,
        mesh: Mesh,
        rollouts: Rollouts,
        rows: Tensor,
        batches: Sequence[PackedBatch],
        tokenizer: PreTrainedTokenizerFast,
    ) -> Tensor:
        """Score the episodes `rows`, which `batches` hold packed in the same order.

        Returns fp32 [len(rows)], the same on every rank of a model-parallel group. Raises UserError
        if a score is not a finite number.
        """
        total = torch.zeros(rows.numel(), device=mesh.device)
        for weight, model in self.models:
            with self.on_device(model):
                scored = score_responses(mesh, model, [batches])
            if not scored.isfinite().all():
                raise UserError(
                    f"a reward model scored {scored[~scored.isfinite()][0].item()}; check the checkpoint in "
                    "ppo.reward_model (fastrlhf rm reports its loss), or use model.dtype=bf16 where fp16 overflows"
                )
            total += weight * scored
        if self.function is not None:
            total += self._function_scores(self.function, mesh, rollouts, rows, tokenizer)
        return total

    def _function_scores(
        self,
        function: RewardFunction,
        mesh: Mesh,
        rollouts: Rollouts,
        rows: Tensor,
        tokenizer: PreTrainedTokenizerFast,
    ) -> Tensor:
        """Score the episodes `rows` with the reward function, fp32 [len(rows)].

        The function is called once in a model-parallel group, so that its ranks have the same
        scores even if it is not deterministic.
        """
        scores = torch.zeros(rows.numel(), device=mesh.device)
        if mesh.is_last_stage and mesh.tensor_rank == 0:
            prompts, responses = decode_texts(rollouts, rows, tokenizer)
            checked = checked_scores(function(prompts, responses), responses, self.name)
            scores = torch.tensor(checked, device=mesh.device)
        if mesh.is_last_stage and mesh.tensor_size > 1:
            dist.broadcast(
                scores, src=dist.get_global_rank(mesh.tensor_group, 0), group=mesh.tensor_group
            )
        return mesh.from_last_stage(scores if mesh.is_last_stage else None)


def checked_scores(scores: Iterable[object], responses: Sequence[str], name: str) -> list[float]:
    """Return the scores of the function `name` as floats.

    Raises UserError unless there is one finite number for each response.
    """
    got = list(scores)
    if len(got) != len(responses):
        raise UserError(
            f"{name} returned {len(got)} scores for {len(responses)} responses; expected one each"
        )
    checked = []
    for score, response in zip(got, responses, strict=True):
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise UserError(
                f"{name} scored {score!r} for the response {response[:60]!r}; expected a finite float"
            )
        checked.append(float(score))
    return checked


def load_reward_function(spec: str, key: str = "ppo.reward_function") -> RewardFunction:
    """Import the function that `spec`, "module:function", names.

    The module may be in the working directory. Raises UserError with the setting `key` if there is
    no such module or function.
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
            f"{key} {spec}: no module {error.name}; run in the folder of "
            f"{module_name.replace('.', '/')}.py, or add that folder to PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{key} {spec}: {module.__file__} defines no function {name}; expected "
            f"def {name}(prompts: list[str], responses: list[str]) -> list[float]"
        )
    return function
