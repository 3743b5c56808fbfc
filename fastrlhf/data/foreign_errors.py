"""One boundary around code of other projects: every failure becomes one line for the user.

`tokenizers` raises bare Exception, and its panics are not even that; transformers and chat
templates raise whatever their code meets in a damaged file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastrlhf.data.files import printable
from fastrlhf.errors import UserError

_LONGEST_REASON = 200
_NOT_FAILURES = (KeyboardInterrupt, SystemExit, GeneratorExit, UserError)


class EncodeError(UserError):
    """A text or conversation cannot be encoded; the message does not name the record."""


@contextmanager
def foreign_errors(message: Callable[[str], UserError]) -> Iterator[None]:
    """Turn any exception of the enclosed code into the UserError that `message` makes of its reason.

    A UserError, an interrupt and an exit pass through.
    """
    try:
        yield
    except _NOT_FAILURES:
        raise
    except BaseException as error:  # Rust panics (pyo3's PanicException) are no Exception
        raise message(reason_of(error)) from None


def reason_of(error: BaseException) -> str:
    """Return what went wrong in one printable line of at most 200 characters."""
    text = printable(" ".join(str(error).split()))
    if type(error).__name__ not in ("Exception", "TemplateError", "ValueError", "OSError"):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
