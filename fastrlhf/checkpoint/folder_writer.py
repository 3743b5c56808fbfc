"""One folder, written by all ranks, that appears under its name when every file is on the disk, or not at all.

Each rank writes, hashes and flushes its own files, in a thread of its own if asked; what the ranks must agree on (has
everybody finished? did anybody fail?) is decided in the main thread, between steps, for collectives of two threads
would get mixed up. Each rank also leaves a note of what it has written, so that a folder whose run broke off before
that is completed without the others. No process is forked and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastrlhf.checkpoint.integrity import Entry, replace_text, seal, sync_folder, write_manifest
from fastrlhf.checkpoint.shards import ShardFile
from fastrlhf.errors import UserError

Contents = dict[str, "ShardFile | str"]
"""Relative path -> tensors, or text."""
PARTIAL, REMOVED = ".partial", ".removed"
_NOTE = "written_"


@contextlib.contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
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


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file with the mode that the umask gives every file: safetensors would let nobody else read it."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


class Writing:
    """The writing of one folder; all ranks make it, `poll` it and `finish` it together."""

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
        """This rank's files: their entries for `files.json`, or what went wrong."""
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
                entries[name] = seal(path)
            replace_text(self._note, json.dumps(entries))
        except (OSError, SafetensorError) as error:
            return f"rank {dist.get_rank()}: {describe(error)}"
        return entries

    def _outcome(self) -> dict[str, Entry] | str:
        """What `_write` returned, once its thread has ended."""
        if self._executor is not None:
            self._executor.shutdown()
        return self._written.result()

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
                # From the ranks themselves: their notes may be on another machine's cache of the file system.
                _commit(
                    self._partial,
                    {name: entry for entries in written for name, entry in entries.items()},
                )

    def finish_alone(self, patience_s: float) -> bool:
        """`finish` without collectives, for a run that is breaking off: rank 0 waits for the others' notes, for so long
        at most, and the others for their own files only. Whether the folder is there now, as rank 0 sees it.
        """
        written, end = self._outcome(), time.monotonic() + patience_s
        if isinstance(written, str) or dist.get_rank() != 0:
            return False
        while not complete(self._partial):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def complete(partial: Path) -> Path | None:
    """Gives an unfinished folder its name if every rank has written all of its files; the finished folder, or None.

    One process calls it. Raises `OSError`.
    """
    notes = sorted(partial.glob(f"{_NOTE}*.json"))
    if not notes or len(notes) < int(notes[0].stem[-5:]):
        return None
    entries: dict[str, Entry] = {}
    for note in notes:
        entries |= json.loads(note.read_text(encoding="utf-8"))
    return _commit(partial, entries)


def _commit(partial: Path, entries: dict[str, Entry]) -> Path:
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
        remove(path)
    os.replace(partial, path)
    sync_folder(path.parent)
    return path


def remove(path: Path) -> None:
    """Deletes a folder that must not be taken for a whole one if it is interrupted."""
    doomed = path.with_name(path.name + REMOVED)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
