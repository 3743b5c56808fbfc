"""Rows of files (files.py) as checked demonstrations, rankings, prompts and text.

What is wrong in a record is said once, in one line, with the file and the line. Columns nobody asked for are ignored,
because public data sets carry many. Left out on purpose: tokenizing (tokenize.py), cleaning (prepare.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import from_json
from typing_extensions import TypedDict

from fastrlhf.data import files
from fastrlhf.data.files import Damaged, Paths, Position, as_files, as_paths, printable, raw_rows
from fastrlhf.errors import UserError

__all__ = ["Paths", "as_paths"]

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["demonstrations", "rankings", "prompts", "text"]
OnError: TypeAlias = Literal["strict", "quarantine"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _id_to_str(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _no_blank_id(value: str | None) -> str | None:
    return (
        value if value is None else _not_blank(value)
    )  # one user for all who have no id would be capped as one


Str = Annotated[str, Strict()]
Filled = Annotated[Str, AfterValidator(_not_blank)]
Id = Annotated[str | None, BeforeValidator(_id_to_str), AfterValidator(_no_blank_id)]
_EXACT = 2**53  # ranks are compared as float64 at the most
Rank = (
    Annotated[int, Strict(), Field(ge=-_EXACT, le=_EXACT)]
    | Annotated[float, Strict(), AllowInfNan(False)]
)


class Turn(TypedDict):
    """One message of a conversation."""

    role: Filled
    content: Str


PromptLike: TypeAlias = Filled | Annotated[list[Turn], Field(min_length=1)]


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response a labeler wrote for it."""

    prompt: PromptLike
    response: Filled
    user_id: Id = None


@dataclass(frozen=True)
class Ranking:
    """K >= 2 responses to one prompt and the rank of each: lower is better, equal is a tie, not all are tied."""

    prompt: PromptLike
    responses: tuple[Filled, ...]
    ranks: tuple[Rank, ...]
    user_id: Id = None
    labeler_id: Id = None


@dataclass(frozen=True)
class Prompt:
    """A prompt alone, for PPO and for sampling."""

    prompt: PromptLike
    user_id: Id = None


@dataclass(frozen=True)
class Text:
    """One pretraining document."""

    text: Filled


Record: TypeAlias = Demonstration | Ranking | Prompt | Text


@dataclass(frozen=True)
class _Pair:
    """The other spelling of a ranking with K = 2."""

    prompt: PromptLike
    chosen: Filled
    rejected: Filled
    user_id: Id = None
    labeler_id: Id = None


@dataclass
class Counts:
    """What became of the records of one file set; printed by the loaders, written into manifests."""

    read: int = 0
    kept: int = 0
    rejected: int = 0  # malformed, set aside under on_error="quarantine"
    long_prompts: int = 0  # dropped: prompt over the limit
    cut_responses: int = 0  # kept, but the response was cut at the limit

    def __str__(self) -> str:
        lost = [
            f"{count} {reason}"
            for count, reason in (
                (self.rejected, "malformed and set aside"),
                (self.long_prompts, "dropped for a long prompt"),
                (self.cut_responses, "responses cut"),
            )
            if count
        ]
        return f"kept {self.kept} of {self.read} records" + (
            f" ({', '.join(lost)})" if lost else ""
        )


_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "demonstrations": TypeAdapter(Demonstration),
    "rankings": TypeAdapter(Ranking),
    "prompts": TypeAdapter(Prompt),
    "text": TypeAdapter(Text),
    "pairs": TypeAdapter(_Pair),
}

_EXPECTED = {
    "prompt": 'a non-empty string or a list of {"role", "content"} turns',
    "response": "a non-empty string",
    "responses": "a list of at least two non-empty strings",
    "ranks": "a list with one finite number per response, lower is better, equal is a tie",
    "chosen": "a non-empty string",
    "rejected": "a non-empty string",
    "text": "a non-empty string",
    "user_id": "a string or an integer",
    "labeler_id": "a string or an integer",
}

_SHOWN = 1000  # bytes of a giant line that are set aside
_CURE = "; fix the line, or set on_error to quarantine to leave such lines out"
_FILE_CURE = ", or set on_error to quarantine to go on without the rest of it"


class BadRecord(Exception):
    """One record is unusable; the message says why, without the place."""


