"""One folder, written by all ranks, that appears under its name when every file is on the disk, or not at all.

Each rank writes, hashes and flushes its own files, in a thread of its own if asked; what the ranks must agree on (has
everybody finished? did anybody fail?) is decided in the main thread, between steps, for collectives of two threads
would get mixed up. No process is forked and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastrlhf.errors import UserError
from fastrlhf.training.integrity import Entry, seal, sync_folder, write_manifest
from fastrlhf.training.shards import ShardFile

Contents = dict[str, "ShardFile | str"]
"""Relative path -> tensors, or text."""
PARTIAL, REMOVED = ".partial", ".removed"


@contextlib.contextmanager
def same_outcome(what: str) -> Iterator[None]:
    """A block that rank 0 alone does something in: an `OSError` of it becomes the same `UserError` on every rank."""
    problem = None
    try:
        yield
    except OSError as error:
        problem = describe(error)
    told = [problem]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise UserError(f"{what}: {told[0]}")


def describe(error: OSError | SafetensorError) -> str:
    """One line: the system's words, and the file if it is known."""
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    words = error.strerror or str(error)
    return f"{error.filename}: {words}" if error.filename else words


class Writing:
    """The writing of one folder; all ranks make it, `poll` it and `finish` it together."""

    def __init__(self, path: Path, contents: Contents, *, in_background: bool) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        with same_outcome(f"cannot write {path}"):
            if dist.get_rank() == 0:
                if self._partial.is_dir():
                    shutil.rmtree(self._partial)
                self._partial.mkdir(parents=True)
        self._written: Future[dict[str, Entry] | str]
        if in_background:
            executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._written = executor.submit(self._write, contents)
            executor.shutdown(wait=False)
        else:
            self._written = Future()
            self._written.set_result(self._write(contents))

    def _write(self, contents: Contents) -> dict[str, Entry] | str:
        """This rank's files: their entries for `files.json`, or what went wrong."""
        entries = {}
        try:
            for name, content in contents.items():
                path = self._partial / name
                path.parent.mkdir(exist_ok=True)
                if isinstance(content, str):
                    path.write_text(content, encoding="utf-8")
                elif content.tensors:
                    save_file(content.tensors, path, metadata=content.metadata)
                else:
                    continue
                entries[name] = seal(path)
        except (OSError, SafetensorError) as error:
            return f"rank {dist.get_rank()}: {describe(error)}"
        return entries

    def is_done(self, device: torch.device) -> bool:
        """Whether every rank has written its files; the same answer on all."""
        done = torch.tensor(int(self._written.done()), device=device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> None:
        """Waits for every rank's files, then gives the folder its name. An older folder of that name is replaced.

        Raises the same `UserError` on every rank if one could not write; the unfinished folder is removed.
        """
        outcomes: list[dict[str, Entry] | str] = [""] * dist.get_world_size()
        dist.all_gather_object(outcomes, self._written.result())
        failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if failed and dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        if failed:
            raise UserError(
                f"cannot write {self.path}: {failed[0]}; make room or set another output_dir; earlier checkpoints are "
                "as they were"
            )
        with same_outcome(f"cannot write {self.path}"):
            if dist.get_rank() == 0:
                self._commit({name: entry for some in outcomes for name, entry in some.items()})  # type: ignore[union-attr]

    def _commit(self, entries: dict[str, Entry]) -> None:
        folders = sorted({name.split("/")[0] for name in entries if "/" in name})
        for folder in folders:
            own = {name[len(folder) + 1 :]: entry for name, entry in entries.items() if name.startswith(folder + "/")}
            entries[f"{folder}/files.json"] = write_manifest(self._partial / folder, own)
        write_manifest(self._partial, entries)
        if self.path.exists():
            remove(self.path)
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)


def remove(path: Path) -> None:
    """Deletes a folder that must not be taken for a whole one if it is interrupted."""
    doomed = path.with_name(path.name + REMOVED)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
