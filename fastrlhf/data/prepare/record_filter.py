"""Per-record filtering for `data prepare`: length limits, personal data, and hashes.

prepare.py uses the hashes later for deduplication, user caps and splits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from fastrlhf.data.prepare.pii import find_pii, redact
from fastrlhf.data.prepare.rules import SPLITS, Rules
from fastrlhf.data.prepare.work_files import WorkFiles
from fastrlhf.data.records import (
    Counts,
    Demonstration,
    Prompt,
    PromptLike,
    Ranking,
    RecordLocation,
    to_json,
)
from fastrlhf.data.tokenize import encode_plain, encode_prompts, load_tokenizer, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = Prompt | Demonstration | Ranking


@dataclass
class PrepareStats:
    """Counts of the records read; `personal_data` counts findings, possibly several per record."""

    counts: Counts
    drop_counts: Counter[str]
    personal_data: Counter[str]
    read_by_source: Counter[str]

    @property
    def dropped(self) -> dict[str, int]:
        """Numbers of records dropped so far, by reason."""
        reasons = ("too_short", "too_long", "personal_data")
        return {"malformed": self.counts.rejected} | {
            reason: self.drop_counts[reason] for reason in reasons
        }

    def state(self, last: RecordLocation) -> dict[str, Any]:
        """Return the counts as JSON values, where `last` is the last record counted."""
        counts = (self.counts.read, self.counts.rejected)
        return {
            "after": [last.file, last.line],
            "counts": counts,
            "lost": self.drop_counts,
            "personal_data": self.personal_data,
            "read_by": self.read_by_source,
        }

    @classmethod
    def resume(cls, state: dict[str, Any] | None) -> tuple[PrepareStats, tuple[int, int]]:
        """Return the counts of a `state` and the (file number, line) of the last record counted."""
        if state is None:
            return cls(Counts(), Counter(), Counter(), Counter()), (0, 0)
        read, rejected = state["counts"]
        counters = [Counter(state[name]) for name in ("lost", "personal_data", "read_by")]
        file, line = state["after"]
        return cls(Counts(read=read, rejected=rejected), *counters), (file, line)


class RecordFilter:
    """Filters records one by one and adds those that pass to the work files."""

    def __init__(
        self, rules: Rules, sources: list[str], stats: PrepareStats, work_files: WorkFiles
    ) -> None:
        self.rules, self.stats, self.work_files = rules, stats, work_files
        self.sources = {name: number for number, name in enumerate(sources)}
        self.tokenizer = load_tokenizer(rules.tokenizer) if rules.tokenizer else None

    def process(self, chunk: list[tuple[RecordLocation, str, Record]]) -> None:
        """Filter a list of (location, source, record)."""
        passed = []
        for location, source, record in chunk:
            self.stats.read_by_source[source] += 1
            length = len(prompt_text(record.prompt))
            if not self.rules.min_chars <= length <= self.rules.max_chars:
                self.stats.drop_counts[
                    "too_short" if length < self.rules.min_chars else "too_long"
                ] += 1
                continue
            order = _hash(self.rules.seed, b"order", to_json(record).encode())
            user = _hash(self.rules.seed, b"user", _owner(record).encode())
            clean = self._without_pii(record, user, location)
            if clean is not None:
                passed.append((source, clean, user, order))
        records = [record for _, record, _, _ in passed]
        keys = [_dedup_text(record.prompt) for record in records]
        lengths = self._lengths(records)
        for (source, record, user, order), key, (prompt, response) in zip(
            passed, self._prefixes(keys), lengths, strict=True
        ):
            if self.rules.max_prompt_tokens is not None and prompt > self.rules.max_prompt_tokens:
                self.stats.drop_counts["too_long"] += 1
                continue
            responses, pairs = _sizes(record)
            self.work_files.add(
                to_json(record).encode() + b"\n",
                prompt=_hash(self.rules.seed, b"prompt", key),
                user=user,
                order=order,
                source=self.sources[source],
                responses=responses,
                pairs=pairs,
                prompt_length=prompt,
                response_length=response,
            )

    def _without_pii(self, record: Record, user: int, location: RecordLocation) -> Record | None:
        """Return the record without personal data, None if it is dropped."""
        split = SPLITS[split_of(user, self.rules)]
        if self.rules.pii == "keep" or split not in self.rules.pii_splits:
            return record
        kinds = find_pii("\n".join(_texts(record)))
        if not kinds:
            return record
        self.stats.personal_data.update(kinds)
        redacting = self.rules.pii == "redact"
        for kind in kinds:
            action = "redacted" if redacting else "dropped"
            self.work_files.report_pii(
                {"kind": kind, "source": str(location), "split": split, "action": action}
            )
        if redacting:
            return _redacted(record, user)
        self.stats.drop_counts["personal_data"] += 1
        return None

    def _prefixes(self, keys: list[str]) -> Iterator[bytes]:
        """Return the part of each prompt that duplicates share."""
        if self.rules.prefix_unit == "characters":
            return (key[: self.rules.prefix].encode() for key in keys)
        assert self.tokenizer is not None
        tokens = encode_plain(self.tokenizer, keys) if keys else []
        return (np.asarray(ids[: self.rules.prefix], dtype="<i4").tobytes() for ids in tokens)

    def _lengths(self, records: list[Record]) -> list[tuple[int, int]]:
        """Return (prompt length, mean response length) of each record.

        Lengths are in tokens with a tokenizer, else in characters.
        """
        responses = [_responses(record) for record in records]
        if self.tokenizer is None or not records:
            prompts = [len(prompt_text(record.prompt)) for record in records]
            totals = [sum(map(len, texts)) for texts in responses]
        else:
            token_ids = encode_prompts(self.tokenizer, [record.prompt for record in records])
            prompts = [len(ids) for ids in token_ids]
            totals = self._response_tokens(self.tokenizer, responses)
        return [
            (length, round(total / max(len(texts), 1)))
            for length, total, texts in zip(prompts, totals, responses, strict=True)
        ]

    def _response_tokens(
        self, tokenizer: PreTrainedTokenizerFast, responses: list[tuple[str, ...]]
    ) -> list[int]:
        """Return the total number of tokens of each record's responses."""
        flat = [text for texts in responses for text in texts]
        lengths = iter([len(ids) for ids in encode_plain(tokenizer, flat)] if flat else [])
        return [sum(islice(lengths, len(texts))) for texts in responses]