class RecordLocation(NamedTuple):
    """Where a record stands: the file's number among those read, its path, the line or row from 1."""

    file: int
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def read_records(
    paths: Paths,
    kind: Kind,
    on_error: OnError = "strict",
    rejected: Path | None = None,
    counts: Counts | None = None,
) -> Iterator[Any]:
    """Yield the records of `paths`, in file order, as the dataclass of `kind` (pairs become a Ranking with K = 2).

    Read are .jsonl, .parquet and .arrow files, for text also .txt (a file is one document), .gz after .jsonl or .txt,
    and folders that the `datasets` package saved.
    A record that cannot be used, a file without records and one that breaks off raise UserError with `file:line`; with
    on_error="quarantine" each is counted in `counts.rejected` and, when `rejected` is a path, written there as one JSON
    line {"source", "reason", "record"}. A path that is missing or of another kind always raises UserError. Where
    several processes read the same files, `rejected` is for one of them.
    """
    yield from parse_rows(
        paths, kind, lambda row: [parse_record(row, kind)], on_error, rejected, counts
    )


def parse_rows(
    paths: Paths,
    kind: Kind,
    parse: Callable[[dict[str, Any]], list[Any]],
    on_error: OnError = "strict",
    rejected: Path | None = None,
    counts: Counts | None = None,
) -> Iterator[Any]:
    """As `read_records`, with `parse` turning each row into any number of records; BadRecord refuses it."""
    counts = Counts() if counts is None else counts
    before = counts.rejected
    with ExitStack() as stack:
        aside: Callable[[str], Any] | None = None
        if rejected is not None and on_error == "quarantine":
            Path(rejected).parent.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(open(rejected, "w", encoding="utf-8")).write
        for _, found in placed_rows(as_files(paths), kind, parse, on_error, aside, counts):
            yield from found
    if counts.rejected > before:
        see = f", see {rejected}" if rejected else ""
        log.warning("%d malformed records left out%s", counts.rejected - before, see)


def placed_rows(
    paths: list[Path],
    kind: Kind,
    parse: Callable[[dict[str, Any]], list[Any]],
    on_error: OnError,
    aside: Callable[[str], Any] | None,
    counts: Counts,
    *,
    after: tuple[int, int] = (0, 0),
    position: Position | None = None,
) -> Iterator[tuple[RecordLocation, list[Any]]]:
    """(place, what `parse` made of it) of each good row of the files `paths` behind `after`: (file, line).

    `aside` is given the line of rejected.jsonl for each bad row.
    """
    position = Position() if position is None else position
    for number, path in enumerate(paths):
        skip = after[1] if number == after[0] else 0
        if number < after[0]:
            position.before += path.stat().st_size
            continue
        for line, raw, found in _parsed(path, kind, parse, skip, position):
            counts.read += 1
            if not isinstance(found, BadRecord):
                yield RecordLocation(number, path, line), found
            elif on_error == "strict":
                raise UserError(f"{path}:{line}: {found}{_FILE_CURE if raw is None else _CURE}")
            else:
                counts.rejected += 1
                _set_aside(aside, f"{path}:{line}", str(found), raw)


def _parsed(
    path: Path,
    kind: Kind,
    parse: Callable[[dict[str, Any]], list[Any]],
    skip: int,
    position: Position,
) -> Iterator[tuple[int, Any, list[Any] | BadRecord]]:
    """(line, the raw row, its records or what is wrong) of one file behind line `skip`; no row where the file is at
    fault.
    """
    line = 0
    try:
        for line, raw in raw_rows(path, kind == "text", position):
            if line > skip:
                yield line, raw, _refusable(parse, raw)
    except Damaged as damage:
        yield damage.row + 1, None, BadRecord(str(damage))
    else:
        if line == 0:
            yield 1, None, BadRecord("the file holds no record; check how it was made")


def _refusable(
    parse: Callable[[dict[str, Any]], list[Any]], raw: bytes | dict[str, Any]
) -> list[Any] | BadRecord:
    try:
        return parse(_decode(raw) if isinstance(raw, bytes) else raw)
    except BadRecord as bad:
        return bad


def to_json(record: Record) -> str:
    """The record as one JSON line without its end, as `read_records` reads it; unset ids are left out."""
    return json.dumps(
        {key: value for key, value in vars(record).items() if value is not None}, ensure_ascii=False
    )


