"""Run a script on four ranks as torchrun does, from one process.

    python tests/ranks.py SCRIPT ARGUMENTS...

Everything is imported once, and the ranks are forked before any thread exists. Under torchrun each
rank imports everything, which takes 20 seconds of processor time instead of 6. Not supported:
torchrun's restarts and signals.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before the large imports: garbage collections would take a quarter of their time.
gc.set_threshold(50_000, 20, 100)

import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402, F401

# Imported here once, not in every rank.
from fastrlhf.commands import eval_reward  # noqa: E402, F401
from fastrlhf.parallel import rendezvous  # noqa: E402
from fastrlhf.run import train  # noqa: E402, F401

RANKS = 4


def fork(work: Callable[[], Any], environment: dict[str, str], log: Path | None = None) -> int:
    """Run `work` in a child process and return its id.

    The child ends with `work`, with status 1 and a traceback if it fails. Its output is appended to
    `log`, if given.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        if log is not None:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def meet(listening: socket.socket, rank: int, world_size: int) -> None:
    """Join the mesh in this forked process, over the port that its parent listens on.

    A port that is free when the parent asks for one may be taken before rank 0 listens on it.
    """
    port = listening.getsockname()[1]
    options = {"master_listen_fd": listening.detach()} if rank == 0 else {}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    store = dist.TCPStore(
        "127.0.0.1", port, world_size, rank == 0, wait_for_workers=False, **options
    )
    listening.close()
    rendezvous._torchrun_store = lambda _: (store, rank, world_size)


def main(script: str, arguments: list[str]) -> int:
    """Return 0 if all ranks end with status 0; if one fails, the others are killed.

    The others may be waiting for it.
    """
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is this process's
    work = partial(runpy.run_path, script, run_name="__main__")
    ranks = {fork(work, {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(RANKS)}
    # After the forks, for it has threads.
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status != 0 and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    del store
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
