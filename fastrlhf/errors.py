"""The exception for mistakes that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a configuration, a file or a command.

    The message says on one line what is wrong, where, what was expected and how to fix it. The
    command line prints it without a traceback and exits with status 2.
    """
