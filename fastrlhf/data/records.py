"""Checked records: demonstrations, rankings, prompts and text from the rows of files (files.py).

A malformed record is reported in one line with its file and line. Unknown columns are ignored,
because public data sets have many.

Out of scope: tokenizing (tokenize.py), cleaning (prepare/).
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
from fastrlhf.data.files import (
    DamagedFile,
    Paths,
    ReadPosition,
    as_files,
    as_paths,
    printable,
    raw_rows,
)
from fastrlhf.errors import UserError

__all__ = ["Paths", "as_paths"]

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["demonstrations", "rankings", "prompts", "text"]
OnError: TypeAlias = Literal["strict", "quarantine"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _id_to_str(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _no_blank_id(value: str | None) -> str | None:
    # All records with a blank id would count as one user, and be capped as one.
    return value if value is None else _not_blank(value)


Str = Annotated[str, Strict()]
NonEmptyStr = Annotated[Str, AfterValidator(_not_blank)]
Id = Annotated[str | None, BeforeValidator(_id_to_str), AfterValidator(_no_blank_id)]
_EXACT = 2**53  # ranks may be compared as float64, which is exact up to here
Rank = (
    Annotated[int, Strict(), Field(ge=-_EXACT, le=_EXACT)]
    | Annotated[float, Strict(), AllowInfNan(False)]
)


class Turn(TypedDict):
    """One message of a conversation."""

    role: NonEmptyStr
    content: Str


PromptLike: TypeAlias = NonEmptyStr | Annotated[list[Turn], Field(min_length=1)]


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response that a labeler wrote for it."""

    prompt: PromptLike
    response: NonEmptyStr
    user_id: Id = None


@dataclass(frozen=True)
class Ranking:
    """K >= 2 responses to one prompt and their ranks.

    A lower rank is better, equal ranks are a tie, and not all ranks are equal.
    """

    prompt: PromptLike
    responses: tuple[NonEmptyStr, ...]
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

    text: NonEmptyStr


Record: TypeAlias = Demonstration | Ranking | Prompt | Text


@dataclass(frozen=True)
class _Pair:
    """The other notation for a ranking with K = 2."""

    prompt: PromptLike
    chosen: NonEmptyStr
    rejected: NonEmptyStr
    user_id: Id = None
    labeler_id: Id = None


@dataclass
class Counts:
    """Counts of the records of one file set; the loaders log them, manifests contain them."""

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

_LONG_LINE_KEPT = 1000  # bytes of a line above LONGEST_LINE that are written to rejected.jsonl
_LINE_FIX = "; fix the line, or set on_error to quarantine to skip such lines"
_FILE_FIX = ", or set on_error to quarantine to skip the rest of it"

Row: TypeAlias = dict[str, Any]
ParseRow: TypeAlias = Callable[[Row], list[Any]]
"""Returns the records of a row; raises BadRecord if it is malformed."""


class BadRecord(Exception):
    """A record is malformed; the message says why, without its location."""


class RecordLocation(NamedTuple):
    """Location of a record: number of the file among those read, its path, line or row from 1."""

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
    """Yield the records of `paths`, in file order, as the dataclass of `kind`.

    Pairs become a Ranking with K = 2. Supported are .jsonl, .parquet and .arrow files, for text
    also .txt (a file is one document), .jsonl.gz and .txt.gz, and folders that the `datasets`
    package saved.

    A malformed record, a file without records and a truncated file raise UserError with
    `file:line`. With on_error="quarantine" each is counted in `counts.rejected` instead and, if
    `rejected` is a path, written there as one JSON line {"source", "reason", "record"}. A path that
    is missing or has an unknown extension always raises UserError. If several processes read the
    same files, give `rejected` to only one of them.
    """
    yield from parse_rows(
        paths, kind, lambda row: [parse_record(row, kind)], on_error, rejected, counts
    )


def parse_rows(
    paths: Paths,
    kind: Kind,
    parse: ParseRow,
    on_error: OnError = "strict",
    rejected: Path | None = None,
    counts: Counts | None = None,
) -> Iterator[Any]:
    """Yield what `parse` returns for each row, which may be several records; see `read_records`."""
    counts = Counts() if counts is None else counts
    before = counts.rejected
    with ExitStack() as stack:
        write_rejected: Callable[[str], object] | None = None
        if rejected is not None and on_error == "quarantine":
            Path(rejected).parent.mkdir(parents=True, exist_ok=True)
            write_rejected = stack.enter_context(open(rejected, "w", encoding="utf-8")).write
        for _, found in located_rows(
            as_files(paths), kind, parse, on_error, write_rejected, counts
        ):
            yield from found
    if counts.rejected > before:
        see = f", see {rejected}" if rejected else ""
        logger.warning("%d malformed records skipped%s", counts.rejected - before, see)


