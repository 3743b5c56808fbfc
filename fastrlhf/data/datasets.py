"""Load record files as token lists in memory, with the paper's length limits.

"Prompts over 1k tokens dropped, responses at most 1k" (arXiv 2203.02155, appendix C): a record with
a longer prompt is dropped. A longer response is cut and then has no eos, since it did not end
there. The loaders count both. All records are held in memory: InstructGPT's largest set, 33k
prompts with up to 9 responses, is under a gigabyte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fastrlhf.data.batches import TokenizedDemonstration, TokenizedRanking
from fastrlhf.data.records import (
    Counts,
    Demonstration,
    OnError,
    Paths,
    Prompt,
    Ranking,
    as_paths,
    read_records,
)
from fastrlhf.data.tokenize import encode_conversations, encode_prompts, encode_responses
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_CHUNK = 1024  # records encoded in one call: the tokenizer is parallel inside a call


def load_demonstrations(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    on_error: OnError = "strict",
    rejected: Path | None = None,
    loss_on: Literal["last", "all"] = "last",
) -> tuple[list[TokenizedDemonstration], Counts]:
    """Load demonstrations as prompt + response + eos, in file order.

    `loss_on` "all" also trains on the assistant's turns in the prompt. Raises UserError if no
    record is usable.
    """
    counts, loaded, shared = Counts(), [], _SharedInts()
    records: Iterator[Demonstration] = read_records(
        paths, "demonstrations", on_error, rejected, counts
    )
    for chunk in _chunks(records):
        responses = encode_responses(tokenizer, [record.response for record in chunk])
        prompts = encode_conversations(
            tokenizer, [record.prompt for record in chunk], loss_on == "all"
        )
        for (prompt, spans), response in zip(prompts, responses, strict=True):
            if _fits(prompt, max_prompt_tokens, counts):
                tokens = shared(prompt + _cut(response, max_response_tokens, counts))
                loaded.append(TokenizedDemonstration(tokens, len(prompt), tuple(spans)))
    return _finish(loaded, counts, paths, max_prompt_tokens), counts


def load_rankings(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    on_error: OnError = "strict",
    rejected: Path | None = None,
) -> tuple[list[TokenizedRanking], Counts]:
    """Load rankings, in file order; every response that was not cut ends in eos.

    Raises UserError if no record is usable.
    """
    counts, loaded, shared = Counts(), [], _SharedInts()
    records: Iterator[Ranking] = read_records(paths, "rankings", on_error, rejected, counts)
    for chunk in _chunks(records):
        prompts = encode_prompts(tokenizer, [record.prompt for record in chunk])
        responses = iter(
            encode_responses(tokenizer, [text for record in chunk for text in record.responses])
        )
        for record, prompt in zip(chunk, prompts, strict=True):
            ranked = list(islice(responses, len(record.responses)))
            if _fits(prompt, max_prompt_tokens, counts):
                cut = [shared(_cut(response, max_response_tokens, counts)) for response in ranked]
                ids = (record.user_id, record.labeler_id)
                loaded.append(TokenizedRanking(shared(prompt), cut, record.ranks, *ids))
    return _finish(loaded, counts, paths, max_prompt_tokens), counts


def check_ranking_sizes(
    rankings: Sequence[TokenizedRanking],
    cost: Callable[[TokenizedRanking], int],
    max_tokens: int | None,
) -> None:
    """Check that the longest ranking fits into one micro-batch, and log its size.

    All responses of a prompt stay in one micro-batch. `cost` returns a ranking's tokens
    (`batches.ranking_tokens`); `max_tokens` is the budget of a micro-batch, None for no limit.
    Raises UserError if the longest ranking is above the budget.
    """
    longest = max(rankings, key=cost)
    K, tokens = len(longest.responses), cost(longest)
    logger.info(
        "longest prompt with its responses: %d tokens (K = %d)%s",
        tokens,
        K,
        f" of {max_tokens}" * bool(max_tokens),
    )
    if max_tokens is not None and tokens > max_tokens:
        raise UserError(
            f"a prompt with its {K} responses has {tokens} tokens and cannot be split, but "
            f"train.max_tokens_per_micro_batch is {max_tokens}; raise it to {tokens} or more, "
            "or lower data.max_prompt_tokens or data.max_response_tokens"
        )


def load_prompts(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_prompt_tokens: int,
    on_error: OnError = "strict",
    rejected: Path | None = None,
    prefix: str = "",
) -> tuple[list[list[int]], Counts]:
    """Load prompts as token lists, in file order.

    `prefix` is prepended to each and counts towards its length. Raises UserError if no record is
    usable.
    """
    counts, loaded, shared = Counts(), [], _SharedInts()
    records: Iterator[Prompt] = read_records(paths, "prompts", on_error, rejected, counts)
    for chunk in _chunks(records):
        prompts = encode_prompts(tokenizer, [record.prompt for record in chunk], prefix)
        loaded += [shared(prompt) for prompt in prompts if _fits(prompt, max_prompt_tokens, counts)]
    return _finish(loaded, counts, paths, max_prompt_tokens), counts


class _SharedInts:
    """Rewrite token lists to share one int object per token id: 8 bytes per token instead of 36."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def __call__(self, tokens: list[int]) -> list[int]:
        known = self._known
        return [known.setdefault(token, token) for token in tokens]


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _fits(prompt: list[int], limit: int, counts: Counts) -> bool:
    fits = len(prompt) <= limit
    counts.long_prompts += not fits
    return fits


def _cut(response: list[int], limit: int, counts: Counts) -> list[int]:
    counts.cut_responses += len(response) > limit
    return response[:limit]


def _finish(loaded: list[Item], counts: Counts, paths: Paths, max_prompt_tokens: int) -> list[Item]:
    counts.kept = len(loaded)
    names = ", ".join(str(path) for path in as_paths(paths))
    if not loaded:
        limit = f"the prompt limit is {max_prompt_tokens} tokens"
        raise UserError(
            f"{names}: no usable record ({counts}; {limit}); "
            "check the data and data.max_prompt_tokens"
        )
    logger.info("%s: %s", names, counts)
    return loaded
