"""The exception for mistakes that the user can fix, and the form of its message."""

from __future__ import annotations

_LONGEST = 1200
"""Characters of an error line. What a file holds may be quoted in it."""


class UserError(Exception):
    """A mistake in a configuration, a file or a command.

    The message says on one line what is wrong, where, what was expected and how to fix it. The
    command line prints it without a traceback and exits with status 2.
    """


def one_line(text: str) -> str:
    """Return `text` on one line of printable characters, others as escapes.

    The middle of a text of more than 1,200 characters is left out: the file is at its
    beginning, the cure at its end.
    """
    line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    if len(line) <= _LONGEST:
        return line
    half = (_LONGEST - len(" ... ")) // 2
    return f"{line[:half]} ... {line[-half:]}"
