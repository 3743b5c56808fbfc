"""Two hundred kinds of malformed input: reported with file and line, or quarantined.

Each case is a complete file, with a good record before and after the bad one if the format allows.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.convert import Source, convert
from fastrlhf.data.prepare.prepare import prepare
from fastrlhf.data.records import Counts, Kind, read_records
from fastrlhf.errors import UserError

GOOD: dict[Kind, dict[str, Any]] = {
    "demonstrations": {"prompt": "p", "response": "r", "user_id": "u"},
    "rankings": {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "ranks": [1, 2, 2.5],
        "user_id": "u",
        "labeler_id": "l",
    },
    "prompts": {"prompt": [{"role": "user", "content": "q"}], "user_id": 7},
    "text": {"text": "a document"},
}
WRONG: dict[str, list[Any]] = {
    "text": [None, 3, 2.5, True, [], ["a"], {}, "", " \n\t", "\u2003"],
    "list": [
        None,
        3,
        "ab",
        {},
        [],
        ["a"],
        ["a", 3],
        ["a", None],
        ["a", ""],
        ["a", ["b"]],
        ["a", {"b": 1}],
    ],
    "ranks": [
        None,
        3,
        "12",
        {},
        [],
        [1],
        [1, 2],
        [1, 2, 3, 4],
        [1, 2, "3"],
        [1, 2, None],
        [1, 2, True],
        [1, 2, [3]],
    ],
    "id": [2.5, True, [], ["u"], {}, {"id": "u"}, "", "  "],
    "turns": [[{}], [{"role": "user"}], [{"content": "q"}], ["q"], [None], [3], [["user", "q"]]],
}
WRONG["ranks"] += [
    [1, 2, float("nan")],
    [1, 2, float("inf")],
    [1, 2, float("-inf")],
    [2, 2, 2],
    [1, 2, 10**400],
    [0, -0.0, 0],
]
WRONG["turns"] += [
    [{"role": role, "content": content}]
    for role, content in ((3, "q"), ("", "q"), (None, "q"), ("user", 3), ("user", None))
]
FIELDS: list[tuple[Kind, str, str]] = [
    ("demonstrations", "prompt", "text"),
    ("demonstrations", "response", "text"),
    ("demonstrations", "user_id", "id"),
    ("rankings", "prompt", "turns"),
    ("rankings", "responses", "list"),
    ("rankings", "ranks", "ranks"),
    ("rankings", "labeler_id", "id"),
    ("prompts", "prompt", "turns"),
    ("prompts", "user_id", "id"),
    ("text", "text", "text"),
]
LINES: dict[str, bytes] = {
    "not json": b"prompt",
    "cut": b'{"prompt": "p"',
    "cut string": b'{"prompt": "p',
    "cut escape": b'{"prompt": "p\\',
    "two objects": b'{"prompt": "p"} {"prompt": "p"}',
    "trailing comma": b'{"prompt": "p",}',
    "single quotes": b"{'prompt': 'p'}",
    "no quotes": b'{prompt: "p"}',
    "python": b'{"prompt": None}',
    "comment": b'{"prompt": "p"} // c',
    "list": b'["prompt", "p"]',
    "string": b'"prompt"',
    "number": b"3",
    "null": b"null",
    "true": b"true",
    "nan": b"NaN",
    "empty object": b"{}",
    "other keys": b'{"question": "p"}',
    "key in capitals": b'{"PROMPT": "p"}',
    "twice": b'{"prompt": "p", "prompt": "q"}',
    "twice inside": b'{"prompt": [{"role": "user", "role": "user", "content": "p"}]}',
    "twice unasked": b'{"prompt": "p", "meta": {"a": 1, "a": 2}}',
    "latin-1": b'{"prompt": "caf\xe9"}',
    "overlong utf-8": b'{"prompt": "\xc0\xaf"}',
    "cut utf-8": b'{"prompt": "\xe2\x82"}',
    "encoded surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "utf-8 past unicode": b'{"prompt": "\xf4\x90\x80\x80"}',
    "escaped surrogate": b'{"prompt": "\\ud800"}',
    "escaped low surrogate": b'{"prompt": "\\udc00 x"}',
    "surrogates reversed": b'{"prompt": "\\udc00\\ud800"}',
    "utf-16": '{"prompt": "p"}'.encode("utf-16-be"),
    "utf-32": '{"prompt": "p"}'.encode("utf-32-be"),
    "null byte": b'{"prompt": "a\x00b"}',
    "null bytes": b"\x00" * 40,
    "control character in another key": b'{"pro\\u0000\\u001bmpt": "p"}',
    "control character": b'{"prompt": "a\x07b"}',
    "bad escape": b'{"prompt": "\\x41"}',
    "bad unicode escape": b'{"prompt": "\\u12G4"}',
    "deep lists": b'{"prompt": "p", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"x": ' * 5000 + b"1" + b"}" * 5000,
    "open brackets": b"[" * 100_000,
    "huge number": b'{"prompt": "p", "x": ' + b"9" * 50_000 + b"}",
    "leading zero": b'{"prompt": "p", "x": 01}',
    "plus": b'{"prompt": "p", "x": +1}',
    "hexadecimal": b'{"prompt": "p", "x": 0x1}',
    "byte order mark inside": b'\xef\xbb\xbf{"prompt": "p"}',
    "csv": b"prompt,user_id",
    "xml": b"<prompt>p</prompt>",
    "random": bytes(range(128, 256)),
    "giant": b'{"prompt": "' + b"a" * 3_000_000 + b'"}',
    "giant without json": b"a" * 3_000_000,
}


def json_cases() -> Iterator[Any]:
    for kind, field, wrong in FIELDS:
        good = GOOD[kind]
        if "id" not in field:
            yield pytest.param(
                kind,
                _line({k: v for k, v in good.items() if k != field}),
                id=f"{kind}-{field}-missing",
            )
        for i, value in enumerate(WRONG[wrong]):
            yield pytest.param(kind, _line(good | {field: value}), id=f"{kind}-{field}-{i}")
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for field, value in itertools.product(
        ("chosen", "rejected"), (None, 3, "", ["a"], {"content": "a"})
    ):
        yield pytest.param("rankings", _line(pair | {field: value}), id=f"pair-{field}-{value}")
    for name, line in LINES.items():
        yield pytest.param("prompts", line, id=name)


def _line(row: Any) -> bytes:
    return json.dumps(row).encode()


JSON_CASES = list(json_cases())


@pytest.fixture(autouse=True)
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrlhf.data.files.LONGEST_LINE", 1 << 20)


@pytest.mark.parametrize(("kind", "line"), JSON_CASES)
def test_a_malformed_line(tmp_path: Path, kind: Kind, line: bytes) -> None:
    path, good = tmp_path / "in.jsonl", _line(GOOD[kind])
    path.write_bytes(b"\n".join([good, line, good]))
    check(path, kind, 2, kept=2)


def table(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def arrow_text(offsets: tuple[int, ...]) -> bytes:
    """Return an arrow stream of the prompts abc, def and ghi with other offsets of their texts."""
    content = arrow({"prompt": ["abc", "def", "ghi"]})
    right = struct.pack("<4i", 0, 3, 6, 9)
    assert content.count(right) == 1
    return content.replace(right, struct.pack("<4i", *offsets))


def arrow_time(zone: str) -> bytes:
    import pyarrow as pa

    return arrow({"prompt": ["p"], "when": pa.array([0], pa.timestamp("s", zone))})


def arrow(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa

    file, content = io.BytesIO(), pa.table(columns)
    with pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content)
    return file.getvalue()


def file_cases() -> Iterator[tuple[str, str, bytes, int, int]]:
    """Yield (id, name, content, line of the mistake, good records) of files of prompts."""
    line = _line(GOOD["prompts"]) + b"\n"
    packed = gzip.compress(line * 100, mtime=0)
    yield "empty", "a.jsonl", b"", 1, 0
    yield "blank lines", "a.jsonl", b"\r\n \n\t\n", 1, 0
    yield "only a byte order mark", "a.jsonl", b"\xef\xbb\xbf", 1, 0
    yield "utf-16 with its mark", "a.jsonl", '{"prompt": "p"}'.encode("utf-16"), 1, 0
    yield "old mac line ends", "a.jsonl", line.replace(b"\n", b"\r") * 2, 1, 0
    yield "pretty-printed", "a.jsonl", b"{", 1, 0
    yield "gzip without its name", "a.jsonl", packed[:20], 1, 0
    yield "crlf before the bad line", "a.jsonl", line.replace(b"\n", b"\r\n") * 2 + b"{\r\n", 3, 2
    yield "no gzip", "a.jsonl.gz", line, 1, 0
    yield "empty gzip file", "a.jsonl.gz", b"", 1, 0
    yield "gzip of nothing", "a.jsonl.gz", gzip.compress(b""), 1, 0
    yield "gzip header only", "a.jsonl.gz", packed[:10], 1, 0
    yield "gzip magic only", "a.jsonl.gz", packed[:2], 1, 0
    yield "gzip without its checksum", "a.jsonl.gz", packed[:-8], 101, 100
    yield "gzip with a wrong checksum", "a.jsonl.gz", packed[:-8] + b"\0" * 8, 101, 100
    yield "junk behind the gzip", "a.jsonl.gz", packed + b"junk", 101, 100
    yield "damaged gzip", "a.jsonl.gz", packed[:10] + b"\xff" * 20 + packed[30:], 1, 0
    yield "empty parquet file", "a.parquet", b"", 1, 0
    yield "no parquet", "a.parquet", line, 1, 0
    yield "parquet magic only", "a.parquet", b"PAR1PAR1", 1, 0
    good = table({"prompt": ["p"] * 10})
    yield "cut parquet", "a.parquet", good[: len(good) // 2], 1, 0
    yield "parquet without its footer", "a.parquet", good[:-8], 1, 0
    yield "parquet with a damaged footer", "a.parquet", good[:-60] + b"\xff" * 30 + good[-30:], 1, 0
    yield "parquet without rows", "a.parquet", table({"prompt": []}), 1, 0
    yield "parquet without columns", "a.parquet", table({}), 1, 0
    yield "parquet of other columns", "a.parquet", table({"question": ["p"]}), 1, 0
    yield "parquet of numbers", "a.parquet", table({"prompt": [1]}), 1, 0
    yield "parquet of nulls", "a.parquet", table({"prompt": [None]}), 1, 0
    yield "parquet of bytes", "a.parquet", table({"prompt": [b"p"]}), 1, 0
    yield "parquet of lists", "a.parquet", table({"prompt": [["p"]]}), 1, 0
    yield (
        "parquet with an id of NaN",
        "a.parquet",
        table({"prompt": ["p"], "user_id": [float("nan")]}),
        1,
        0,
    )
    yield "empty arrow file", "a.arrow", b"", 1, 0
    yield "no arrow", "a.arrow", line, 1, 0
    yield "arrow magic only", "a.arrow", b"ARROW1\0\0", 1, 0
    yield "parquet named arrow", "a.arrow", good, 1, 0
    for name, offsets in (("backwards", (0, 6, 3, 9)), ("outside", (0, 3, 6, 2**30))):
        yield f"arrow with text offsets {name}", "a.arrow", arrow_text(offsets), 1, 0
    yield "arrow with an unknown time zone", "a.arrow", arrow_time("Nowhere/Zone"), 1, 0


@pytest.mark.parametrize("case", [pytest.param(case, id=case[0]) for case in file_cases()])
def test_a_malformed_file(tmp_path: Path, case: tuple[str, str, bytes, int, int]) -> None:
    _, name, content, line, kept = case
    (tmp_path / name).write_bytes(content)
    check(tmp_path / name, "prompts", line, kept)


def check(path: Path, kind: Kind, line: int, kept: int) -> None:
    with pytest.raises(UserError) as error:
        list(read_records(path, kind))
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ")
    assert len(message) < len(str(path)) + 400
    assert message.isprintable()
    rejected, counts = path.parent / "rejected.jsonl", Counts()
    records = list(read_records(path, kind, "quarantine", rejected, counts))
    assert (len(records), counts.rejected) == (kept, counts.read - kept)
    first = json.loads(rejected.read_text().splitlines()[0])
    assert first["source"] == f"{path}:{line}"
    assert first["reason"] in message
    assert rejected.stat().st_size < 1_500_000


def test_there_are_two_hundred_kinds() -> None:
    assert len(JSON_CASES) + len(list(file_cases())) >= 200


def test_prepare_and_convert_quarantine_all_malformed_lines(tmp_path: Path) -> None:
    """All bad lines in one file, through the two commands that read foreign data."""
    lines = [case.values[1] for case in JSON_CASES]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([*lines, _line(GOOD["prompts"])]))
    manifest = prepare(path, tmp_path / "out", "prompts", on_error="quarantine")
    assert manifest["read"] == len(lines) + 1
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    # Not all lines: malformed rankings may have valid prompts.
    assert len(rejected) == manifest["dropped"]["malformed"] > 100
    sources: tuple[Source, ...] = ("pairs", "transcripts", "trees")
    kinds: tuple[Kind, ...] = ("rankings", "demonstrations", "prompts")
    for source, kind in itertools.product(sources, kinds):
        counts = convert(path, source, kind, tmp_path / "converted.jsonl", "quarantine")
        assert counts.rejected > 100
