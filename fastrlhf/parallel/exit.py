"""Exit of a process that has joined process groups, with its own status whatever its threads do.

A thread of gloo or NCCL takes the interpreter's lock when it drops the last reference to a tensor
that Python has seen, which may be after the collective has returned. CPython up to 3.13 ends a
thread that waits for the lock while the interpreter finalizes with `pthread_exit`. Inside a C++
destructor that is `std::terminate`: a rank that has finished dies with SIGABRT ("terminate called
without an active exception").

`destroy_process_group` is not enough: a group joins its threads when its last reference is dropped,
and the autograd graph keeps the hooks of megatron's DistributedDataParallel, and with them their
groups, until the end. After a failure the threads may also wait for ranks that never arrive.

Therefore such a process does not finalize the interpreter. Nothing in this module waits for another
rank.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator

_has_groups = False


def mark_groups_joined() -> None:
    """Record that this process joins process groups, whose threads it cannot end."""
    global _has_groups
    _has_groups = True


@contextlib.contextmanager
def clean_exit() -> Iterator[None]:
    """Run a whole program; skip the interpreter's finalization if it joins process groups.

    Everything else happens as usual and in this order: the program leaves its `with` blocks; the
    interpreter reports an exception, joins the threads that are not daemons, and calls the exit
    handlers of modules imported inside the block; output is flushed. The exit status stays the
    same, except that an uncaught KeyboardInterrupt is status 130 instead of death by SIGINT.
    """
    outcome = _Outcome()
    # Exit handlers run in reverse order: this one after all that the program registers.
    atexit.register(outcome.leave)
    try:
        yield
    except SystemExit as error:
        outcome.status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except KeyboardInterrupt:
        outcome.status = 130
        raise
    else:
        outcome.status = 0


class _Outcome:
    status = 1

    def leave(self) -> None:
        if not _has_groups:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (
                OSError,
                ValueError,
            ):  # a closed pipe or a full disk; 120 is the interpreter's status for it
                self.status = self.status or 120
        os._exit(self.status & 0xFF)
