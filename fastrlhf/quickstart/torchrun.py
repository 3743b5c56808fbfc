"""The quickstart on several ranks of this machine: torchrun as a child process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType


def run_under_torchrun(processes: int, options: Mapping[str, object]) -> None:
    """Run `fastrlhf quickstart` with `options` on several processes of this machine.

    SIGTERM, SIGINT and SIGHUP are passed on, so that the ranks save and stop; otherwise they would
    continue without this process. Raises KeyboardInterrupt after SIGINT, else SystemExit with
    torchrun's status if that is not 0.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["--nproc-per-node", str(processes), "-m", "fastrlhf", "quickstart"]
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    # In a session of its own, so that Ctrl-C in a terminal reaches torchrun once, by `forward`.
    process = subprocess.Popen([*launcher, *command, *arguments], start_new_session=True)
    received: set[int] = set()

    def forward(number: int, _frame: FrameType | None) -> None:
        received.add(number)
        process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if status:
        raise SystemExit(status)
