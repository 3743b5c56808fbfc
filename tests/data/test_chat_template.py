"""Chat templates are foreign programs: limits of time, output and memory; one line for a failure."""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import pytest

from fastrlhf.data import chat_template
from fastrlhf.data.chat_template import render
from fastrlhf.data.foreign_errors import EncodeError
from fastrlhf.data.records import Turn

USER: Turn = {"role": "user", "content": "the cat"}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
ENDLESS = [
    LOOP + "{% endfor %}{% endfor %}",
    LOOP + "{{ a }}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for c in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set s = namespace(s='x' * 9999) %}{% for i in range(40) %}{% set s.s = s.s ~ s.s %}"
    "{% endfor %}",
]


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "TIME_LIMIT", 0.3)
    monkeypatch.setattr(chat_template, "MEMORY_LIMIT", 100_000)
    start, tracer = time.thread_time(), sys.gettrace()
    with pytest.raises(
        EncodeError, match=r"turns user: (TimeoutError: it ran|MemoryError: it took)"
    ):
        render(with_template(tokenizer, template), [USER])
    assert time.thread_time() - start < 3
    assert sys.gettrace() is tracer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'x' * 2000000 }}", "it printed 2000000 characters, expected at most 1000007"),
        ("{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}", "it printed 2000000 characters"),
        ("{{ 10 ** 10 ** 10 }}", "it computes a power"),
        ("{{ 10 ** messages|length }}", "it computes a power"),
        ("{{ 'x' * 10000000000 }}", "it uses the number 10000000000; expected at most 10000000"),
        ("{{ 'x'|center(10000000000) }}", "it uses the number 10000000000"),
        ("{{ '%9999999999d' % 1 }}", "it formats to a width"),
        ("{{ '{:>9999999999}'.format(1) }}", "it formats to a width"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('first line\nsecond') }}", "user: first line second$"),
        ("{{ messages['x']['y'] }}", "UndefinedError"),
        ("{{ 1 % 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "TypeError"),
    ],
)
def test_other_failures_are_one_line(tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(EncodeError, match=message) as error:
        render(with_template(tokenizer, template), [USER])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '-' * 80 }}{{ 2 ** 10 }}{{ 'x'|center(2000) }}{{ '%5d' % 7 }}{{ '12345678:' }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{{ m }}{% endfor %}",
    ],
)
def test_a_template_within_the_limits_gives_what_transformers_gives(
    tokenizer: Any, template: str
) -> None:
    chat = with_template(tokenizer, template)
    turns = [USER, {"role": "assistant", "content": "x" * 9}]
    assert render(chat, turns) == chat.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


def test_a_long_conversation_may_be_longer_than_the_limit(tokenizer: Any) -> None:
    chat = with_template(tokenizer, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    text = "x" * 3_000_000
    assert render(chat, [{"role": "user", "content": text}]) == f"[{text}]"
