"""Load record files as token lists in memory, with the paper's length limits.

"Prompts over 1k tokens dropped, responses at most 1k" (arXiv 2203.02155, appendix C): a record with
a longer prompt is dropped. A longer response is cut and then has no end marker, since it did not
end there. The loaders count both. Records travel with their location until they are tokens, so an
error in tokenizing names file and line and obeys `on_error`, as one in parsing does. All records
are held in memory: InstructGPT's largest set, 33k prompts with up to 9 responses, is under a
gigabyte.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastrlhf.data.batches import TokenizedDemonstration, TokenizedRanking
from fastrlhf.data.loader import Dataset
from fastrlhf.data.records import (
    Counts,
    Kind,
    OnError,
    Paths,
    Prompt,
    PromptLike,
    Ranking,
    RecordLocation,
    as_paths,
    located_records,
    response_texts,
)
from fastrlhf.data.rejections import Rejections, open_rejections
from fastrlhf.data.tokenize import (
    EncodeError,
    encode_responses,
    try_each,
    try_encode_prompts,
    without_end_marker,
)
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
    """Load demonstrations as prompt + response + end marker, in file order.

    `loss_on` "all" also trains on the assistant's turns in the prompt. Raises UserError if no
    record is usable.
    """
    counts, loaded, shared = Counts(), [], _SharedInts()
    for encoded in _encoded_records(
        paths, "demonstrations", tokenizer, counts, on_error, rejected, with_spans=loss_on == "all"
    ):
        if _fits(encoded.prompt, max_prompt_tokens, counts):
            _count_markers(tokenizer, encoded.texts, counts)
            response = _cut(encoded.responses[0], max_response_tokens, counts)
            tokens = shared(encoded.prompt + response)
            loaded.append(TokenizedDemonstration(tokens, len(encoded.prompt), tuple(encoded.spans)))
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
    """Load rankings, in file order; every response that was not cut has its end marker.

    Responses with the same tokens are ties, whatever their ranks (see `tied_ranks`), and a ranking
    without two different ones is dropped. Raises UserError if no record is usable.
    """
    counts, loaded, shared = Counts(), [], _SharedInts()
    for encoded in _encoded_records(paths, "rankings", tokenizer, counts, on_error, rejected):
        if not _fits(encoded.prompt, max_prompt_tokens, counts):
            continue
        record: Ranking = encoded.record
        responses = [shared(response[:max_response_tokens]) for response in encoded.responses]
        ranks = tied_ranks(record.ranks, responses)
        counts.tied_pairs += _strict_pairs(record.ranks) - _strict_pairs(ranks)
        if len(set(ranks)) == 1:
            counts.unranked += 1
            continue
        for response in encoded.responses:
            _cut(response, max_response_tokens, counts)
        _count_markers(tokenizer, encoded.texts, counts)
        ids = (record.user_id, record.labeler_id)
        loaded.append(TokenizedRanking(shared(encoded.prompt), responses, ranks, *ids))
    return _finish(loaded, counts, paths, max_prompt_tokens), counts


def tied_ranks(
    ranks: Sequence[int | float], responses: Sequence[Sequence[int]]
) -> tuple[int | float, ...]:
    """Return `ranks` with equal responses (the same tokens) tied.

    Equal responses of different ranks contradict each other, and every response ranked between
    them: it is both worse and better than the same text. All of these become one tie, at the best
    of their ranks. No pair is reversed, and all other pairs stay as they are.
    """
    same: dict[tuple[int, ...], list[int | float]] = {}
    for rank, response in zip(ranks, responses, strict=True):
        same.setdefault(tuple(response), []).append(rank)
    spans = sorted((min(group), max(group)) for group in same.values() if len(group) > 1)
    merged: list[tuple[int | float, int | float]] = []
    for best, worst in spans:
        if merged and best <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(worst, merged[-1][1]))
        else:
            merged.append((best, worst))
    return tuple(
        next((best for best, worst in merged if best <= rank <= worst), rank) for rank in ranks
    )


def _strict_pairs(ranks: Sequence[int | float]) -> int:
    return sum(first != second for first, second in combinations(ranks, 2))


def check_ranking_sizes(
    rankings: Dataset[TokenizedRanking],
    cost: Callable[[TokenizedRanking], int],
    max_tokens: int | None,
) -> None:
    """Check that the longest ranking fits into one micro-batch, and log its size.

    All responses of a prompt stay in one micro-batch. `cost` returns a ranking's tokens
    (`batches.ranking_tokens`); `max_tokens` is the budget of a micro-batch, None for no limit.
    Raises UserError if the longest ranking is above the budget.
    """
    longest = max((rankings[i] for i in range(len(rankings))), key=cost)
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
    _, tokens, counts = load_prompt_records(
        paths,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        on_error=on_error,
        rejected=rejected,
        prefix=prefix,
    )
    return tokens, counts


def load_prompt_records(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_prompt_tokens: int,
    on_error: OnError = "strict",
    rejected: Path | None = None,
    prefix: str = "",
) -> tuple[list[Prompt], list[list[int]], Counts]:
    """Load prompts as records and as token lists; see `load_prompts`."""
    counts, records, tokens, shared = Counts(), [], [], _SharedInts()
    for encoded in _encoded_records(
        paths, "prompts", tokenizer, counts, on_error, rejected, prefix=prefix
    ):
        if _fits(encoded.prompt, max_prompt_tokens, counts):
            records.append(encoded.record)
            tokens.append(shared(encoded.prompt))
    return _finish(records, counts, paths, max_prompt_tokens), tokens, counts


@dataclass(frozen=True)
class _Encoded:
    """A record and its token ids: those of its prompt with its spans, and of its responses."""

    record: Any
    texts: tuple[str, ...]
    prompt: list[int]
    spans: list[tuple[int, int]]
    responses: list[list[int]]


def _encoded_records(
    paths: Paths,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast,
    counts: Counts,
    on_error: OnError,
    rejected: Path | None,
    *,
    prefix: str = "",
    with_spans: bool = False,
) -> Iterator[_Encoded]:
    """Yield the records of `paths` that can be parsed and encoded; reject the others."""
    with open_rejections(on_error, rejected, counts) as rejections:
        for chunk in _chunks(located_records(paths, kind, rejections)):
            yield from _encode_chunk(chunk, tokenizer, rejections, prefix, with_spans)


def _encode_chunk(
    chunk: list[tuple[RecordLocation, Any]],
    tokenizer: PreTrainedTokenizerFast,
    rejections: Rejections,
    prefix: str,
    with_spans: bool,
) -> Iterator[_Encoded]:
    """Yield the records of `chunk` that can be encoded; reject the others at their location."""

    def encode(items: Sequence[tuple[PromptLike, str]]) -> list[list[int]]:
        return encode_responses(tokenizer, [text for _, text in items], [p for p, _ in items])

    prompts = try_encode_prompts(
        tokenizer, [record.prompt for _, record in chunk], prefix=prefix, with_spans=with_spans
    )
    pairs = [(record.prompt, text) for _, record in chunk for text in response_texts(record)]
    tokens: list[list[int] | EncodeError] = try_each(encode, pairs) if pairs else []
    responses = iter(tokens)
    for (location, record), prompt in zip(chunk, prompts, strict=True):
        texts = response_texts(record)
        found = list(islice(responses, len(texts)))
        errors = [item for item in (prompt, *found) if isinstance(item, EncodeError)]
        if errors or isinstance(prompt, EncodeError):
            rejections.reject(location, str(errors[0]))
            continue
        good = [ids for ids in found if not isinstance(ids, EncodeError)]
        yield _Encoded(record, texts, *prompt, good)


def _count_markers(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], counts: Counts
) -> None:
    counts.end_markers += sum(without_end_marker(tokenizer, text) != text for text in texts)


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
