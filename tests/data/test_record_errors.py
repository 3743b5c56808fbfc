"""Errors after parsing: they name file and line, and obey data.on_error, like those in parsing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.datasets import (
    load_demonstrations,
    load_prompt_records,
    load_prompts,
    load_rankings,
    tied_ranks,
)
from fastrlhf.data.indexed import write_indexed
from fastrlhf.data.prepare.prepare import prepare
from fastrlhf.data.prepare.rules import Rules
from fastrlhf.data.pretrain import TokenStream
from fastrlhf.data.records import Counts
from fastrlhf.data.show import show
from fastrlhf.data.tokenize import encode_prompts, encode_response, load_tokenizer
from fastrlhf.errors import UserError

ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
USER = {"role": "user", "content": "the cat"}
FAILING = [  # a template that fails on "bad", and what is said of it
    (ALTERNATING, "roles must alternate"),
    ("{{ 1 // (0 if messages[0].content == 'bad' else 1) }}", "ZeroDivisionError"),
    ("{{ messages[0].content + (1 if messages[0].content == 'bad' else '') }}", "TypeError"),
    ("{{ messages[5 if messages[0].content == 'bad' else 0].content + '' }}", "UndefinedError"),
    ("{{ '' if messages[0].content == 'bad' else 'ok' }}", "empty once tokenized"),
]
LIMITS: dict[str, Any] = {"max_prompt_tokens": 100, "max_response_tokens": 100}


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def bad_turns(template: str) -> list[dict[str, str]]:
    return [USER, USER] if template == ALTERNATING else [{"role": "user", "content": "bad"}]


@pytest.mark.parametrize(("template", "reason"), FAILING, ids=[reason for _, reason in FAILING])
@pytest.mark.parametrize("kind", ["demonstrations", "rankings", "prompts"])
def test_a_templates_refusal_names_the_record_or_sets_it_aside(
    jsonl: Callable[..., Path],
    tmp_path: Path,
    tokenizer: Any,
    template: str,
    reason: str,
    kind: str,
) -> None:
    chat = with_template(tokenizer, template)
    extra: dict[str, Any] = {
        "demonstrations": {"response": "sat"},
        "rankings": {"chosen": "sat", "rejected": "ran"},
        "prompts": {},
    }[kind]
    rows = [{"prompt": turns} | extra for turns in ([USER], bad_turns(template), [USER])]
    path = jsonl(*rows)
    load: Any = {
        "demonstrations": load_demonstrations,
        "rankings": load_rankings,
        "prompts": load_prompts,
    }[kind]
    limits = LIMITS if kind != "prompts" else {"max_prompt_tokens": 100}
    with pytest.raises(UserError, match=rf"^{path}:2: .*{reason}.*on_error") as error:
        load(path, chat, **limits)
    assert "\n" not in str(error.value)
    loaded, counts = load(
        path, chat, **limits, on_error="quarantine", rejected=tmp_path / "rejected.jsonl"
    )
    assert len(loaded) == 2
    assert counts == Counts(read=3, kept=2, rejected=1)
    (entry,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert entry["source"] == f"{path}:2"
    assert reason in entry["reason"]
    assert json.loads(entry["record"]) == rows[1]


def test_prompts_as_records_are_checked_in_the_same_way(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    chat = with_template(tokenizer, ALTERNATING)
    path = jsonl({"prompt": [USER], "user_id": "u"}, {"prompt": [USER, USER]})
    with pytest.raises(UserError, match=rf"^{path}:2: .*roles must alternate"):
        load_prompt_records(path, chat, max_prompt_tokens=9)
    (record,), (tokens,), counts = load_prompt_records(
        path, chat, max_prompt_tokens=9, on_error="quarantine"
    )
    assert (record.user_id, tokens) == ("u", encode_prompts(chat, [[USER]])[0])
    assert counts == Counts(read=2, kept=1, rejected=1)


def test_prepare_and_show_name_the_record_too(
    jsonl: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    with_template(tokenizer, ALTERNATING).save_pretrained(folder)
    path = jsonl({"prompt": [USER]}, {"prompt": [USER, USER]}, {"prompt": "a dog"})
    rules = Rules(tokenizer=str(folder))
    with pytest.raises(UserError, match=rf"^{path}:2: .*roles must alternate"):
        prepare(path, out, "prompts", rules)
    manifest = prepare(path, out, "prompts", rules, "quarantine")
    assert (manifest["read"], manifest["kept"], manifest["dropped"]["malformed"]) == (3, 2, 1)
    assert json.loads((out / "rejected.jsonl").read_text())["source"] == f"{path}:2"
    with pytest.raises(UserError, match=rf"^{path}:2: .*roles must alternate"):
        show(path, load_tokenizer(folder), n=3, max_prompt_tokens=9, max_response_tokens=9)


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_the_tokenizer_has_no_token_for_is_a_records_error(
    jsonl: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"cat": 0, "dog": 1, "<eos>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    path = jsonl({"text": "cat dog"}, {"text": "cat bird"}, {"text": "dog"})
    with pytest.raises(UserError, match=rf"^{path}:2: the tokenizer cannot encode the text: .*UNK"):
        write_indexed(path, tokenizer, tmp_path / "out", workers=workers)
    counts = write_indexed(
        path, tokenizer, tmp_path / "out", workers=workers, on_error="quarantine"
    )
    assert counts == {"documents": 2, "tokens": 5, "rejected": 1}
    assert json.loads((tmp_path / "out.rejected.jsonl").read_text())["source"] == f"{path}:2"
    (tokens,) = TokenStream.open(tmp_path / "out", tokenizer, tmp_path).parts
    assert tokens.tolist() == [0, 1, 2, 1, 2]
    prompts = jsonl({"prompt": "cat"}, {"prompt": "bird"}, name="prompts.jsonl")
    with pytest.raises(UserError, match=rf"^{prompts}:2: the tokenizer cannot encode the text"):
        load_prompts(prompts, tokenizer, max_prompt_tokens=9)
    pairs = jsonl({"prompt": "cat", "chosen": "dog", "rejected": "bird"}, name="pairs.jsonl")
    with pytest.raises(UserError, match=rf"^{pairs}:1: the tokenizer cannot encode the text"):
        load_rankings(pairs, tokenizer, **LIMITS)


@pytest.mark.parametrize("role", ["gpt", "model", "human", "User", "bot"])
def test_unknown_roles_are_refused_with_the_known_ones(
    jsonl: Callable[..., Path], tokenizer: Any, role: str
) -> None:
    turns = [USER, {"role": role, "content": "sat"}, USER]
    path = jsonl({"prompt": [USER], "response": "x"}, {"prompt": turns, "response": "x"})
    known = "system, user, assistant, tool"
    with pytest.raises(UserError, match=rf'^{path}:2: .*unknown role "{role}"; .*{known}'):
        load_demonstrations(path, tokenizer, loss_on="all", **LIMITS)


def test_responses_equal_after_the_limit_are_ties(
    jsonl: Callable[..., Path], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(
        {"prompt": "hello", "chosen": "the cat sat", "rejected": "the cat ran"},
        {
            "prompt": "a dog",
            "responses": ["a dog", "the cat sat", "the cat ran"],
            "ranks": [1, 2, 3],
        },
    )
    limits = {"max_prompt_tokens": 20, "max_response_tokens": 2}
    with caplog.at_level("INFO", logger="fastrlhf"):
        (ranking,), counts = load_rankings(path, tokenizer, **limits)
    assert ranking.responses[1] == ranking.responses[2]
    assert ranking.ranks == (1, 2, 2)
    assert counts == Counts(read=2, kept=1, cut_responses=3, tied_pairs=2, unranked=1)
    assert "1 dropped since their responses are equal" in caplog.text
    assert "2 pairs of equal responses ignored" in caplog.text
    first = jsonl({"prompt": "hello", "chosen": "same", "rejected": "same"}, name="same.jsonl")
    with pytest.raises(UserError, match=r"no usable record .*1 dropped since their responses"):
        load_rankings(first, tokenizer, **LIMITS)


@pytest.mark.parametrize(
    ("responses", "ranks", "expected"),
    [
        ("ab", (1, 2), (1, 2)),
        ("aa", (2, 1), (1, 1)),
        ("abb", (1, 2, 3), (1, 2, 2)),
        ("aba", (1, 2, 3), (1, 1, 1)),  # b is worse and better than the same text
        ("abac", (1, 2, 3, 4), (1, 1, 1, 4)),
        ("abab", (1.5, 2.5, 3.5, 4.5), (1.5, 1.5, 1.5, 1.5)),
        ("aabb", (1, 1, 2, 3), (1, 1, 2, 2)),
    ],
)
def test_ties_reverse_no_pair(
    responses: str, ranks: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    assert tied_ranks(ranks, [[ord(letter)] for letter in responses]) == expected


def test_without_equal_responses_nothing_changes(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    path = jsonl({"prompt": "hello", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]})
    (ranking,), counts = load_rankings(path, tokenizer, **LIMITS)
    assert ranking.ranks == (2, 1, 2)
    assert ranking.responses == [encode_response(tokenizer, text) for text in "xyz"]
    assert counts == Counts(read=1, kept=1)
