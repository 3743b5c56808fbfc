"""Read the raw rows of record files: JSONL, parquet, arrow and plain text.

Also read are gzipped JSONL and text, and Hugging Face data sets on disk. A file is read as a
stream, so its size does not matter. records.py checks and interprets the rows.

Not supported: downloading. The `datasets` package is not needed: its folders are arrow files, which
pyarrow reads.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Paths: TypeAlias = str | Path | Sequence[str | Path]

# Bytes. A longer line means a file without line ends, which would fill the memory.
LONGEST_LINE = 64 << 20
_NOT_HERE = "no such file; check the path"


@dataclass
class ReadPosition:
    """Progress of reading files, in bytes on disk, for a progress bar."""

    finished: int = 0  # of the files read to the end
    current: int = 0  # of the file being read


class DamagedFile(Exception):
    """A file is truncated or cannot be decoded; `row` is the last good line or row."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def as_paths(paths: Paths) -> list[Path]:
    """Return one path or several as a list of Path."""
    return [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]


def as_files(paths: Paths) -> list[Path]:
    """Return the files to read: a Hugging Face data set folder becomes its arrow files."""
    return [
        file
        for path in as_paths(paths)
        for file in (_arrow_files(path) if path.is_dir() else [path])
    ]


def raw_rows(
    path: Path, text: bool = False, position: ReadPosition | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (line or row number from 1, the line's bytes or the row) of one file.

    Blank lines are skipped. With `text`, .txt files are read too, each as one row. A line longer
    than LONGEST_LINE is cut to LONGEST_LINE + 1 bytes. Raises UserError if the path is missing or
    has an unknown extension, DamagedFile if the file is truncated or cannot be decoded.
    """
    position = ReadPosition() if position is None else position
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    check_readable(path, text)
    if plain.endswith(".jsonl"):
        yield from _lines(path, position)
    elif name.endswith((".parquet", ".arrow")):
        yield from _table_rows(path, position)
    elif plain.endswith(".json"):
        yield from _json_rows(path, position)
    else:
        yield 1, {"text": _whole_text(path)}
    position.finished, position.current = position.finished + path.stat().st_size, 0


def check_readable(path: Path, text: bool = False) -> None:
    """Raise UserError if `path` is missing or has an unknown extension; see `raw_rows`."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if not path.is_file():
        raise UserError(f"{path}: {_NOT_HERE}")
    if not (
        plain.endswith((".jsonl", ".json"))
        or name.endswith((".parquet", ".arrow"))
        or (plain.endswith(".txt") and text)
    ):
        expected = ".jsonl, .jsonl.gz, .json, .parquet, .arrow" + ", .txt, .txt.gz" * text
        raise UserError(
            f"{path}: unknown kind of file for records; expected a name ending in {expected}"
        )


def is_one_text(path: Path) -> bool:
    """Return whether the file is one document: a .txt or .txt.gz file."""
    return path.name.lower().removesuffix(".gz").endswith(".txt")


def make_folder(folder: str | Path) -> Path:
    """Create the folder and return it; raise UserError if files cannot be written in it.

    Commands call it before they compute anything.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); give another folder"
        ) from None
    return Path(folder)


def printable(text: str) -> str:
    """Return `text` with every character that could disturb a terminal or a log as "?"."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _arrow_files(folder: Path) -> list[Path]:
    """Return the files of a data set that `datasets` wrote with save_to_disk, in its order."""
    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise UserError(
            f"{folder}: holds the splits {splits}; give one of them, such as {folder}/train"
        )
    try:
        names = [
            entry["filename"]
            for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        ]
    except FileNotFoundError:
        raise UserError(
            f"{folder}: a folder without state.json; "
            "expected a file, or a data set written by save_to_disk"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{state}:1: does not name the data files; save the data set again"
        ) from None
    return [folder / name for name in names]


def _lines(path: Path, position: ReadPosition) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with (
            path.open("rb") as raw,
            gzip.open(raw) if path.name.lower().endswith(".gz") else raw as file,
        ):
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    _skip_line(file)
                position.current = raw.tell()
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFile(number, _reason(error)) from None


def _json_rows(path: Path, position: ReadPosition) -> Iterator[tuple[int, Any]]:
    """Yield (number, item) of a JSON array of objects, as Alpaca and ShareGPT files are.

    A file that does not begin with "[" is read as JSONL, which is often named .json.
    """
    text = _whole_text(path)
    if not text.lstrip().startswith("["):
        yield from _lines(path, position)
        return
    try:
        rows = json.loads(text)
    except RecursionError:
        raise DamagedFile(0, "is nested too deeply; expected an array of objects") from None
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        reason = f"malformed JSON ({error}); copy the file again"
        raise DamagedFile(line - 1, reason) from None
    size = path.stat().st_size
    for number, row in enumerate(rows, 1):
        position.current = size * number // len(rows)
        if not isinstance(row, dict):
            raise DamagedFile(number - 1, "the array holds other values; expected objects")
        yield number, row


def _skip_line(file: io.BufferedIOBase) -> None:
    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass


def _whole_text(path: Path) -> str:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(
            1, f"byte {error.start + 1} is not UTF-8; convert the file, e.g. with iconv"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFile(0, _reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, (EOFError, zlib.error)):
        return "the gzip data is truncated or damaged here; copy the file again"
    return f"cannot be read ({error}); check the file and its permissions"


def _table_rows(path: Path, position: ReadPosition) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading {path.suffix} needs pyarrow; "
            "run pip install pyarrow, or convert the file to .jsonl"
        ) from None
    number, size, before = 0, path.stat().st_size, 0.0
    try:
        with path.open("rb") as file:
            for done, batch in _arrow_batches(file) if _is_arrow(path) else _parquet_batches(file):
                batch.validate(full=True)  # wrong offsets would read memory outside the file
                share = (done - before) / max(batch.num_rows, 1)  # of the file, in one row
                for row in batch.to_pylist():
                    number += 1
                    before += share
                    position.current = int(size * before)
                    yield number, row
                before = done
    except Exception as error:  # pyarrow's conversions raise SystemError, KeyError and others
        reason = printable(" ".join(str(error).split()))[:200]
        kind = "arrow" if _is_arrow(path) else "parquet"
        raise DamagedFile(number, f"not readable as {kind} ({reason}); copy it again") from None


def _is_arrow(path: Path) -> bool:
    return path.suffix.lower() == ".arrow"


def _parquet_batches(file: IO[bytes]) -> Iterator[tuple[float, RecordBatch]]:
    """Yield (share of the file read so far, batch of rows)."""
    import pyarrow.parquet as pq

    table, rows = pq.ParquetFile(file), 0
    for batch in table.iter_batches(batch_size=1024):
        rows += batch.num_rows
        yield rows / table.metadata.num_rows, batch


def _arrow_batches(file: IO[bytes]) -> Iterator[tuple[float, RecordBatch]]:
    """Yield (share of the file read so far, batch of rows) of an arrow stream or file.

    `datasets` writes arrow streams. Arrow's file format begins with the magic bytes ARROW1.
    """
    import pyarrow as pa

    size = file.seek(0, 2)
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    batches: Iterable[RecordBatch]
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = pa.ipc.open_stream(file)
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            yield file.tell() / max(size, 1), batch.slice(start, 1024)
