"""Damaged and foreign tokenizer folders: one line with the name; OpenAI's GPT-2 files load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.tokenize import encode_plain, largest_id, load_tokenizer
from fastrlhf.errors import UserError

# (file, the keys of the value that is replaced, the new value)
DAMAGES: list[tuple[str, list[Any], Any]] = [
    ("tokenizer.json", [], []),
    ("tokenizer.json", [], None),
    ("tokenizer.json", [], {}),
    ("tokenizer.json", ["model"], None),
    ("tokenizer.json", ["model"], {}),
    ("tokenizer.json", ["model", "type"], "Unknown"),
    ("tokenizer.json", ["model", "vocab"], []),
    ("tokenizer.json", ["model", "vocab"], {"a": "x"}),
    ("tokenizer.json", ["model", "vocab"], {"a": -1}),
    ("tokenizer.json", ["model", "vocab"], {}),
    ("tokenizer.json", ["model", "merges"], [["q", "qq"]]),
    ("tokenizer.json", ["model", "merges"], 7),
    ("tokenizer.json", ["pre_tokenizer"], {"type": "Unknown"}),
    ("tokenizer.json", ["decoder"], 3),
    ("tokenizer.json", ["added_tokens"], {}),
    ("tokenizer.json", ["added_tokens"], [{"id": "x"}]),
    ("tokenizer.json", ["version"], "9.9"),
    ("tokenizer_config.json", [], []),
    ("tokenizer_config.json", [], "text"),
    ("tokenizer_config.json", ["tokenizer_class"], 5),
    ("tokenizer_config.json", ["eos_token"], 5),
    ("tokenizer_config.json", ["eos_token"], []),
    ("tokenizer_config.json", ["eos_token"], {"content": 5}),
    ("tokenizer_config.json", ["eos_token"], None),
    ("tokenizer_config.json", ["added_tokens_decoder"], 5),
    ("tokenizer_config.json", ["added_tokens_decoder"], {"x": {}}),
    ("tokenizer_config.json", ["extra_special_tokens"], 5),
    ("tokenizer_config.json", ["chat_template"], 5),
    ("tokenizer_config.json", ["chat_template"], [1, 2]),
    ("tokenizer_config.json", ["chat_template"], {"tool_use": 5}),
    ("tokenizer_config.json", ["model_max_length"], "many"),
]


@pytest.mark.parametrize(("name", "keys", "value"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_folder_loads_or_is_one_line(
    tmp_path: Path, tokenizer_folder: Path, name: str, keys: list[Any], value: Any
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tokenizer_folder, folder)
    content = json.loads((folder / name).read_text())
    *path, last = keys or [None]
    inner = content
    for key in path:
        inner = inner[key]
    if keys:
        inner[last] = value
    (folder / name).write_text(json.dumps(content if keys else value))
    try:
        encode_plain(load_tokenizer(folder), ["the cat"])
    except UserError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"\xff\xfe", r"tokenizer\.json: not valid JSON"),
        ("tokenizer.json", b"[" * 100_000, r"tokenizer\.json: not valid JSON \(RecursionError"),
        (
            "tokenizer_config.json",
            b"[]",
            r"_config\.json: not valid JSON \(a list, expected an obj",
        ),
        ("special_tokens_map.json", b"{", r"special_tokens_map\.json: not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, tokenizer_folder: Path, name: str, content: bytes, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tokenizer_folder, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def openai_files(folder: Path) -> Path:
    """Write a small tokenizer in the layout of OpenAI's GPT-2: bytes, two merges, end of text."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir()
    tokens = [*sorted(ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
    encoder = {token: number for number, token in enumerate(tokens)}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    return folder


def test_openais_gpt2_files_are_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(openai_files(tmp_path / "gpt2"))
    assert (len(tokenizer), largest_id(tokenizer), tokenizer.eos_token_id) == (259, 258, 258)
    (ids,) = encode_plain(tokenizer, ["the hat<|endoftext|>é"])
    assert ids[0] == 257
    assert 258 not in ids
    assert tokenizer.decode(ids) == "the hat<|endoftext|>é"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert encode_plain(load_tokenizer(tmp_path / "saved"), ["the hat"]) == encode_plain(
        tokenizer, ["the hat"]
    )


def test_damaged_gpt2_files_are_one_line(tmp_path: Path) -> None:
    folder = openai_files(tmp_path / "gpt2")
    (folder / "vocab.bpe").write_text("#version: 0.2\nq qqq\n")
    with pytest.raises(UserError, match=r"gpt2: not a tokenizer folder \(.*qqq") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    (folder / "vocab.bpe").unlink()
    with pytest.raises(UserError, match=r"has encoder\.json without vocab\.bpe"):
        load_tokenizer(folder)
