"""Loading records as tokens: the paper's limits, and counts that add up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.datasets import load_demonstrations, load_prompts, load_rankings
from fastrlhf.data.records import Counts
from fastrlhf.data.tokenize import encode_prompt, encode_response
from fastrlhf.errors import UserError

LONG = "the cat sat on the mat. " * 20


def test_demonstrations_are_prompt_response_eos(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    path = jsonl(
        {"prompt": "hello", "response": "hi there"},
        {"prompt": LONG, "response": "dropped"},
        {"prompt": "hello", "response": LONG},
    )
    loaded, counts = load_demonstrations(path, tokenizer, max_prompt_tokens=20, max_response_tokens=20)
    prompt, response = encode_prompt(tokenizer, "hello"), encode_response(tokenizer, "hi there")
    assert loaded[0].tokens == prompt + response
    assert loaded[0].prompt_length == len(prompt)
    assert loaded[1].tokens == prompt + encode_response(tokenizer, LONG)[:20]
    assert loaded[1].tokens[-1] != tokenizer.eos_token_id
    assert counts == Counts(read=3, kept=2, long_prompts=1, cut_responses=1)


def test_a_response_that_just_fits_keeps_its_eos(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    path = jsonl({"prompt": "hello", "response": "hi there"})
    whole = encode_response(tokenizer, "hi there")
    for limit, expected in ((len(whole), whole), (len(whole) - 1, whole[:-1])):
        (loaded,), _ = load_demonstrations(path, tokenizer, max_prompt_tokens=20, max_response_tokens=limit)
        assert loaded.tokens[loaded.prompt_length :] == expected
    prompt = encode_prompt(tokenizer, "hello")
    assert len(load_prompts(jsonl({"prompt": "hello"}), tokenizer, max_prompt_tokens=len(prompt))[0]) == 1


def test_rankings_keep_each_prompts_responses(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    path = jsonl(
        {"prompt": LONG, "responses": ["x", "y", "z"], "ranks": [1, 2, 3]},
        {"prompt": "hello", "responses": ["hi", LONG], "ranks": [2, 1]},
        {"prompt": "a dog", "chosen": "ran", "rejected": "sat"},
    )
    loaded, counts = load_rankings(path, tokenizer, max_prompt_tokens=20, max_response_tokens=9)
    assert [ranking.prompt_tokens for ranking in loaded] == [encode_prompt(tokenizer, p) for p in ("hello", "a dog")]
    assert loaded[0].responses == [encode_response(tokenizer, "hi"), encode_response(tokenizer, LONG)[:9]]
    assert loaded[1].responses == [encode_response(tokenizer, "ran"), encode_response(tokenizer, "sat")]
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
    told = "kept 1 of 3 records (1 malformed and set aside, 1 dropped for a long prompt)"
    assert f"{path}: {told}" in caplog.messages


def test_no_usable_record_is_an_error(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"no usable record \(kept 0 of 1 records \(1 dropped for a long prompt\)"):
        load_prompts(jsonl({"prompt": LONG}), tokenizer, max_prompt_tokens=20)
    with pytest.raises(UserError, match=r"no usable record \(kept 0 of 0 records; the prompt limit"):
        load_prompts(jsonl(), tokenizer, max_prompt_tokens=20)
