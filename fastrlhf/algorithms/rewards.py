"""The reward r(x, y) of a response: a weighted sum of reward models, a Python function, or both.

A model reads prompt and response; its score is taken at the last token that is not padding
(InstructGPT, section 3.5). Not supported: rewards of single tokens. Out of scope: the KL penalty,
which PPO adds per token.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastrlhf.algorithms.reward_function import (
    RewardFunction,
    call_reward_function,
    checked_scores,
    load_reward_function,
    takes_records,
)
from fastrlhf.algorithms.rm import score_responses
from fastrlhf.algorithms.rollouts import Records, Rollouts, decode_texts
from fastrlhf.data.batches import PackedBatch, TokenizedPrompt
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["RewardFunction", "Rewards", "checked_scores", "load_reward_function"]
Tensor = torch.Tensor
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
    timeout_s: float = 600.0
    """Longest call of the function, in seconds."""
    on_device: OnDevice = field(default=nullcontext)

    def records_of(self, prompts: Sequence[TokenizedPrompt]) -> Records | None:
        """Return the other columns of the prompts' records, if the function takes them."""
        if self.function is None or not takes_records(self.function):
            return None
        return [prompt.columns for prompt in prompts]

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
        if not total.isfinite().all():
            raise UserError(
                f"the weighted sum of the scores is {total[~total.isfinite()][0].item()}; lower"
                " ppo.reward_weights, or the scores"
            )
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
        scores even if it is not deterministic. If a call fails, all ranks raise its UserError.
        """
        scores = torch.zeros(rows.numel(), device=mesh.device)
        problem = ""
        if mesh.is_last_stage and mesh.tensor_rank == 0:
            prompts, responses = decode_texts(rollouts, rows, tokenizer)
            records = rollouts.records
            own = [records[row] for row in rows.tolist()] if records is not None else None
            try:
                checked = call_reward_function(
                    function, prompts, responses, self.name, self.timeout_s, records=own
                )
                scores = torch.tensor(checked, device=mesh.device)
            except UserError as error:
                problem = str(error)
        raise_on_any_rank(mesh, problem)
        if mesh.is_last_stage and mesh.tensor_size > 1:
            dist.broadcast(
                scores, src=dist.get_global_rank(mesh.tensor_group, 0), group=mesh.tensor_group
            )
        return mesh.from_last_stage(scores if mesh.is_last_stage else None)


def raise_on_any_rank(mesh: Mesh, problem: str) -> None:
    """Raise the UserError of the first rank that has a `problem`, on every rank; a collective."""
    problems = [problem]
    if mesh.world_size > 1:
        if problem:
            problem = f"rank {mesh.rank} on host {socket.gethostname()}: {problem}"
        problems = [""] * mesh.world_size
        dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise UserError(first)