def located_rows(
    paths: list[Path],
    kind: Kind,
    parse: ParseRow,
    on_error: OnError,
    write_rejected: Callable[[str], object] | None,
    counts: Counts,
    *,
    after: tuple[int, int] = (0, 0),
    position: ReadPosition | None = None,
) -> Iterator[tuple[RecordLocation, list[Any]]]:
    """Yield (location, what `parse` returned) for each good row of the files `paths`.

    Rows up to `after`, (file number, line), are skipped. `write_rejected` is called with the line
    of rejected.jsonl for each malformed row.
    """
    position = ReadPosition() if position is None else position
    for number, path in enumerate(paths):
        skip = after[1] if number == after[0] else 0
        if number < after[0]:
            position.finished += path.stat().st_size
            continue
        for line, raw, found in _parsed(path, kind, parse, skip, position):
            counts.read += 1
            if not isinstance(found, BadRecord):
                yield RecordLocation(number, path, line), found
            elif on_error == "strict":
                raise UserError(f"{path}:{line}: {found}{_FILE_FIX if raw is None else _LINE_FIX}")
            else:
                counts.rejected += 1
                _write_rejection(write_rejected, f"{path}:{line}", str(found), raw)


def _parsed(
    path: Path,
    kind: Kind,
    parse: ParseRow,
    skip: int,
    position: ReadPosition,
) -> Iterator[tuple[int, bytes | Row | None, list[Any] | BadRecord]]:
    """Yield (line, raw row, its records or what is wrong) for one file after line `skip`.

    The raw row is None if the file itself is damaged or empty.
    """
    line = 0
    try:
        for line, raw in raw_rows(path, kind == "text", position):
            if line > skip:
                yield line, raw, _parsed_or_bad(parse, raw)
    except DamagedFile as damage:
        yield damage.row + 1, None, BadRecord(str(damage))
    else:
        if line == 0:
            yield 1, None, BadRecord("the file has no record; check how it was made")


def _parsed_or_bad(parse: ParseRow, raw: bytes | Row) -> list[Any] | BadRecord:
    try:
        return parse(_decode(raw) if isinstance(raw, bytes) else raw)
    except BadRecord as bad:
        return bad


def to_json(record: Record) -> str:
    """Return the record as JSON on one line, without line end and without unset ids."""
    return json.dumps(
        {key: value for key, value in vars(record).items() if value is not None}, ensure_ascii=False
    )


def detect_kind(path: Path) -> Kind:
    """Return the kind of records in a file, by the keys of its first row.

    Raises UserError if no key is known.
    """
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        return "text"
    for location, (row,) in located_rows(
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
            f"{location}: no known key (it has {keys}); expected one of {', '.join(kinds)}"
        )
    raise AssertionError("located_rows raises UserError for a file without rows")


def _write_rejection(
    write_rejected: Callable[[str], object] | None,
    source: str,
    reason: str,
    raw: bytes | Row | None,
) -> None:
    if write_rejected is None:
        return
    record: str | Row | None
    if isinstance(raw, bytes):
        kept = raw[:_LONG_LINE_KEPT] if len(raw) > files.LONGEST_LINE else raw
        record = kept.decode("utf-8", "backslashreplace").rstrip("\r\n")
    else:
        record = raw
    write_rejected(
        json.dumps({"source": source, "reason": reason, "record": record}, default=str) + "\n"
    )


def parse_record(row: Row, kind: Kind) -> Record:
    """Return one row as a checked record; raise BadRecord if it is malformed."""
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


def _decode(line: bytes) -> Row:
    if len(line) > files.LONGEST_LINE:
        raise BadRecord(
            f"the line is longer than {files.LONGEST_LINE} bytes; "
            "expected one JSON object on each line"
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
        # The parser only sees this line; its number in the file is already in the message.
        reason = str(error).replace(" at line 1 column", " at column")
        raise BadRecord(
            f"malformed JSON ({reason}); expected one JSON object on the line"
        ) from None
    if not isinstance(row, dict):
        raise BadRecord(f"the line holds {_shown(row)}; expected one JSON object")
    # The fast parser keeps the last of two equal keys; the standard one can report them.
    json.loads(line, object_pairs_hook=_unique_keys, parse_int=float)
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord(f"the key {_shown(twice)} occurs twice; expected each key once")
    return row


def _explain(error: ValidationError, row: Row) -> str:
    """Return a message for the first error: the field, its value, what was expected."""
    errors = error.errors()
    field = str(errors[0]["loc"][0])
    # A prompt may be a string or turns, so one mistake gives an error for each; the deepest error
    # is about the form that was meant.
    first = max((e for e in errors if e["loc"][0] == field), key=lambda e: len(e["loc"]))
    expected = _EXPECTED[field]
    index = next((part for part in first["loc"] if isinstance(part, int)), None)
    name = f'"{field}"' if index is None else f'"{field}" item {index + 1}'
    if first["type"] == "missing":
        if index is None:
            return f"{name} is missing (found {', '.join(row) or 'nothing'}); expected {expected}"
        return f'{name} lacks "{first["loc"][-1]}"; expected {expected}'
    if first["type"] == "value_error":
        return f"{name} is empty; expected {expected}"
    return f"{name} is {_shown(first['input'])}; expected {expected}"


def _check_ranks(record: Ranking) -> None:
    K = len(record.responses)
    if K < 2:
        raise BadRecord(f'"responses" has {K} entry; expected {_EXPECTED["responses"]}')
    if len(record.ranks) != K:
        raise BadRecord(
            f'"ranks" has {len(record.ranks)} entries for {K} responses; '
            f"expected {_EXPECTED['ranks']}"
        )
    if len(set(record.ranks)) == 1:
        raise BadRecord(
            '"ranks" are all equal, so nothing is ranked; expected at least two different ranks'
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = printable(text[:40])
    return text if len(text) < 40 else text[:37] + "..."
