"""Atomic writing of a folder by all ranks: it gets its name once all files are on the disk.

Each rank writes, hashes and flushes its own files, in a background thread if asked. Decisions that
ranks make together (have all finished, has one failed) are made in the main thread between steps,
because collectives of two threads could interleave. Each rank also leaves a note that lists its
files, so that the folder of a run that broke off can be completed by one process. No process is
forked and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastrlhf.checkpoint.integrity import (
    Entry,
    hash_and_sync,
    is_inside,
    replace_text,
    sync_folder,
    write_manifest,
)
from fastrlhf.checkpoint.names import PARTIAL, REMOVED
from fastrlhf.checkpoint.shards import ShardFile
from fastrlhf.errors import UserError

Contents = dict[str, "ShardFile | str"]
"""Relative path -> tensors or text."""
_NOTE = "written_"


@contextlib.contextmanager
def raise_on_all_ranks(context: str) -> Iterator[None]:
    """Run a block whose work is done on rank 0.

    If it raises OSError there, raise the same UserError on every rank: `context`, a colon, and the
    error. A collective.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = describe_error(error)
    outcome = [problem]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise UserError(f"{context}: {outcome[0]}")


def describe_error(error: OSError | SafetensorError) -> str:
    """Return the system's error message in one line, with the file if it is known."""
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    words = error.strerror or str(error)
    return f"{error.filename}: {words}" if error.filename else words


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whose mode follows the umask.

    safetensors itself would let only the owner read it.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


class FolderWriter:
    """Writes one folder; all ranks construct it and call `is_done` and `finish` together."""

    def __init__(self, path: Path, contents: Contents, *, in_background: bool) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._note = (
            self._partial / f"{_NOTE}{dist.get_rank():05d}_of_{dist.get_world_size():05d}.json"
        )
        with raise_on_all_ranks(f"cannot write {path}"):
            if dist.get_rank() == 0:
                if self._partial.is_dir():
                    shutil.rmtree(self._partial)
                self._partial.mkdir(parents=True)
        self._written: Future[dict[str, Entry] | str]
        self._executor: ThreadPoolExecutor | None = None
        if in_background:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._written = self._executor.submit(self._write, contents)
            self._executor.shutdown(wait=False)
        else:
            self._written = Future()
            self._written.set_result(self._write(contents))

    def _write(self, contents: Contents) -> dict[str, Entry] | str:
        """Write this rank's files; return their entries for `files.json`, or an error message."""
        entries = {}
        try:
            for name, content in contents.items():
                path = self._partial / name
                path.parent.mkdir(exist_ok=True)
                if isinstance(content, str):
                    path.write_text(content, encoding="utf-8")
                elif content.tensors:
                    save_tensors(content.tensors, path, content.metadata)
                else:
                    continue
                entries[name] = hash_and_sync(path)
            replace_text(self._note, json.dumps(entries))
        except (OSError, SafetensorError) as error:
            return f"rank {dist.get_rank()} on host {socket.gethostname()}: {describe_error(error)}"
        return entries

    def _outcome(self) -> dict[str, Entry] | str:
        """Wait for this rank's files; return what `_write` did, after its thread has ended."""
        if self._executor is not None:
            self._executor.shutdown()
        return self._written.result()

    def is_done(self, device: torch.device) -> bool:
        """Return whether every rank has written its files; a collective."""
        done = torch.tensor(int(self._written.done()), device=device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> None:
        """Wait for every rank's files, then give the folder its name; a collective.

        An older folder of that name is replaced. If a rank could not write, every rank raises the
        same UserError and the unfinished folder is removed.
        """
        outcomes: list[dict[str, Entry] | str] = [""] * dist.get_world_size()
        dist.all_gather_object(outcomes, self._outcome())
        failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
        written = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        if failed and dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        if failed:
            raise UserError(
                f"cannot write {self.path}: {failed[0]}; make room or set another output_dir; earlier checkpoints are "
                "as they were"
            )
        with raise_on_all_ranks(f"cannot write {self.path}"):
            if dist.get_rank() == 0:
                # Not from the notes, which may still be in another machine's file system cache.
                _commit(
                    self._partial,
                    {name: entry for entries in written for name, entry in entries.items()},
                )

    def finish_without_collectives(self, timeout_s: float) -> bool:
        """Finish the folder of a run that breaks off, while other ranks may be anywhere.

        Every rank waits for its own files; rank 0 then waits at most `timeout_s` for the notes of
        the others, and gives the folder its name. Returns whether this rank has done so.
        """
        outcome, end = self._outcome(), time.monotonic() + timeout_s
        if isinstance(outcome, str) or dist.get_rank() != 0:
            return False
        while not commit_if_complete(self._partial):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def commit_if_complete(partial: Path) -> Path | None:
    """Give an unfinished folder its name if the notes of all ranks are in it.

    Returns the finished folder, or None. One process calls it. Raises OSError if the folder cannot
    be changed.
    """
    notes = sorted(partial.glob(f"{_NOTE}*.json"))
    entries: dict[str, Entry] = {}
    try:
        if not notes or len(notes) < int(notes[0].stem[-5:]):
            return None
        for note in notes:
            entries |= json.loads(note.read_text(encoding="utf-8"))
    except (ValueError, TypeError):  # a note that a crash has damaged
        return None
    return _commit(partial, entries) if all(map(is_inside, entries)) else None


def _commit(partial: Path, entries: dict[str, Entry]) -> Path:
    """Write the manifests, remove the notes, and rename `partial`; return the finished folder."""
    for folder in sorted({name.split("/")[0] for name in entries if "/" in name}):
        own = {
            name[len(folder) + 1 :]: entry
            for name, entry in entries.items()
            if name.startswith(folder + "/")
        }
        entries[f"{folder}/files.json"] = write_manifest(partial / folder, own)
    write_manifest(partial, entries)
    for note in partial.glob(f"{_NOTE}*"):
        note.unlink()
    path = partial.with_name(partial.name.removesuffix(PARTIAL))
    if path.exists():
        remove_atomically(path)
    os.replace(partial, path)
    sync_folder(path.parent)
    return path


def remove_atomically(path: Path) -> None:
    """Delete a folder so that no half-deleted one keeps its name if this is interrupted."""
    doomed = path.with_name(path.name + REMOVED)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
