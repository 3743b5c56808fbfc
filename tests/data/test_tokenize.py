"""Chat templates, eos, byte-level BPE, and errors for unusable tokenizer folders."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.data.records import Turn
from fastrlhf.data.tokenize import (
    encode_plain,
    encode_prompt,
    encode_response,
    load_tokenizer,
    prompt_text,
    train_bpe,
)
from fastrlhf.errors import UserError

TURNS: list[Turn] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


CORPUS = [
    "the cat sat on the mat. ",
    "a dog ran after the cat.\n",
    "user: hello\nassistant: hi there\n",
] * 4


def test_trained_bpe_has_the_vocabulary_size_and_is_deterministic(
    tmp_path: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    assert len(tokenizer) == 297  # all merges that the small corpus gives
    train_bpe(CORPUS, 270, tmp_path / "merged")
    assert len(load_tokenizer(tmp_path / "merged")) == 270
    train_bpe(CORPUS, 300, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        tokenizer_folder / "tokenizer.json"
    ).read_bytes()
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    train_bpe(iter(["ab" * 50]), 257, tmp_path / "bytes")
    bytes_only = load_tokenizer(tmp_path / "bytes")
    assert len(bytes_only) == 257
    assert len(encode_plain(bytes_only, ["abé"])[0]) == 4
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(["a"], 256, tmp_path / "small")


@given(text=st.text(max_size=60))
def test_any_text_survives_the_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(encode_plain(tokenizer, [text])[0]) == text


def test_a_string_prompt_is_encoded_as_it_is(tokenizer: Any) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, "the cat")) == "the cat"
    assert tokenizer.eos_token_id in encode_prompt(tokenizer, "one<|endoftext|>two")


def test_turns_without_a_chat_template_become_lines(tokenizer: Any) -> None:
    assert prompt_text(TURNS) == "system: be kind\nuser: hello\n"
    assert prompt_text("as it is") == "as it is"
    assert encode_prompt(tokenizer, TURNS) == encode_prompt(
        tokenizer, "system: be kind\nuser: hello\n"
    )


def test_turns_use_the_chat_template_which_opens_the_answer(tokenizer: Any) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = encode_prompt(chat, TURNS)
    assert chat.decode(ids) == "<system>be kind<|endoftext|><user>hello<|endoftext|><assistant>"
    assert ids.count(chat.eos_token_id) == 2
    assert encode_prompt(chat, "plain") == encode_prompt(tokenizer, "plain")
    with pytest.raises(UserError, match="rejects a prompt with turns user, tool: no tools"):
        encode_prompt(chat, [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}])


def test_a_response_ends_in_exactly_one_eos(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    ids = encode_response(tokenizer, "hi there")
    assert ids[-1] == eos
    assert tokenizer.decode(ids[:-1]) == "hi there"
    assert encode_response(tokenizer, "hi there<|endoftext|>") == ids
    assert encode_response(tokenizer, "hi <|endoftext|> there").count(eos) == 1


def test_unusable_tokenizer_folders_give_one_line_errors(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    broken, no_eos, empty = tmp_path / "broken", tmp_path / "no_eos", tmp_path / "empty"
    shutil.copytree(tokenizer_folder, broken)
    whole = (broken / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(whole[: len(whole) // 2])
    shutil.copytree(tokenizer_folder, no_eos)
    config = json.loads((no_eos / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (no_eos / "tokenizer_config.json").write_text(json.dumps(config))
    empty.mkdir()
    for folder, message in (
        (tmp_path / "none", "no such tokenizer folder; expected one saved by transformers"),
        (broken, r"tokenizer\.json: not valid JSON \(.*\); copy the file again"),
        (no_eos, 'no eos token; set "eos_token" in its tokenizer_config.json'),
        (empty, r"not a tokenizer folder \(it has no tokenizer.json\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(folder)
        assert "\n" not in str(error.value)
