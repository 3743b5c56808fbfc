"""Token ids outside the vocabulary: tokenizers with gaps, and files of tokens, read completely."""

from __future__ import annotations

import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrlhf.data import token_ids
from fastrlhf.data.indexed import write_indexed
from fastrlhf.data.pretrain import TokenStream
from fastrlhf.data.tokenize import check_ids, encode_plain, largest_id, load_tokenizer
from fastrlhf.errors import UserError


@pytest.fixture
def gapped(tmp_path: Path, tokenizer_folder: Path) -> Any:
    """Return the small tokenizer with one more token, whose id is 5000."""
    folder = tmp_path / "gapped"
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 5000
    content["model"]["merges"].append(["z", "z"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_the_largest_id_counts_not_the_number_of_tokens(gapped: Any, tokenizer: Any) -> None:
    assert (len(gapped), largest_id(gapped)) == (298, 5000)
    assert (len(tokenizer), largest_id(tokenizer)) == (297, 296)
    check_ids(largest_id(gapped), 5001, "the tokenizer", "use another")
    with pytest.raises(UserError, match=r"id 5000, but the vocabulary has 5000 .*0 to 4999\); use"):
        check_ids(largest_id(gapped), 5000, "the tokenizer", "use another")


def test_files_hold_ids_above_the_number_of_tokens(gapped: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("zz")
    (tokens,) = TokenStream.open(tmp_path / "text.txt", gapped, tmp_path / "cache").parts
    assert tokens.tolist() == [5000, gapped.eos_token_id]


def written(folder: Path, tokenizer: Any) -> tuple[Path, np.ndarray]:
    (folder / "text.txt").write_text("the cat sat on the mat. " * 4)
    write_indexed(folder / "text.txt", tokenizer, folder / "out")
    tokens = np.fromfile(folder / "out.bin", dtype=np.uint16)
    return folder / "out", tokens


@pytest.mark.parametrize("at", [0, 3, -2])
def test_every_token_of_a_file_is_checked(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(token_ids, "_BLOCK", 5)  # as 2^24 tokens of a large file
    prefix, tokens = written(tmp_path, tokenizer)
    TokenStream.open(prefix, tokenizer, tmp_path)
    kept = json.loads((tmp_path / "out.bin.ids.json").read_text())
    assert (kept["smallest"], kept["largest"]) == (int(tokens.min()), int(tokens.max()))
    tokens[at] = 60000
    tokens.tofile(tmp_path / "out.bin")
    os.utime(tmp_path / "out.bin", ns=(1, 1))  # the kept result is of another file
    for _ in range(2):
        with pytest.raises(UserError, match=r"out\.bin: holds token 60000, but the tokenizer has"):
            TokenStream.open(prefix, tokenizer, tmp_path)


def test_the_kept_range_is_used_and_may_be_damaged(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, _ = written(tmp_path, tokenizer)
    TokenStream.open(prefix, tokenizer, tmp_path)
    kept = tmp_path / "out.bin.ids.json"
    good = kept.read_text()
    for damaged in ("", "[]", "{}", good.replace("largest", "other"), good.replace('": ', '": "x')):
        kept.write_text(damaged)
        TokenStream.open(prefix, tokenizer, tmp_path)
        assert kept.read_text() == good
    monkeypatch.setattr(token_ids, "_BLOCK", None)  # reading the tokens again would fail
    TokenStream.open(prefix, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, r"out\.bin: is empty"),
        (1, r"out\.bin: has 1 bytes, expected a multiple of 2"),
        (7, r"out\.bin: has 7 bytes, expected a multiple of 2"),
        (8, r"out\.bin: has 4 tokens, expected \d+ by its index"),
    ],
)
def test_a_truncated_file_is_one_line(
    tmp_path: Path, tokenizer: Any, size: int, message: str
) -> None:
    prefix, _ = written(tmp_path, tokenizer)
    whole = (tmp_path / "out.bin").read_bytes()
    (tmp_path / "out.bin").write_bytes(whole[:size])
    with pytest.raises(UserError, match=message):
        TokenStream.open(prefix, tokenizer, tmp_path)


def test_damaged_indexes_are_one_line_without_a_traceback(
    tmp_path: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix, _ = written(tmp_path, tokenizer)
    whole = (tmp_path / "out.idx").read_bytes()
    capfd.readouterr()
    opened = 0
    for at in range(9, len(whole)):
        for damaged in (whole[:at], whole[:at] + b"\xff" + whole[at + 1 :]):
            (tmp_path / "out.idx").write_bytes(damaged)
            try:  # the pointers, which are not used, may be wrong
                TokenStream.open(prefix, tokenizer, tmp_path)
                opened += 1
            except UserError as error:
                assert re.match(r"[^\n]*out\.(idx|bin): [^\n]*$", str(error))
    assert opened <= 8 * 4  # at most the four numbers that are not used
    gc.collect()
    assert capfd.readouterr().err == ""


def test_a_text_with_the_new_token_is_read_back(gapped: Any) -> None:
    assert encode_plain(gapped, ["zz"]) == [[5000]]
