"""Inputs of data: record files, parquet, .bin/.idx pairs and tokenizer folders."""

from __future__ import annotations

import functools
import gzip
import json
import random
import struct
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.mutations import (
    EXTREMES,
    copy_folder,
    mutate_bytes,
    mutate_file,
    mutate_text,
    mutate_tree,
    tree_text,
)
from fuzz.outcomes import Case, Target

from fastrlhf.data.foreign_errors import EncodeError
from fastrlhf.data.indexed import write_indexed
from fastrlhf.data.pretrain import TokenStream
from fastrlhf.data.records import Kind, Ranking, read_records
from fastrlhf.data.token_ids import largest_id
from fastrlhf.data.tokenize import encode_plain, load_tokenizer, train_bpe, try_encode_prompts

TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "caf\u00e9 \U0001f600"}]
ROWS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "demonstrations": ("demonstrations", {"prompt": "p", "response": "r", "user_id": "u"}),
    "rankings": (
        "rankings",
        {"prompt": TURNS, "responses": ["a", "b", "c"], "ranks": [1, 2, 2.5], "labeler_id": 3},
    ),
    "pairs": ("rankings", {"prompt": "p", "chosen": "a", "rejected": "b", "note": {"x": [1]}}),
    "prompts": ("prompts", {"prompt": TURNS, "user_id": 7, "level": 3}),
    "text": ("text", {"text": "a document. " * 20}),
}
CORPUS = ["the cat sat on the mat. ", "a dog ran after the cat.\n", "user: hi\nassistant: hi\n"] * 4
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@functools.cache
def originals() -> Path:
    """Return a folder, made once, with a tokenizer and a .bin/.idx pair."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    train_bpe(CORPUS, 300, folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in CORPUS))
    write_indexed(folder / "text.jsonl", _tokenizer(folder), folder / "text")
    return folder


@functools.cache
def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder / "tokenizer")


def check_records(expected: list[dict[str, Any]], records: list[Any]) -> None:
    """Check records against the rows of a plain parse."""
    assert len(records) == len(expected), (len(records), len(expected))
    for row, record in zip(expected, records, strict=True):
        pair = isinstance(record, Ranking) and "responses" not in row
        if pair:
            assert record.responses == (row["chosen"], row["rejected"])
            assert record.ranks == (1, 2)
        for name, value in vars(record).items():
            if name == "columns" or (pair and name in ("responses", "ranks")):
                continue
            given = row.get(name)
            value = list(value) if isinstance(value, tuple) else value
            if name.endswith("_id") and given is not None:
                given = str(given)
            if name == "prompt" and isinstance(given, list):  # turns may have other keys
                given = [{key: turn[key] for key in ("role", "content")} for turn in given]
            assert value == given, (name, value, given)


def make_records(rng: random.Random, folder: Path) -> Case:
    """Write a record file as .jsonl, .jsonl.gz or a .json array; one row or the text is changed."""
    kind, good = ROWS[rng.choice(list(ROWS))]
    suffix = rng.choice((".jsonl", ".jsonl", ".jsonl.gz", ".json", ".json.gz"))
    path = folder / f"data{suffix}"
    rows = [good, mutate_tree(good, rng), good]
    texts = [tree_text(row) for row in rows]
    array = ".json" in suffix.split("l")[0] and "l" not in suffix
    content = ("[" + ",\n".join(texts) + "]" if array else "\n".join(texts) + "\n").encode()
    how = rng.randrange(10)
    if how >= 6:
        texts = [tree_text(good)] * 3
        content = ("[" + ",\n".join(texts) + "]" if array else "\n".join(texts) + "\n").encode()
        content = mutate_text(content, rng) if how < 9 else content
    packed = gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content
    changed = suffix.endswith(".gz") and rng.random() < 0.3
    path.write_bytes(mutate_bytes(packed, rng) if changed else packed)
    if how == 9 and not changed:
        mutate_file(path, rng)

    def check(records: list[Any]) -> None:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if suffix.endswith(".gz") else raw).decode("utf-8-sig")
        if array and text.lstrip().startswith("["):
            expected = json.loads(text)
        else:
            expected = [json.loads(line) for line in text.split("\n") if line.strip()]
        check_records(expected, records)

    return Case(lambda: list(read_records(path, kind)), check, [str(path)], f"{kind} {suffix}")


def make_parquet(rng: random.Random, folder: Path) -> Case:
    """Write a parquet or arrow file: a column of another type, or changed bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, good = ROWS[rng.choice(list(ROWS))]
    path = folder / rng.choice(("data.parquet", "data.arrow"))
    columns = {name: pa.array([value] * 3) for name, value in good.items()}
    if rng.random() < 0.5:
        name = rng.choice([*columns, "more"])
        odd = [
            pa.array([b"\xff\xfe", b"", None]),
            pa.array([2**63] * 3, pa.uint64()),
            pa.array([1.5, float("nan"), None]),
            pa.array([0, 2**45, -(2**45)], pa.timestamp("s")),
            pa.array([0, 2**62, -1], pa.timestamp("ns", "Nowhere/Zone")),
            pa.array([2**31 - 1, 0, -(2**31)], pa.date32()),
            pa.array([2**62, 0, 1], pa.duration("us")),
            pa.array(["a", "", " "]).dictionary_encode(),
            pa.nulls(3),
            pa.array([{"a": 1}, None, {"a": 2}]),
            pa.array([[("k", 1), ("k", 2)], [], None], pa.map_(pa.string(), pa.int32())),
            pa.array([["x", None], [], None]),
            pa.array([True, None, False]),
        ]
        columns[name] = rng.choice(odd)
        if rng.random() < 0.2:
            del columns[rng.choice(list(columns))]
    names = list(columns)
    if names and rng.random() < 0.1:
        names[0] = names[-1]  # a name twice
    table = pa.table(list(columns.values()), names=names)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    content = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(mutate_bytes(content, rng))
    elif rng.random() < 0.2:
        mutate_file(path, rng)

    def check(records: list[Any]) -> None:
        if path.suffix == ".parquet":
            rows = pq.ParquetFile(path).read().to_pylist()
        else:
            rows = pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()
        check_records(rows, records)

    return Case(lambda: list(read_records(path, kind)), check, [str(path)], f"{kind} {path.suffix}")


