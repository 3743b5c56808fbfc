"""Checked records: demonstrations, rankings, prompts and text from the rows of files (files.py).

A malformed record is reported in one line with its file and line. Columns that a kind does not
define are not checked, because public data sets have many. Prompts and rankings keep them in
`columns`, for reward functions and for the files that are made from them.

Out of scope: tokenizing (tokenize.py), cleaning (prepare/).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from fastrlhf.data.files import (
    DamagedFile,
    Paths,
    ReadPosition,
    as_files,
    as_paths,
    check_readable,
    printable,
    raw_rows,
)
from fastrlhf.data.json_rows import BadRecord, Row, decode_row, shown
from fastrlhf.data.rejections import (
    LINE_FIX,
    Counts,
    OnError,
    RecordLocation,
    Rejections,
    open_rejections,
)
from fastrlhf.errors import UserError

__all__ = ["BadRecord", "Counts", "OnError", "Paths", "RecordLocation", "Row", "as_paths"]

Kind: TypeAlias = Literal["demonstrations", "rankings", "prompts", "text"]


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


KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer", "function")


def _known_role(role: str) -> str:
    # A turn of "gpt" would be templated as some other speaker, and no loss would count it.
    if role not in KNOWN_ROLES:
        raise PydanticCustomError("unknown_role", "is an unknown role")
    return role


class Turn(TypedDict):
    """One message of a conversation."""

    role: Annotated[NonEmptyStr, AfterValidator(_known_role)]
    content: Str


Columns: TypeAlias = dict[str, Any]
"""The columns of a record that its kind does not define, unchecked."""
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
    columns: Columns = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Prompt:
    """A prompt alone, for PPO and for sampling."""

    prompt: PromptLike
    user_id: Id = None
    columns: Columns = field(default_factory=dict, compare=False)

    @property
    def other_columns(self) -> Row:
        """All columns of the record but its prompt."""
        user = {} if self.user_id is None else {"user_id": self.user_id}
        return {**self.columns, **user}


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

_FILE_FIX = ", or set on_error to quarantine to skip the rest of it"

ParseRow: TypeAlias = Callable[[Row], list[Any]]
"""Returns the records of a row; raises BadRecord if it is malformed."""


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
    with open_rejections(on_error, rejected, counts) as rejections:
        for _, found in located_rows(as_files(paths), kind, parse, rejections):
            yield from found


def located_records(
    paths: Paths, kind: Kind, rejections: Rejections
) -> Iterator[tuple[RecordLocation, Any]]:
    """Yield (location, record) for each good record of `paths`; see `read_records`."""
    for location, (record,) in located_rows(
        as_files(paths), kind, lambda row: [parse_record(row, kind)], rejections
    ):
        yield location, record


def located_rows(
    paths: list[Path],
    kind: Kind,
    parse: ParseRow,
    rejections: Rejections,
    *,
    after: tuple[int, int] = (0, 0),
    position: ReadPosition | None = None,
) -> Iterator[tuple[RecordLocation, list[Any]]]:
    """Yield (location, what `parse` returned) for each good row of the files `paths`.

    Rows up to `after`, (file number, line), are skipped. All paths are checked before the first
    row is read.
    """
    position = ReadPosition() if position is None else position
    for path in paths:
        check_readable(path, kind == "text")
    for number, path in enumerate(paths):
        skip = after[1] if number == after[0] else 0
        if number < after[0]:
            position.finished += path.stat().st_size
            continue
        for line, raw, found in _parsed(path, kind, parse, skip, position):
            rejections.counts.read += 1
            location = RecordLocation(number, path, line, raw)
            if not isinstance(found, BadRecord):
                yield location, found
            else:
                rejections.reject(location, str(found), _FILE_FIX if raw is None else LINE_FIX)


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
        return parse(decode_row(raw) if isinstance(raw, bytes) else raw)
    except BadRecord as bad:
        return bad


def to_json(record: Record) -> str:
    """Return the record as JSON on one line, without line end, unset ids and other columns."""
    return json.dumps(
        {
            key: value
            for key, value in vars(record).items()
            if key != "columns" and value is not None
        },
        ensure_ascii=False,
    )


def response_texts(record: Record) -> tuple[str, ...]:
    """Return the responses of a demonstration or ranking, () for other records."""
    if isinstance(record, Demonstration):
        return (record.response,)
    return record.responses if isinstance(record, Ranking) else ()


def detect_kind(path: Path) -> Kind:
    """Return the kind of records in a file, by the keys of its first row.

    Raises UserError if no key is known.
    """
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        return "text"
    for location, (row,) in located_rows(
        as_files(path), "text", lambda row: [row], Rejections("strict", Counts())
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
        keys = printable(", ".join(map(str, row))) or "none"
        raise UserError(
            f"{location}: no known key (it has {keys}); expected one of {', '.join(kinds)}"
        )
    raise AssertionError("located_rows raises UserError for a file without rows")


def parse_record(row: Row, kind: Kind) -> Record:
    """Return one row as a checked record; raise BadRecord if it is malformed."""
    pair = kind == "rankings" and "chosen" in row and "responses" not in row
    try:
        checked = {key: value for key, value in row.items() if key != "columns"}
        record = _ADAPTERS["pairs" if pair else kind].validate_python(checked)
    except ValidationError as error:
        raise BadRecord(_explain(error, row)) from None
    columns = _other_columns(record, row)
    if isinstance(record, _Pair):
        responses = (record.chosen, record.rejected)
        ids = (record.user_id, record.labeler_id)
        return Ranking(record.prompt, responses, (1, 2), *ids, columns)
    if isinstance(record, Ranking):
        _check_ranks(record)
    return replace(record, columns=columns) if columns and hasattr(record, "columns") else record


def _other_columns(record: Record | _Pair, row: Row) -> Columns:
    """Return the columns of `row` that are no fields of `record`; "columns" may be one of them."""
    known = {field.name for field in fields(record)} - {"columns"}
    return {key: value for key, value in row.items() if key not in known}


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
            found = printable(", ".join(map(str, row))) or "nothing"
            return f"{name} is missing (found {found}); expected {expected}"
        return f'{name} lacks "{first["loc"][-1]}"; expected {expected}'
    if first["type"] == "unknown_role":
        return (
            f"{name} has the unknown role {shown(first['input'])}; expected one of "
            f"{', '.join(KNOWN_ROLES)} (data convert --from sharegpt renames human and gpt)"
        )
    if first["type"] == "value_error":
        return f"{name} is empty; expected {expected}"
    return f"{name} is {shown(first['input'])}; expected {expected}"


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
