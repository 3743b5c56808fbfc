"""Whole responses of a policy to prompts, as text: what sampling, evaluation and the quickstart share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from fastrlhf.checkpoint.model_folder import SavedModel
from fastrlhf.config import Config
from fastrlhf.data.records import Prompt, read_records
from fastrlhf.data.tokenize import encode_prompts, read_prefix
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
    """One response to one prompt, as a reader sees it."""

    text: str
    """Without the stop token or string."""
    tokens: int
    """Its length, the stop token included."""
    stopped: bool
    """False: cut at the length limit."""


def respond(
    stage: GPT,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    mesh: Mesh,
    slots: int = 64,
    copies: int = 1,
) -> list[list[Response]]:
    """`copies` responses to each of the tokenized `prompts`, the same on every rank and under every layout.

    They depend on the weights, the prompts and `params` alone; two models asked with the same `params` draw the same
    noise.
    """
    mine = range(mesh.data_rank, len(prompts), mesh.data_size)
    draws = [(i, j) for i in mine for j in range(copies)]
    generated = generate_all(
        stage,
        [prompts[i] for i, _ in draws],
        params,
        mesh=mesh,
        eos=tokenizer.eos_token_id,
        slots=slots,
        tokenizer=tokenizer,
        ids=[i * copies + j for i, j in draws],
    )
    found: dict[int, list[Response]] = {i: [] for i in mine}
    for (i, _), response in zip(draws, generated, strict=True):
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
    """Merge the data-parallel ranks' dictionaries, whose keys are prompt numbers; the same on every rank."""
    parts: list[dict[int, Value]] = [{}] * mesh.data_size
    dist.all_gather_object(parts, mine, group=mesh.data_group)
    return {i: value for part in parts for i, value in part.items()}


def fitting_prompts(
    config: Config, tokenizer: PreTrainedTokenizerFast, mesh: Mesh
) -> tuple[list[Prompt], int]:
    """The prompts of `data.prompts` within `data.max_prompt_tokens`, and how many were not. Raises `UserError` if none
    is.
    """
    data = config.data
    assert data.prompts is not None  # config.require
    rejected = Path(config.output_dir) / "rejected.jsonl" if mesh.rank == 0 else None
    prompts = list(read_records(data.prompts, "prompts", data.on_error, rejected))
    prefix = read_prefix(data.prompt_prefix)
    lengths = map(len, encode_prompts(tokenizer, [prompt.prompt for prompt in prompts], prefix))
    fitting = [
        prompt
        for prompt, length in zip(prompts, lengths, strict=True)
        if length <= data.max_prompt_tokens
    ]
    if not fitting:
        raise UserError(
            f"{', '.join(data.prompts)}: none of the {len(prompts)} prompts is within data.max_prompt_tokens "
            f"{data.max_prompt_tokens}; raise it or shorten the prompts"
        )
    return fitting, len(prompts) - len(fitting)


def find_policy(path: str | None, command: str) -> SavedModel:
    """The language model saved at `path`, in our format or Hugging Face's. Raises `UserError` if there is none."""
    if path is None:
        raise UserError(
            f"{command} needs a trained model: set model.load to a run's folder or model.hf to a Hugging Face one"
        )
    saved = find_model(path)
    if saved.head != "lm":
        raise UserError(
            f"{path} is a reward or value model, not a policy; set model.load to a policy"
        )
    return saved
