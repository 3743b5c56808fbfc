"""Runs a script on four ranks as torchrun does, from one process: python tests/ranks.py SCRIPT ARGUMENTS...

Everything is imported once, and the ranks are forked before any thread exists: under torchrun each imports it for
itself, which takes 20 seconds of processor time in place of 6. What torchrun does besides (restarts, signals) is not
here.
"""

from __future__ import annotations

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

import torch.distributed as dist
import transformers  # noqa: F401 (once, not in every rank)

from fastrlhf.run import builder, jobs, train  # noqa: F401
from fastrlhf.parallel import mesh as meshes

RANKS = 4


def fork(work: Callable[[], Any], environment: dict[str, str], log: Path | None = None) -> int:
    """Runs `work` in a child process, which ends with it, with status 1 and a traceback if it fails; the child's id.
    Its output goes to the end of `log`, if given.
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
    """Has this forked process join the mesh over the port that its parent listens on.

    A port that is free when the parent asks for one may be taken before rank 0 listens there.
    """
    port = listening.getsockname()[1]
    options = {"master_listen_fd": listening.detach()} if rank == 0 else {}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    store = dist.TCPStore(
        "127.0.0.1", port, world_size, rank == 0, wait_for_workers=False, **options
    )
    listening.close()
    meshes._rendezvous = lambda: (store, rank, world_size)


def main(script: str, arguments: list[str]) -> int:
    """0 if all ranks end well; when one fails the others, which may wait for it, are killed."""
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
