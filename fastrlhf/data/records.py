"""Read demonstrations, rankings, prompts and text from JSONL, gzipped JSONL, parquet and plain text, checking every
record.

What is wrong in a record is said once, in one line, with the file and the line. Columns nobody asked for are ignored,
because public data sets carry many. Left out on purpose: downloading, tokenizing (tokenize.py), cleaning (prepare.py).
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeAlias

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict

from fastrlhf.errors import UserError

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["demonstrations", "rankings", "prompts", "text"]
OnError: TypeAlias = Literal["strict", "quarantine"]
Paths: TypeAlias = str | Path | Sequence[str | Path]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _id_to_str(value: Any) -> Any:
    return str(value) if type(value) is int else value


Str = Annotated[str, Strict()]
Filled = Annotated[Str, AfterValidator(_not_blank)]
Id = Annotated[str | None, BeforeValidator(_id_to_str)]
Rank = Annotated[int, Strict()] | Annotated[float, Strict(), AllowInfNan(False)]


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
        return f"kept {self.kept} of {self.read} records" + (f" ({', '.join(lost)})" if lost else "")


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

_CURE = "fix the line, or set on_error to quarantine to leave such lines out"


class BadRecord(Exception):
    """One record is unusable; the message says why, without the place."""


def as_paths(paths: Paths) -> list[Path]:
    """One path or many, as a list of Path."""
    return [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]


def read_records(
    paths: Paths,
    kind: Kind,
    on_error: OnError = "strict",
    rejected: Path | None = None,
    counts: Counts | None = None,
) -> Iterator[Any]:
    """Yield the records of `paths`, in file order, as the dataclass of `kind` (pairs become a Ranking with K = 2).

    Endings read: .jsonl, .parquet, for text also .txt (a file is one document), and .gz after .jsonl or .txt.
    A record that cannot be used raises UserError with `file:line`; with on_error="quarantine" it is counted in
    `counts.rejected` and, when `rejected` is a path, written there as one JSON line {"source", "reason", "record"}.
    A file that cannot be read (missing, truncated, of another kind) always raises UserError. Where several processes
    read the same files, `rejected` is for one of them.
    """
    yield from parse_rows(paths, kind, lambda row: [parse_record(row, kind)], on_error, rejected, counts)


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
        aside: TextIO | None = None
        if rejected is not None and on_error == "quarantine":
            Path(rejected).parent.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(open(rejected, "w", encoding="utf-8"))
        for path in as_paths(paths):
            for line, raw in _raw_records(path, kind):
                counts.read += 1
                try:
                    parsed = parse(_decode(raw) if isinstance(raw, bytes) else raw)
                except BadRecord as bad:
                    if on_error == "strict":
                        raise UserError(f"{path}:{line}: {bad}; {_CURE}") from None
                    counts.rejected += 1
                    _set_aside(aside, f"{path}:{line}", str(bad), raw)
                else:
                    yield from parsed
    if counts.rejected > before:
        see = f", see {rejected}" if rejected else ""
        log.warning("%d malformed records left out%s", counts.rejected - before, see)


def to_json(record: Record) -> str:
    """The record as one JSON line without its end, as `read_records` reads it; unset ids are left out."""
    return json.dumps({key: value for key, value in vars(record).items() if value is not None}, ensure_ascii=False)


def detect_kind(path: Path) -> Kind:
    """What a file holds, told by the keys of its first row."""
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        return "text"
    for line, raw in _raw_records(path, "text"):
        try:
            row = _decode(raw) if isinstance(raw, bytes) else raw
        except BadRecord as bad:
            raise UserError(f"{path}:{line}: {bad}; {_CURE}") from None
        kinds: dict[str, Kind] = {"responses": "rankings", "chosen": "rankings", "response": "demonstrations"}
        kinds |= {"text": "text", "prompt": "prompts"}
        for key, kind in kinds.items():
            if key in row:
                return kind
        keys = ", ".join(row) or "none"
        raise UserError(f"{path}:{line}: no known key (it has {keys}); expected one of {', '.join(kinds)}")
    raise UserError(f"{path}: the file is empty; check how it was made")


def _set_aside(aside: TextIO | None, source: str, reason: str, raw: bytes | dict[str, Any]) -> None:
    if aside is not None:
        record = raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n") if isinstance(raw, bytes) else raw
        aside.write(json.dumps({"source": source, "reason": reason, "record": record}, default=str) + "\n")


def parse_record(row: dict[str, Any], kind: Kind) -> Record:
    """One row as a checked record; BadRecord says what is wrong with it."""
    pair = kind == "rankings" and "chosen" in row and "responses" not in row
    try:
        record = _ADAPTERS["pairs" if pair else kind].validate_python(row)
    except ValidationError as error:
        raise BadRecord(_explain(error)) from None
    if isinstance(record, _Pair):
        responses = (record.chosen, record.rejected)
        return Ranking(record.prompt, responses, (1, 2), record.user_id, record.labeler_id)
    if isinstance(record, Ranking):
        _check_ranks(record)
    return record


def _decode(line: bytes) -> dict[str, Any]:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"byte {error.start + 1} of the line is not UTF-8; expected UTF-8 JSON") from None
    try:
        row = from_json(line)
    except ValueError as error:
        # The parser says "line 1" of this line; the true line number already stands in front.
        reason = str(error).replace(" at line 1 column", " at column")
        raise BadRecord(f"malformed JSON ({reason}); expected one JSON object on the line") from None
    if not isinstance(row, dict):
        raise BadRecord(f"the line holds {_shown(row)}; expected one JSON object")
    return row


def _explain(error: ValidationError) -> str:
    """The first thing wrong, in the reader's words: the field, what it holds, what was expected."""
    errors = error.errors()
    field = str(errors[0]["loc"][0])
    # A prompt may be a string or turns, so one slip makes an error for each; the deepest is about what was meant.
    first = max((e for e in errors if e["loc"][0] == field), key=lambda e: len(e["loc"]))
    expected = _EXPECTED[field]
    index = next((part for part in first["loc"] if isinstance(part, int)), None)
    name = f'"{field}"' if index is None else f'"{field}" item {index + 1}'
    if first["type"] == "missing":
        lack = "is missing" if index is None else f'lacks "{first["loc"][-1]}"'
        return f"{name} {lack}; expected {expected}"
    if first["type"] == "value_error":
        return f"{name} is empty; expected {expected}"
    return f"{name} is {_shown(first['input'])}; expected {expected}"