def _owner(record: Record) -> str:
    """Return the user, or the prompt of a record without one.

    So records with the same prompt and no user are in the same split of all kinds.
    """
    if record.user_id is None:
        return f"prompt {_dedup_text(record.prompt)}"
    return f"user {record.user_id}"


def _texts(record: Record) -> list[str]:
    """Return every text that may contain personal data; an id may be an e-mail or IP address."""
    labeler = record.labeler_id if isinstance(record, Ranking) else None
    return [prompt_text(record.prompt), *_responses(record), record.user_id or "", labeler or ""]


def _responses(record: Record) -> tuple[str, ...]:
    if isinstance(record, Demonstration):
        return (record.response,)
    return record.responses if isinstance(record, Ranking) else ()


def _redacted(record: Record, user: int) -> Record:
    """Return the record with its findings replaced.

    An id with a finding becomes a number that is the same for all records of its user.
    """
    prompt = record.prompt
    changed: dict[str, Any] = {}
    if isinstance(prompt, str):
        changed["prompt"] = redact(prompt)[0]
    else:
        changed["prompt"] = [{**turn, "content": redact(turn["content"])[0]} for turn in prompt]
    if isinstance(record, Demonstration):
        changed["response"] = redact(record.response)[0]
    elif isinstance(record, Ranking):
        changed["responses"] = tuple(redact(text)[0] for text in record.responses)
        if record.labeler_id is not None and find_pii(record.labeler_id):
            labeler = _hash(user, b"labeler", record.labeler_id.encode())
            changed["labeler_id"] = f"labeler-{labeler:016x}"
    if record.user_id is not None and find_pii(record.user_id):
        changed["user_id"] = f"user-{user:016x}"
    return replace(record, **changed)


def _sizes(record: Record) -> tuple[int, int]:
    """Return the numbers of responses and of pairs that are not ties."""
    K = len(_responses(record))
    if not isinstance(record, Ranking):
        return K, 0
    ties = sum(n * (n - 1) // 2 for n in Counter(record.ranks).values())
    return K, K * (K - 1) // 2 - ties


def _dedup_text(prompt: PromptLike) -> str:
    """Return the prompt with case and spacing normalized, for the comparison of prompts.

    System turns are ignored, since all prompts of a product may share one.
    """
    if not isinstance(prompt, str):
        prompt = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return " ".join(prompt_text(prompt).casefold().split())


def _hash(seed: int, purpose: bytes, content: bytes) -> int:
    # `person` makes the hashes of a record independent: the split must not depend on the order.
    key = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(
        hashlib.blake2b(content, digest_size=8, key=key, person=purpose).digest(), "little"
    )


@overload
def split_of(user: int, rules: Rules) -> int: ...


@overload
def split_of(user: np.ndarray, rules: Rules) -> np.ndarray: ...


def split_of(user: int | np.ndarray, rules: Rules) -> int | np.ndarray:
    """Return the index in SPLITS of a user's hash, or of each hash in an array.

    The hash as a number in [0, 1) is compared with the fractions.
    """
    position = user / 2.0**64
    held_out = position < rules.test_fraction + rules.valid_fraction
    return 1 * held_out + 1 * (position < rules.test_fraction)
