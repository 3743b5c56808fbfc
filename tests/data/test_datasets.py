"""Loading records as tokens: the paper's limits, and counts that add up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.batches import pack_demonstrations
from fastrlhf.data.datasets import load_demonstrations, load_prompts, load_rankings
from fastrlhf.data.records import Counts
from fastrlhf.data.tokenize import encode_prompt, encode_response, load_tokenizer, read_prefix
from fastrlhf.errors import UserError

LONG = "the cat sat on the mat. " * 20


def test_demonstrations_are_prompt_response_eos(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    path = jsonl(
        {"prompt": "hello", "response": "hi there"},
        {"prompt": LONG, "response": "dropped"},
        {"prompt": "hello", "response": LONG},
    )
    loaded, counts = load_demonstrations(
        path, tokenizer, max_prompt_tokens=20, max_response_tokens=20
    )
    prompt, response = encode_prompt(tokenizer, "hello"), encode_response(tokenizer, "hi there")
    assert loaded[0].tokens == prompt + response
    assert loaded[0].prompt_length == len(prompt)
    assert loaded[1].tokens == prompt + encode_response(tokenizer, LONG)[:20]
    assert loaded[1].tokens[-1] != tokenizer.eos_token_id
    assert counts == Counts(read=3, kept=2, long_prompts=1, cut_responses=1)


def test_a_response_that_just_fits_keeps_its_eos(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    path = jsonl({"prompt": "hello", "response": "hi there"})
    whole = encode_response(tokenizer, "hi there")
    for limit, expected in ((len(whole), whole), (len(whole) - 1, whole[:-1])):
        (loaded,), _ = load_demonstrations(
            path, tokenizer, max_prompt_tokens=20, max_response_tokens=limit
        )
        assert loaded.tokens[loaded.prompt_length :] == expected
    prompt = encode_prompt(tokenizer, "hello")
    assert (
        len(load_prompts(jsonl({"prompt": "hello"}), tokenizer, max_prompt_tokens=len(prompt))[0])
        == 1
    )


def test_rankings_keep_each_prompts_responses(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    path = jsonl(
        {"prompt": LONG, "responses": ["x", "y", "z"], "ranks": [1, 2, 3]},
        {"prompt": "hello", "responses": ["hi", LONG], "ranks": [2, 1]},
        {"prompt": "a dog", "chosen": "ran", "rejected": "sat"},
    )
    loaded, counts = load_rankings(path, tokenizer, max_prompt_tokens=20, max_response_tokens=9)
    assert [ranking.prompt_tokens for ranking in loaded] == [
        encode_prompt(tokenizer, p) for p in ("hello", "a dog")
    ]
    assert loaded[0].responses == [
        encode_response(tokenizer, "hi"),
        encode_response(tokenizer, LONG)[:9],
    ]
    assert loaded[1].responses == [
        encode_response(tokenizer, "ran"),
        encode_response(tokenizer, "sat"),
    ]
    assert [ranking.ranks for ranking in loaded] == [(2, 1), (1, 2)]
    assert counts == Counts(read=3, kept=2, long_prompts=1, cut_responses=1)


def test_counts_are_logged_and_rejected_records_counted(
    jsonl: Callable[..., Path], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl({"prompt": "hello"}, {"prompt": ""}, {"prompt": LONG})
    with caplog.at_level(logging.INFO, logger="fastrlhf"):
        loaded, counts = load_prompts(path, tokenizer, max_prompt_tokens=20, on_error="quarantine")
    assert loaded == [encode_prompt(tokenizer, "hello")]
    assert counts == Counts(read=3, kept=1, rejected=1, long_prompts=1)
    message = "kept 1 of 3 records (1 malformed and set aside, 1 dropped for a long prompt)"
    assert f"{path}: {message}" in caplog.messages


def test_no_usable_record_is_an_error(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"no usable record \(kept 0 of 1 records \(1 dropped for a long prompt\)"
    ):
        load_prompts(jsonl({"prompt": LONG}), tokenizer, max_prompt_tokens=20)
    with pytest.raises(UserError, match=r"data\.jsonl:1: the file has no record"):
        load_prompts(jsonl(), tokenizer, max_prompt_tokens=20)


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": "ran"},
    {"role": "user", "content": "the mat"},
]


@pytest.mark.parametrize("template", [None, CHATML])
def test_the_loss_may_cover_every_turn_of_the_assistant(
    jsonl: Callable[..., Path], tokenizer_folder: Path, template: str | None
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = template
    path = jsonl({"prompt": TURNS, "response": "hi"}, {"prompt": "the cat", "response": "sat"})
    options: dict[str, Any] = {"max_prompt_tokens": 200, "max_response_tokens": 20}
    shown = {}
    for loss_on in ("last", "all"):
        (chat, plain), _ = load_demonstrations(path, tokenizer, loss_on=loss_on, **options)
        batch = pack_demonstrations([plain, chat])
        own = batch.labels[batch.loss_mask].tolist()
        shown[loss_on] = tokenizer.decode(own[len(plain.tokens) - plain.prompt_length :])
        assert plain.trained == ()
    # Without a template the token after "assistant:" is the word with its space.
    space, end = ("", "<|end|>") if template else (" ", "\n")
    assert shown["last"] == "hi<|endoftext|>"
    assert shown["all"] == f"{space}sat on{end}{space}ran{end}hi<|endoftext|>"


def test_a_template_that_rewrites_turns_is_rejected_for_loss_on_all(
    jsonl: Callable[..., Path], tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    last = "{% if loop.last %}[{{ m.content }}]{% else %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + last + "{% endfor %}"
    path = jsonl({"prompt": TURNS, "response": "hi"})
    options: dict[str, Any] = {"max_prompt_tokens": 200, "max_response_tokens": 20}
    assert len(load_demonstrations(path, tokenizer, **options)[0]) == 1
    with pytest.raises(
        UserError,
        match=r"formats turn 2 of a prompt differently when more turns follow; use data.loss_on",
    ):
        load_demonstrations(path, tokenizer, loss_on="all", **options)


def test_a_prefix_is_prepended_to_each_prompt_and_counts(
    jsonl: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "prefix.txt").write_text("the cat sat.\n\n")
    prefix = read_prefix(tmp_path / "prefix.txt")
    path = jsonl({"prompt": "a dog"}, {"prompt": "the mat"})
    prompts, _ = load_prompts(path, tokenizer, max_prompt_tokens=50, prefix=prefix)
    assert [tokenizer.decode(ids) for ids in prompts] == [
        "the cat sat.\n\na dog",
        "the cat sat.\n\nthe mat",
    ]
    with pytest.raises(UserError, match="2 dropped for a long prompt"):
        load_prompts(path, tokenizer, max_prompt_tokens=len(prompts[0]) - 2, prefix=prefix)
    assert read_prefix(None) == ""
    with pytest.raises(UserError, match="cannot be read as the prompt prefix"):
        read_prefix(tmp_path / "none.txt")
