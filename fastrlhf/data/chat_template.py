"""Chat templates: conversations as text, within limits, and the token that ends a turn.

A template is a program from somebody else's file. It runs in jinja's sandbox under a limit of time
and of output, and whatever it raises is an EncodeError.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from fastrlhf.data.foreign_errors import EncodeError, foreign_errors
from fastrlhf.data.records import PromptLike, Turn
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TIME_LIMIT = 3.0
"""Seconds that a template may run for one conversation; they take under a millisecond."""
MEMORY_LIMIT = 1 << 20
"""KiB by which the process may grow while a template runs."""
OUTPUT_LIMIT = 1_000_000
"""Characters that a template may add to those of the conversation, once for each turn."""
_LARGEST_NUMBER = 10_000_000  # that is written in a template, such as 80 in "-" * 80
_LARGEST_EXPONENT = 64
_WIDE_FORMAT = re.compile(r"[%:][^A-Za-z{}]*[0-9]{8}")  # a field of 10^7 characters or more
_SOON = 0.1  # seconds before which the memory is not looked at
_TEMPLATE_FILE = "<template>"  # the file name that jinja gives to compiled templates

Span: TypeAlias = tuple[int, int]
"""Characters or tokens [start, end)."""


def has_template(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike) -> bool:
    """Return whether the tokenizer's chat template formats `prompt`, rather than plain text."""
    return not isinstance(prompt, str) and bool(tokenizer.chat_template)


def prompt_text(prompt: PromptLike) -> str:
    """Return the prompt as plain text: turns become lines "role: content", each with a newline."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt)


def render(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike, opens: bool = True) -> str:
    """Return the text of `prompt`; `opens` also opens the assistant's turn after it.

    Raises EncodeError if the chat template refuses the prompt, fails or exceeds its limits.
    """
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return prompt_text(prompt)
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    roles = ", ".join(turn["role"] for turn in turns[:20]) + ", ..." * (len(turns) > 20)

    def refusal(reason: str) -> UserError:
        return EncodeError(
            f"the tokenizer's chat template rejects a prompt with turns {roles}: {reason}"
        )

    with foreign_errors(refusal), _time_limit(TIME_LIMIT):
        _check_constants(str(tokenizer.chat_template))
        text = str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens)
        )
    allowed = sum(len(turn["content"]) + OUTPUT_LIMIT for turn in turns)
    if len(text) > allowed:
        raise refusal(f"it printed {len(text)} characters, expected at most {allowed}")
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a template that runs longer than `seconds`, MemoryError if it grows.

    The interpreter's trace function checks the clock on each line of compiled template code. It
    works in any thread and needs no signal. Code in C is not interrupted: see _check_constants.
    """
    start, busy = time.monotonic(), time.thread_time()
    peak, outer = _peak_kib(), sys.gettrace()

    def check(frame: FrameType, event: str, argument: Any) -> Any:
        elapsed = time.monotonic() - start
        if elapsed > seconds and time.thread_time() - busy > seconds:  # not merely suspended
            raise TimeoutError(f"it ran longer than {seconds:g} seconds")
        if elapsed > _SOON and _peak_kib() - peak > MEMORY_LIMIT:
            raise MemoryError(f"it took more than {MEMORY_LIMIT >> 10} MiB of memory")
        return check if frame.f_code.co_filename == _TEMPLATE_FILE else None

    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(outer)


def _peak_kib() -> int:
    """Return the largest resident size that the process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@lru_cache(maxsize=16)
def _check_constants(template: str) -> None:
    """Raise ValueError if `template` has constants with which one operation runs for minutes."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    # The tag {% generation %} is an extension of transformers.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    try:
        tree = environment.parse(plain)
    except TemplateSyntaxError:
        return  # transformers reports it, or knows the tag
    for power in tree.find_all(nodes.Pow):
        exponent = power.right.value if isinstance(power.right, nodes.Const) else None
        small = isinstance(exponent, int) and abs(exponent) <= _LARGEST_EXPONENT
        if not small or power.left.find(nodes.Pow) or isinstance(power.left, nodes.Pow):
            raise ValueError(f"it computes a power; expected exponents up to {_LARGEST_EXPONENT}")
    for constant in tree.find_all(nodes.Const):
        value = constant.value
        if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
            raise ValueError(f"it uses the number {value}; expected at most {_LARGEST_NUMBER}")
        if isinstance(value, str) and _WIDE_FORMAT.search(value):
            raise ValueError(f"it formats to a width above {_LARGEST_NUMBER}")


def assistant_spans(
    tokenizer: PreTrainedTokenizerFast, prompt: PromptLike, text: str
) -> list[Span]:
    """Return the character spans [start, end) of the assistant's turns in the templated text.

    What the template appends to a turn, such as an end-of-turn token, belongs to the turn; the
    header before it does not. Raises EncodeError if the template formats a turn differently when
    another turn follows, so that it has no such span.
    """
    spans = []
    for number, turn in enumerate([] if isinstance(prompt, str) else prompt):
        if turn["role"] != "assistant":
            continue
        before = _before_turn(tokenizer, prompt, number)
        through = render(tokenizer, prompt[: number + 1], opens=False)
        if not (
            text.startswith(before) and text.startswith(through) and len(before) < len(through)
        ):
            raise EncodeError(
                f"the tokenizer's chat template formats turn {number + 1} of a prompt differently "
                "when more turns follow; use data.loss_on=last"
            )
        spans.append((len(before), len(through)))
    return spans


def _before_turn(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike, number: int) -> str:
    """Return the templated text up to the content of the assistant's turn `number`."""
    if not tokenizer.chat_template:
        return (prompt_text(prompt[:number]) if number else "") + "assistant: "
    if number:
        return render(tokenizer, prompt[:number])
    # There is no prompt to render that opens the first turn: find its content instead.
    before, found, _ = render(
        tokenizer, [{"role": "assistant", "content": _PROBE}], opens=False
    ).partition(_PROBE)
    if not found:
        raise EncodeError(
            "the tokenizer's chat template does not print the assistant's turns; "
            "use data.loss_on=last"
        )
    return before


_PROBE = "Nine brown foxes."
"""The content of a turn that shows what a template prints around it."""


def turn_end(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens with which the chat template ends an assistant's turn, last the stop token.

    They are those after the content up to the first special token, such as <|im_end|>. Empty if the
    tokenizer has no template, or one that ends turns in plain text.
    """
    template = tokenizer.chat_template
    if not template:
        return []
    known, ids = _turn_ends.get(tokenizer, (None, ()))
    if known != template:
        ids = _find_turn_end(tokenizer)
        _turn_ends[tokenizer] = (str(template), ids)
    return list(ids)


_turn_ends: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[str | None, tuple[int, ...]]]
_turn_ends = WeakKeyDictionary()


def _find_turn_end(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    user: Turn = {"role": "user", "content": "Count them."}
    system: Turn = {"role": "system", "content": "Count them."}
    answer: Turn = {"role": "assistant", "content": _PROBE}
    for turns in ([user, answer], [system, user, answer], [answer]):
        try:
            _, found, after = render(tokenizer, turns, opens=False).rpartition(_PROBE)
        except EncodeError:
            continue
        ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
        stops = [number for number, token in enumerate(ids) if token in special]
        if stops:
            return tuple(ids[: stops[0] + 1])
    return ()
