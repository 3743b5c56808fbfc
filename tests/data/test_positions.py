"""The position in a file that is being read, from which the remaining time is estimated."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data import indexed
from fastrlhf.data.files import ReadPosition, raw_rows
from fastrlhf.data.indexed import write_indexed

ROWS = [{"prompt": f"{number} of many", "response": "x" * 99} for number in range(3000)]


def write(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    name = path.name.lower()
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.arrow", "a.ARROW", "a.Parquet"]
)
def test_the_position_advances_from_the_first_row(tmp_path: Path, name: str) -> None:
    path, position = write(tmp_path / name), ReadPosition()
    size, rows, before = path.stat().st_size, 0, 0
    for number, _ in raw_rows(path, position=position):
        assert 0 < position.current <= size
        assert position.current >= before
        rows, before = number, position.current
    assert rows == len(ROWS)
    assert (position.finished, position.current) == (size, 0)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_one_long_text_has_a_position_too(
    tmp_path: Path, tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat sat on the mat.\n" * 1000
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    monkeypatch.setattr(indexed, "PIECE", 3000)
    shares: list[float] = []

    def update(_: object, done: int, note: str) -> None:
        shares.append(done / path.stat().st_size)

    monkeypatch.setattr(indexed.Meter, "update", update)
    write_indexed(path, tokenizer, tmp_path / "out")
    assert shares == pytest.approx([number / 8 for number in range(1, 9)], abs=0.01)