def _check_ranks(record: Ranking) -> None:
    K = len(record.responses)
    if K < 2:
        raise BadRecord(f'"responses" has {K} entry; expected {_EXPECTED["responses"]}')
    if len(record.ranks) != K:
        raise BadRecord(f'"ranks" has {len(record.ranks)} entries for {K} responses; expected {_EXPECTED["ranks"]}')
    if len(set(record.ranks)) == 1:
        raise BadRecord('"ranks" are all equal, which ranks nothing; expected at least two different ranks')


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _raw_records(path: Path, kind: Kind) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(line or row number from 1, the line's bytes or the row) of one file."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path in the configuration")
    if plain.endswith(".jsonl"):
        yield from _lines(path)
    elif name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif plain.endswith(".txt") and kind == "text":
        yield 1, {"text": _whole_text(path)}
    else:
        wanted = ".jsonl, .jsonl.gz, .parquet" + (", .txt, .txt.gz" if kind == "text" else "")
        raise UserError(f"{path}: unknown kind of file for {kind}; expected a name ending in {wanted}")


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(_unreadable(path, number, error)) from None


def _whole_text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file, e.g. with iconv") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(_unreadable(path, 0, error)) from None


def _unreadable(path: Path, line: int, error: Exception) -> str:
    if isinstance(error, (EOFError, zlib.error)):
        return f"{path}: the gzip data break off or are damaged after line {line}; copy the file again"
    return f"{path}: cannot be read ({error}); check the file and its permissions"


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        cure = "run pip install pyarrow, or convert the file to .jsonl"
        raise UserError(f"{path}: reading parquet needs pyarrow; {cure}") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as parquet after row {number} ({reason}); copy it again") from None
