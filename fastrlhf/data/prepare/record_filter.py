"""What is decided on each record by itself while `data prepare` reads: length, personal data, and the hashes by which
duplicates, users and splits are found afterwards (prepare.py).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

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
    """What has been counted while reading; `personal_data` are findings, of which a record may have several."""

    counts: Counts
    lost: Counter[str]
    personal_data: Counter[str]
    read_by: Counter[str]

    @property
    def dropped(self) -> dict[str, int]:
        reasons = ("too_short", "too_long", "personal_data")
        return {"malformed": self.counts.rejected} | {
            reason: self.lost[reason] for reason in reasons
        }

    def state(self, place: RecordLocation) -> dict[str, Any]:
        counts = (self.counts.read, self.counts.rejected)
        return {
            "after": [place.file, place.line],
            "counts": counts,
            "lost": self.lost,
            "personal_data": self.personal_data,
            "read_by": self.read_by,
        }

    @classmethod
    def resume(cls, state: dict[str, Any] | None) -> tuple[PrepareStats, tuple[int, int]]:
        if state is None:
            return cls(Counts(), Counter(), Counter(), Counter()), (0, 0)
        read, rejected = state["counts"]
        found = [Counter(state[name]) for name in ("lost", "personal_data", "read_by")]
        return cls(Counts(read=read, rejected=rejected), *found), (
            state["after"][0],
            state["after"][1],
        )


class Cleaner:
    """Decides on each record by itself, and puts those that stay into the spool."""

    def __init__(
        self, rules: Rules, sources: list[str], tally: PrepareStats, spool: WorkFiles
    ) -> None:
        self.rules, self.tally, self.spool = rules, tally, spool
        self.sources = {name: number for number, name in enumerate(sources)}
        self.tokenizer = load_tokenizer(rules.tokenizer) if rules.tokenizer else None

    def take(self, chunk: list[tuple[RecordLocation, str, Any]]) -> None:
        """Records as (place, source, record)."""
        staying = []
        for place, source, record in chunk:
            self.tally.read_by[source] += 1
            length = len(prompt_text(record.prompt))
            if not self.rules.min_chars <= length <= self.rules.max_chars:
                self.tally.lost["too_short" if length < self.rules.min_chars else "too_long"] += 1
                continue
            order = _hash(self.rules.seed, b"order", to_json(record).encode())
            user = _hash(self.rules.seed, b"user", _owner(record).encode())
            clean = self._without_pii(record, user, place)
            if clean is not None:
                staying.append((source, clean, user, order))
        records = [record for _, record, _, _ in staying]
        keys = [_dedup_text(record.prompt) for record in records]
        lengths = self._lengths(records)
        for (source, record, user, order), key, (prompt, response) in zip(
            staying, self._prefixes(keys), lengths, strict=True
        ):
            if self.rules.max_prompt_tokens is not None and prompt > self.rules.max_prompt_tokens:
                self.tally.lost["too_long"] += 1
                continue
            responses, pairs = _sizes(record)
            self.spool.add(
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

    def _without_pii(self, record: Any, user: int, place: RecordLocation) -> Any | None:
        """The record as it may stay in its split, None when it may not."""
        split = SPLITS[split_of(user, self.rules)]
        if self.rules.pii == "keep" or split not in self.rules.pii_splits:
            return record
        kinds = find_pii("\n".join(_texts(record)))
        if not kinds:
            return record
        self.tally.personal_data.update(kinds)
        redacting = self.rules.pii == "redact"
        for kind in kinds:
            action = "redacted" if redacting else "dropped"
            self.spool.report(
                {"kind": kind, "source": str(place), "split": split, "action": action}
            )
        if redacting:
            return _redacted(record, user)
        self.tally.lost["personal_data"] += 1
        return None

    def _prefixes(self, keys: list[str]) -> Iterator[bytes]:
        """What two prompts must have in common to be one."""
        if self.rules.prefix_unit == "characters":
            return (key[: self.rules.prefix].encode() for key in keys)
        assert self.tokenizer is not None
        tokens = encode_plain(self.tokenizer, keys) if keys else []
        return (np.asarray(ids[: self.rules.prefix], dtype="<i4").tobytes() for ids in tokens)

    def _lengths(self, records: list[Any]) -> list[tuple[int, int]]:
        """(length of the prompt, mean length of the responses), in tokens with a tokenizer, else in characters."""
        responses = [_responses(record) for record in records]
        if self.tokenizer is None or not records:
            prompts = [len(prompt_text(record.prompt)) for record in records]
            totals = [sum(map(len, own)) for own in responses]
        else:
            prompts = [
                len(ids)
                for ids in encode_prompts(self.tokenizer, [record.prompt for record in records])
            ]
            totals = self._response_tokens(self.tokenizer, responses)
        return [
            (p, round(t / max(len(own), 1)))
            for p, t, own in zip(prompts, totals, responses, strict=True)
        ]

    def _response_tokens(
        self, tokenizer: PreTrainedTokenizerFast, responses: list[tuple[str, ...]]
    ) -> list[int]:
        flat = [text for own in responses for text in own]
        lengths = iter([len(ids) for ids in encode_plain(tokenizer, flat)] if flat else [])
        return [sum(islice(lengths, len(own))) for own in responses]


def _owner(record: Record) -> str:
    """The user, or for a record without one its prompt: it is then in the same split of all kinds of record."""
    return (
        f"prompt {_dedup_text(record.prompt)}"
        if record.user_id is None
        else f"user {record.user_id}"
    )


def _texts(record: Record) -> list[str]:
    """Everything a person may have written, ids too: an id may be an e-mail or IP address."""
    labeler = record.labeler_id if isinstance(record, Ranking) else None
    return [prompt_text(record.prompt), *_responses(record), record.user_id or "", labeler or ""]


def _responses(record: Record) -> tuple[str, ...]:
    if isinstance(record, Demonstration):
        return (record.response,)
    return record.responses if isinstance(record, Ranking) else ()


def _redacted(record: Any, user: int) -> Any:
    """The record with its findings replaced; an id with one becomes a number that stays the same for its user."""
    prompt = record.prompt
    turns = isinstance(prompt, list)
    changed: dict[str, Any] = {
        "prompt": [{**turn, "content": redact(turn["content"])[0]} for turn in prompt]
        if turns
        else redact(prompt)[0]
    }
    if isinstance(record, Demonstration):
        changed["response"] = redact(record.response)[0]
    elif isinstance(record, Ranking):
        changed["responses"] = tuple(redact(text)[0] for text in record.responses)
        if record.labeler_id is not None and find_pii(record.labeler_id):
            changed["labeler_id"] = (
                f"labeler-{_hash(user, b'labeler', record.labeler_id.encode()):016x}"
            )
    if record.user_id is not None and find_pii(record.user_id):
        changed["user_id"] = f"user-{user:016x}"
    return replace(record, **changed)


def _sizes(record: Record) -> tuple[int, int]:
    """Responses, and pairs of which one is better."""
    K = len(_responses(record))
    if not isinstance(record, Ranking):
        return K, 0
    ties = sum(n * (n - 1) // 2 for n in Counter(record.ranks).values())
    return K, K * (K - 1) // 2 - ties


def _dedup_text(prompt: PromptLike) -> str:
    """The prompt without regard to case and spacing. System turns, the same for whole products, do not count."""
    if not isinstance(prompt, str):
        prompt = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return " ".join(prompt_text(prompt).casefold().split())


def _hash(seed: int, purpose: bytes, content: bytes) -> int:
    # `person` keeps the three hashes of a record independent: the split must not follow from the order.
    key = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(
        hashlib.blake2b(content, digest_size=8, key=key, person=purpose).digest(), "little"
    )


def split_of(user: Any, rules: Rules) -> Any:
    """A user's split as a number in SPLITS, of one hash or of an array of them; the hash, as a number in [0, 1),
    decides.
    """
    place = user / 2.0**64
    test = place < rules.test_fraction
    return (
        1 * (place < rules.test_fraction + rules.valid_fraction) + 1 * test
    )  # test lies inside the second interval
