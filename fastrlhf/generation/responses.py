"""Complete responses of a policy as text, for sampling, evaluation and the quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from fastrlhf.checkpoint.model_folder import SavedModel
from fastrlhf.checkpoint.soundness import check_policy_finite
from fastrlhf.config import Config
from fastrlhf.data.datasets import load_prompt_records
from fastrlhf.data.records import Prompt
from fastrlhf.data.tokenize import read_prefix, stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import Generated, generate_all
from fastrlhf.generation.sampling import SamplingParams
from fastrlhf.models.gpt import GPT
from fastrlhf.models.loading import find_model
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Response:
    """The text of one response, and how it ended."""

    text: str
    """Without the stop token or string."""
    tokens: int
    """Its length, including the stop token."""
    stopped: bool
    """False if the length limit cut it."""


def respond(
    model: GPT,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    mesh: Mesh,
    slots: int = 64,
    copies: int = 1,
    name: str = "the policy",
) -> list[list[Response]]:
    """Return `copies` responses to each of the tokenized `prompts`, the same on every rank.

    The responses depend on the weights, the prompts and `params` alone, not on the parallel
    layout. Two models with the same `params` use the same random numbers. Raises UserError with
    `name`, the name of the model, if a weight of it is not finite.
    """
    check_policy_finite(name, model)
    mine = range(mesh.data_rank, len(prompts), mesh.data_size)
    requests = [(i, j) for i in mine for j in range(copies)]
    generated = generate_all(
        model,
        [prompts[i] for i, _ in requests],
        params,
        mesh=mesh,
        eos=stop_token_ids(tokenizer),
        slots=slots,
        tokenizer=tokenizer,
        ids=[i * copies + j for i, j in requests],
    )
    found: dict[int, list[Response]] = {i: [] for i in mine}
    for (i, _), response in zip(requests, generated, strict=True):
        text = response_text(tokenizer, response, params.stop)
        found[i].append(Response(text, len(response.tokens), response.stopped))
    gathered = gather_by_prompt(mesh, found)
    return [gathered[i] for i in range(len(prompts))]


def response_text(
    tokenizer: PreTrainedTokenizerFast, response: Generated, stop: tuple[str, ...]
) -> str:
    """Return the text of a response without its stop token or string."""
    text = str(
        tokenizer.decode(
            response.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )
    ends = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(ends, default=None)]


Value = TypeVar("Value")


def gather_by_prompt(mesh: Mesh, mine: dict[int, Value]) -> dict[int, Value]:
    """Return the union of the data-parallel ranks' dictionaries, whose keys are prompt numbers."""
    parts: list[dict[int, Value]] = [{}] * mesh.data_size
    dist.all_gather_object(parts, mine, group=mesh.data_group)
    return {i: value for part in parts for i, value in part.items()}


def fitting_prompts(
    config: Config, tokenizer: PreTrainedTokenizerFast, mesh: Mesh
) -> tuple[list[Prompt], int]:
    """Return the prompts within `data.max_prompt_tokens`, and the number of longer ones.

    A prompt that cannot be read or tokenized obeys `data.on_error`. Raises UserError if no prompt
    is usable.
    """
    data = config.data
    assert data.prompts is not None  # config.require
    prompts, _, counts = load_prompt_records(
        data.prompts,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        on_error=data.on_error,
        rejected=Path(config.output_dir) / "rejected.jsonl" if mesh.rank == 0 else None,
        prefix=read_prefix(data.prompt_prefix),
    )
    return prompts, counts.long_prompts


def find_policy(path: str | None, command: str) -> SavedModel:
    """Return the language model saved at `path`, in our format or Hugging Face's.

    `command` names the command in error messages. Raises UserError if `path` is None or does not
    hold a language model.
    """
    if path is None:
        raise UserError(
            f"{command} needs a trained model: set model.load to a run's folder or model.hf to a "
            "Hugging Face folder"
        )
    saved = find_model(path)
    if saved.head != "lm":
        raise UserError(
            f"{path} is a reward or value model, not a policy; set model.load to a policy"
        )
    return saved
