"""The one exception that means "the user can fix this": the command line prints it in one line and exits with status
2.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a configuration, a file or a command; the message says what, where, what was expected and how to
    fix it.
    """
