"""Every format is read as the same records; every mistake in a file gives a one-line error."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.records import Counts, Demonstration, Kind, Prompt, Ranking, Text, read_records
from fastrlhf.errors import UserError

RANKING = {
    "prompt": "p",
    "responses": ["a", "b", "c"],
    "ranks": [1, 2.5, 1],
    "user_id": "u",
    "labeler_id": 7,
}


def test_each_kind_is_read_and_extra_columns_are_ignored(jsonl: Callable[..., Path]) -> None:
    turns = [{"role": "user", "content": "hi", "id": 3}]
    rows = jsonl(
        {"prompt": turns, "response": "yo", "source": {"x": 1}},
        {"prompt": "q", "response": "r", "user_id": "u"},
    )
    assert list(read_records(rows, "demonstrations")) == [
        Demonstration([{"role": "user", "content": "hi"}], "yo"),
        Demonstration("q", "r", "u"),
    ]
    assert list(read_records(jsonl(RANKING), "rankings")) == [
        Ranking("p", ("a", "b", "c"), (1, 2.5, 1), "u", "7")
    ]
    assert list(read_records(jsonl({"prompt": "p"}), "prompts")) == [Prompt("p")]
    assert list(read_records(jsonl({"text": "t"}), "text")) == [Text("t")]


def test_a_pair_is_a_ranking_of_two(jsonl: Callable[..., Path]) -> None:
    path = jsonl({"prompt": "p", "chosen": "good", "rejected": "bad", "labeler_id": "l"})
    assert list(read_records(path, "rankings")) == [
        Ranking("p", ("good", "bad"), (1, 2), None, "l")
    ]


def test_gzip_parquet_and_jsonl_give_the_same_records(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="parquet is read with pyarrow")
    import pyarrow as pa

    rows = [{**RANKING, "labeler_id": "l", "ranks": [1.0, 2.5, 1.0]}] * 3
    plain = jsonl(*rows)
    zipped = tmp_path / "data.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    expected = list(read_records(plain, "rankings"))
    assert len(expected) == 3
    assert list(read_records([zipped, table], "rankings")) == expected * 2


def test_a_plain_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo é", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfthree"))
    texts = read_records([tmp_path / "a.txt", tmp_path / "b.txt.gz"], "text")
    assert list(texts) == [Text("one\n\ntwo é"), Text("three")]


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p"}\r\n\r\n  \n{"prompt": 3}\n')
    records = read_records(path, "prompts")
    assert next(records) == Prompt("p")
    with pytest.raises(UserError, match=r"a\.jsonl:4: "):
        next(records)


BAD_LINES = [
    ("prompts", '{"prompt": "p"', "malformed JSON (EOF while parsing an object at column 14)"),
    ("prompts", "[1]", "the line holds [1]; expected one JSON object"),
    (
        "prompts",
        "{}",
        '"prompt" is missing (found nothing); expected a non-empty string or a list of {"role", ',
    ),
    ("prompts", '{"prompt": 3}', '"prompt" is 3; expected'),
    ("prompts", '{"prompt": " "}', '"prompt" is empty; expected'),
    ("prompts", '{"prompt": []}', '"prompt" is []; expected'),
    ("prompts", '{"prompt": [{"role": "user"}]}', '"prompt" item 1 lacks "content"; expected'),
    (
        "prompts",
        '{"prompt": "p", "user_id": 1.5}',
        '"user_id" is 1.5; expected a string or an integer',
    ),
    (
        "demonstrations",
        '{"prompt": "p", "a": 1}',
        '"response" is missing (found prompt, a); expected a non-empty',
    ),
    ("demonstrations", '{"prompt": "p", "response": null}', '"response" is null; expected'),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a"], "ranks": [1]}',
        '"responses" has 1 entry; expected',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}',
        '"ranks" has 1 entries for 2 responses',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [2, 2.0]}',
        '"ranks" are all equal',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a", ""], "ranks": [1, 2]}',
        '"responses" item 2 is empty',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, NaN]}',
        '"ranks" item 2 is NaN; expected',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, "2"]}',
        '"ranks" item 2 is "2"; expected',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [true, 2]}',
        '"ranks" item 1 is true; expected',
    ),
    (
        "rankings",
        '{"prompt": "p", "responses": "ab", "ranks": [1, 2]}',
        '"responses" is "ab"; expected',
    ),
    (
        "rankings",
        '{"prompt": "p", "chosen": "a"}',
        '"rejected" is missing (found prompt, chosen); expected',
    ),
    ("text", '{"text": 1}', '"text" is 1; expected a non-empty string'),
]


@pytest.mark.parametrize(("kind", "line", "reason"), BAD_LINES)
def test_a_bad_line_is_reported_with_file_line_reason_and_fix(
    jsonl: Callable[..., Path], kind: Any, line: str, reason: str
) -> None:
    good = {"prompt": "p", "response": "r", "responses": ["a", "b"], "ranks": [1, 2], "text": "t"}
    path = jsonl(good, line)
    with pytest.raises(UserError) as error:
        list(read_records(path, kind))
    message = str(error.value)
    assert message.startswith(f"{path}:2: {reason}")
    assert message.endswith("; fix the line, or set on_error to quarantine to skip such lines")
    assert "\n" not in message


@pytest.mark.parametrize(("kind", "line", "reason"), BAD_LINES)
def test_quarantine_keeps_the_good_lines_and_writes_the_bad_one_to_rejected(
    jsonl: Callable[..., Path], tmp_path: Path, kind: Any, line: str, reason: str
) -> None:
    good = {"prompt": "p", "response": "r", "responses": ["a", "b"], "ranks": [1, 2], "text": "t"}
    path, counts = jsonl(good, line, good), Counts()
    records = list(
        read_records(path, kind, "quarantine", tmp_path / "new" / "rejected.jsonl", counts)
    )
    assert len(records) == 2
    assert (counts.read, counts.rejected) == (3, 1)
    (rejected,) = [
        json.loads(row) for row in (tmp_path / "new" / "rejected.jsonl").read_text().splitlines()
    ]
    assert rejected["source"] == f"{path}:2"
    assert rejected["reason"].startswith(reason)
    assert rejected["record"] == line


def test_bytes_that_are_not_utf8_are_one_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "b"}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: byte 16 of the line is not UTF-8; expected UTF-8 JSON; fix"
    ):
        list(read_records(path, "prompts"))
    assert list(read_records(path, "prompts", "quarantine", tmp_path / "rejected")) == [Prompt("b")]
    assert "caf\\\\xe9" in (tmp_path / "rejected").read_text()


def test_damaged_files_are_reported_by_line_and_quarantined_after_their_good_rows(
    tmp_path: Path,
) -> None:
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % (i * 7919) for i in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b'{"prompt": "p"}\n')
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases: list[tuple[str, Kind, str]] = [
        (
            "cut.jsonl.gz",
            "prompts",
            r"cut\.jsonl\.gz:[0-9]{4}: the gzip data is truncated or damaged here; copy",
        ),
        ("not.jsonl.gz", "prompts", r"not\.jsonl\.gz:1: cannot be read \(Not a gzipped file"),
        (
            "empty.jsonl",
            "prompts",
            r"empty\.jsonl:1: the file has no record; check how it was made, or set on_error",
        ),
        ("latin.txt", "text", r"latin\.txt:2: byte 4 is not UTF-8; convert the file"),
    ]
    for name, kind, message in cases:
        with pytest.raises(UserError, match=message) as error:
            list(read_records(tmp_path / name, kind))
        assert "\n" not in str(error.value)
        counts = Counts()
        records = list(
            read_records(tmp_path / name, kind, "quarantine", tmp_path / "rejected.jsonl", counts)
        )
        assert (counts.read - len(records), counts.rejected) == (1, 1)
        assert (len(records) > 1000) == (name == "cut.jsonl.gz")
        assert json.loads((tmp_path / "rejected.jsonl").read_text())["reason"] in str(error.value)


def test_paths_without_records_raise_even_with_quarantine(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\np\n")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "state.json").write_text("[]")
    cases = [
        ("none.jsonl", "no such file; check the path"),
        ("a.csv", r"unknown kind of file for records; expected a name ending in \.jsonl"),
        ("a.txt", r"unknown kind of file for records"),
        ("dict", r"dict: holds the splits train; give one of them, such as .*dict/train"),
        (
            "dict/train",
            r"a folder without state\.json; expected a file, or a data set written by save_to_disk",
        ),
        ("odd", r"state\.json:1: does not name the data files"),
    ]
    for name, message in cases:
        with pytest.raises(UserError, match=message) as error:
            list(read_records(tmp_path / name, "prompts", "quarantine"))
        assert "\n" not in str(error.value)


def test_data_sets_saved_by_hugging_face_are_read(tmp_path: Path) -> None:
    """`datasets` 4 writes arrow streams and a state.json with their order."""
    pa = pytest.importorskip("pyarrow", reason="arrow is read with pyarrow")
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, start in zip(names, (0, 3000), strict=True):
        table = pa.table(
            {"prompt": [f"p{i}" for i in range(start, start + 3000)], "user_id": list(range(3000))}
        )
        with (
            pa.OSFile(str(tmp_path / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=1000)
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    records = list(read_records(tmp_path, "prompts"))
    assert [record.prompt for record in records] == [f"p{i}" for i in range(6000)]
    assert records[3001].user_id == "1"
    with (
        pa.OSFile(str(tmp_path / "one.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    assert list(read_records(tmp_path / "one.arrow", "prompts")) == records[3000:]
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-2000])
    with pytest.raises(
        UserError, match=r"data-00001-of-00002\.arrow:[0-9]+: not readable as arrow \("
    ):
        list(read_records(tmp_path, "prompts"))


def test_parquet_without_pyarrow_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow; run pip install pyarrow, or convert"):
        list(read_records(tmp_path / "a.parquet", "prompts"))


def test_damaged_parquet_gives_a_one_line_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet is read with pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match=r"a\.parquet:1: not readable as parquet \(") as error:
        list(read_records(tmp_path / "a.parquet", "prompts"))
    assert "\n" not in str(error.value)