def detect_kind(path: Path) -> Kind:
    """What a file holds, told by the keys of its first row."""
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        return "text"
    for place, (row,) in placed_rows(
        as_files(path), "text", lambda row: [row], "strict", None, Counts()
    ):
        kinds: dict[str, Kind] = {
            "responses": "rankings",
            "chosen": "rankings",
            "response": "demonstrations",
        }
        kinds |= {"text": "text", "prompt": "prompts"}
        for key, kind in kinds.items():
            if key in row:
                return kind
        keys = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"{place}: no known key (it has {keys}); expected one of {', '.join(kinds)}"
        )
    raise AssertionError("a file without rows is refused above")


def _set_aside(
    aside: Callable[[str], Any] | None, source: str, reason: str, raw: bytes | dict[str, Any]
) -> None:
    if aside is not None:
        shown = raw[:_SHOWN] if isinstance(raw, bytes) and len(raw) > files.LONGEST_LINE else raw
        record = (
            shown.decode("utf-8", "backslashreplace").rstrip("\r\n")
            if isinstance(shown, bytes)
            else shown
        )
        aside(
            json.dumps({"source": source, "reason": reason, "record": record}, default=str) + "\n"
        )


def parse_record(row: dict[str, Any], kind: Kind) -> Record:
    """One row as a checked record; BadRecord says what is wrong with it."""
    pair = kind == "rankings" and "chosen" in row and "responses" not in row
    try:
        record = _ADAPTERS["pairs" if pair else kind].validate_python(row)
    except ValidationError as error:
        raise BadRecord(_explain(error, row)) from None
    if isinstance(record, _Pair):
        responses = (record.chosen, record.rejected)
        return Ranking(record.prompt, responses, (1, 2), record.user_id, record.labeler_id)
    if isinstance(record, Ranking):
        _check_ranks(record)
    return record


def _decode(line: bytes) -> dict[str, Any]:
    if len(line) > files.LONGEST_LINE:
        raise BadRecord(
            f"the line is longer than {files.LONGEST_LINE} bytes; expected one JSON object on each line"
        )
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"byte {error.start + 1} of the line is not UTF-8; expected UTF-8 JSON"
        ) from None
    try:
        row = from_json(line.rstrip())
    except ValueError as error:
        # The parser says "line 1" of this line; the true line number already stands in front.
        reason = str(error).replace(" at line 1 column", " at column")
        raise BadRecord(
            f"malformed JSON ({reason}); expected one JSON object on the line"
        ) from None
    if not isinstance(row, dict):
        raise BadRecord(f"the line holds {_shown(row)}; expected one JSON object")
    # The fast parser keeps the last of two equal keys, so the standard one reads the line again.
    json.loads(line, object_pairs_hook=_unique_keys, parse_int=float)
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord(f"the key {_shown(twice)} stands twice; expected each key once")
    return row


def _explain(error: ValidationError, row: dict[str, Any]) -> str:
    """The first thing wrong, in the reader's words: the field, what it holds, what was expected."""
    errors = error.errors()
    field = str(errors[0]["loc"][0])
    # A prompt may be a string or turns, so one slip makes an error for each; the deepest is about what was meant.
    first = max((e for e in errors if e["loc"][0] == field), key=lambda e: len(e["loc"]))
    expected = _EXPECTED[field]
    index = next((part for part in first["loc"] if isinstance(part, int)), None)
    name = f'"{field}"' if index is None else f'"{field}" item {index + 1}'
    if first["type"] == "missing":
        lack = (
            f"is missing (there is {', '.join(row) or 'nothing'})"
            if index is None
            else f'lacks "{first["loc"][-1]}"'
        )
        return f"{name} {lack}; expected {expected}"
    if first["type"] == "value_error":
        return f"{name} is empty; expected {expected}"
    return f"{name} is {_shown(first['input'])}; expected {expected}"


def _check_ranks(record: Ranking) -> None:
    K = len(record.responses)
    if K < 2:
        raise BadRecord(f'"responses" has {K} entry; expected {_EXPECTED["responses"]}')
    if len(record.ranks) != K:
        raise BadRecord(
            f'"ranks" has {len(record.ranks)} entries for {K} responses; expected {_EXPECTED["ranks"]}'
        )
    if len(set(record.ranks)) == 1:
        raise BadRecord(
            '"ranks" are all equal, which ranks nothing; expected at least two different ranks'
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = printable(text[:40])
    return text if len(text) < 40 else text[:37] + "..."
