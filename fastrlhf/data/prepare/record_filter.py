"""Per-record filtering for `data prepare`: length limits, personal data, and hashes.

prepare.py uses the hashes later for deduplication, user caps and splits.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, overload

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
    response_texts,
    to_json,
)
from fastrlhf.data.rejections import Rejections
from fastrlhf.data.tokenize import (
    EncodeError,
    encode_plain,
    load_tokenizer,
    prompt_text,
    try_each,
    try_encode_prompts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Record = Prompt | Demonstration | Ranking
Measured: TypeAlias = tuple[bytes, int, int]
"""Deduplication key, prompt length, mean response length."""


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
        self,
        rules: Rules,
        sources: list[str],
        stats: PrepareStats,
        work_files: WorkFiles,
        rejections: Rejections,
    ) -> None:
        self.rules, self.stats, self.work_files = rules, stats, work_files
        self.rejections = rejections
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
                passed.append((location, source, clean, user, order))
        measured = self._measure_each([record for _, _, record, _, _ in passed])
        for (location, source, record, user, order), found in zip(passed, measured, strict=True):
            if isinstance(found, EncodeError):
                self.rejections.reject(location, str(found))
                continue
            key, prompt, response = found
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

    def _measure_each(self, records: list[Record]) -> list[Measured | EncodeError]:
        """Return what `_measure` does, or the error, for each record."""
        prompts: list[Record | EncodeError] = [*records]
        if self.tokenizer is not None:
            encoded = try_encode_prompts(self.tokenizer, [record.prompt for record in records])
            lengths = [0 if isinstance(item, EncodeError) else len(item[0]) for item in encoded]
            prompts = [
                item if isinstance(item, EncodeError) else record
                for record, item in zip(records, encoded, strict=True)
            ]
        else:
            lengths = [len(prompt_text(record.prompt)) for record in records]
        good = [
            (item, length)
            for item, length in zip(prompts, lengths, strict=True)
            if not isinstance(item, EncodeError)
        ]
        found: list[Measured | EncodeError] = try_each(self._measure, good) if good else []
        measured = iter(found)
        return [item if isinstance(item, EncodeError) else next(measured) for item in prompts]

    def _measure(self, records: Sequence[tuple[Record, int]]) -> list[Measured]:
        """Return (deduplication key, prompt length, mean response length) of (record, length).

        Lengths are in tokens with a tokenizer, else in characters.
        """
        keys = self._keys([record for record, _ in records])
        responses = [response_texts(record) for record, _ in records]
        if self.tokenizer is None:
            totals = [sum(map(len, texts)) for texts in responses]
        else:
            totals = self._response_tokens(self.tokenizer, responses)
        return [
            (key, length, round(total / max(len(texts), 1)))
            for key, (_, length), total, texts in zip(keys, records, totals, responses, strict=True)
        ]

    def _keys(self, records: list[Record]) -> list[bytes]:
        """Return what duplicates have in common: the prompt's beginning, or all of the record.

        Rankings of different responses to a prompt are different judgements, as are those of
        different labelers. Without a prefix, demonstrations must have the same response too.
        """
        texts, prefix = [_dedup_text(record.prompt) for record in records], self.rules.prefix
        if self.rules.prefix_unit == "characters":
            keys = [text[:prefix].encode() for text in texts]
        else:
            assert self.tokenizer is not None
            tokens = encode_plain(self.tokenizer, texts)
            keys = [np.asarray(ids[:prefix], dtype="<i4").tobytes() for ids in tokens]
        return [
            key + _judgement(record)
            if isinstance(record, Ranking) or (prefix is None and response_texts(record))
            else key
            for key, record in zip(keys, records, strict=True)
        ]

    def _response_tokens(
        self, tokenizer: PreTrainedTokenizerFast, responses: list[tuple[str, ...]]
    ) -> list[int]:
        """Return the total number of tokens of each record's responses."""
        flat = [text for texts in responses for text in texts]
        lengths = iter([len(ids) for ids in encode_plain(tokenizer, flat)] if flat else [])
        return [sum(islice(lengths, len(texts))) for texts in responses]


def _judgement(record: Record) -> bytes:
    """Return the responses of a record, in any order, and the labeler who ranked them."""
    labeler = record.labeler_id if isinstance(record, Ranking) else None
    return json.dumps([sorted(response_texts(record)), labeler]).encode()


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
    return [
        prompt_text(record.prompt),
        *response_texts(record),
        record.user_id or "",
        labeler or "",
    ]


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
    K = len(response_texts(record))
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