_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}


def make_indexed(rng: random.Random, folder: Path) -> Case:
    """Write a .bin/.idx pair with changed bytes, header fields or documents."""
    source = originals()
    paths = {}
    for name in ("bin", "idx"):
        paths[name] = folder / f"text.{name}"
        paths[name].write_bytes((source / f"text.{name}").read_bytes())
    path = paths[rng.choice(("bin", "idx", "idx"))]
    content = path.read_bytes()
    how = rng.randrange(10)
    if how < 4 and path.suffix == ".idx":
        at = rng.choice((9, 17, 18, 26, 34, 38, len(content) - 8, rng.randrange(9, len(content))))
        number = rng.choice(
            (0, 1, 2, 3, 6, 7, 8, 9, 255, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
        )
        field = number.to_bytes(8, "little")[: 1 if at == 17 else rng.choice((4, 8))]
        path.write_bytes(content[:at] + field + content[at + len(field) :])
    elif how < 8:
        path.write_bytes(mutate_bytes(content, rng))
    elif how == 8:
        mutate_file(path, rng)
    given = rng.choice((folder / "text.bin", folder / "text.idx", folder / "text"))

    def check(stream: TokenStream) -> None:
        head = paths["idx"].read_bytes()
        code, sequences = struct.unpack_from("<BQ", head, 17)
        tokens = np.fromfile(paths["bin"], dtype=_DTYPES[code])
        lengths = np.frombuffer(head, "<i4", sequences, 34)
        assert int(lengths.sum()) == len(tokens)
        assert len(stream.parts) == 1 and np.array_equal(stream.parts[0], tokens)
        assert tokens.min() >= 0 and tokens.max() <= largest_id(_tokenizer(source))

    tokenizer = _tokenizer(source)
    names = [str(paths["bin"]), str(paths["idx"]), str(given)]
    run = partial(TokenStream.open, given, tokenizer, folder / "cache")
    return Case(run, check, names, f"{path.suffix} {how}")


_TEMPLATES = [
    *(
        "{{",
        "{% for %}",
        "{{ messages[99].content }}",
        "{{ 1 // 0 }}",
        "{{ messages | attr('x')() }}",
    ),
    *("{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ 'a' * 10**9 }}", "{% include 'x' %}"),
    *("{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ messages }}", "", " ", "\0"),
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
]


def make_tokenizer(rng: random.Random, folder: Path) -> Case:
    """Write a tokenizer folder of which one file is changed."""
    source = originals() / "tokenizer"
    copied = copy_folder(source, folder / "tokenizer")
    path = rng.choice(sorted(copied.iterdir()))
    content = path.read_bytes()
    how = rng.randrange(10)
    if how < 5 and path.suffix == ".json":
        extremes = [*EXTREMES, *_TEMPLATES, "LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer"]
        path.write_text(tree_text(mutate_tree(json.loads(content), rng, extremes)))
    elif how == 5:
        path = copied / "tokenizer_config.json"
        tree = {**json.loads(path.read_text()), "chat_template": rng.choice(_TEMPLATES)}
        path.write_text(tree_text(tree))
    elif how < 8:
        path.write_bytes(mutate_text(content, rng))
    elif how == 8:
        mutate_file(path, rng)
    untouched = path.name != "tokenizer.json"

    def run() -> tuple[Any, list[Any]]:
        tokenizer = load_tokenizer(copied)
        plain = encode_plain(tokenizer, [CORPUS[0]])
        chats = try_encode_prompts(tokenizer, ["hello", TURNS])
        ids = [chat if isinstance(chat, EncodeError) else chat[0] for chat in chats]
        return tokenizer, [*plain, *ids]

    def check(result: tuple[Any, list[Any]]) -> None:
        tokenizer, encoded = result
        for ids in encoded:
            if isinstance(ids, EncodeError):
                assert str(ids) and "\n" not in str(ids)
                continue
            assert all(type(i) is int and 0 <= i <= largest_id(tokenizer) for i in ids), ids
        if untouched and type(tokenizer) is type(_tokenizer(originals())):
            assert tokenizer.backend_tokenizer.get_vocab_size(False)
            assert tokenizer.decode(encoded[0]) == CORPUS[0], tokenizer.decode(encoded[0])

    return Case(run, check, [str(copied)], f"{path.name} {how}")


TARGETS = [
    Target("records", make_records),
    Target("parquet", make_parquet),
    Target("indexed", make_indexed),
    Target("tokenizer", make_tokenizer),
]
