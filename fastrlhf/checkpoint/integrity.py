"""Folders that are whole or not there: hashes of every file, atomic text files, and what reaches the disk when.

`files.json` lists size and BLAKE2b of the files of a folder, and the hash of that list. BLAKE2b because it is in the
standard library, releases the interpreter's lock, and at about 1 GB/s a core is faster than most disks; every rank
hashes its own files. It finds damage, not forgery: whoever can change a file can change the list.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

MANIFEST = "files.json"
Entry = dict[str, Any]
_BLOCK = 1 << 22


def seal(path: Path) -> Entry:
    """Flushes the file to the disk; its entry for `files.json`. Raises `OSError`."""
    with path.open("rb") as file:
        entry = {"bytes": path.stat().st_size, "blake2b": _hash(file)}
        os.fsync(file.fileno())
    return entry


def _hash(file: Any) -> str:
    digest = hashlib.blake2b(digest_size=32)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Flushes a folder's list of names: without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file so that readers, and a crash at any moment, see the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> Entry:
    """Writes `files.json`; paths are relative to `folder`. Returns the entry of `files.json` itself."""
    replace_text(folder / MANIFEST, _manifest(entries))
    return seal(folder / MANIFEST)


def _manifest(entries: Mapping[str, Entry]) -> str:
    files = dict(sorted(entries.items()))
    digest = hashlib.blake2b(json.dumps(files).encode(), digest_size=32).hexdigest()
    return json.dumps({"files": files, "blake2b": digest}, indent=1) + "\n"


class Damaged(Exception):
    """A folder is not what was written; the message is one line."""


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The entries of `files.json`. Raises `Damaged` if it is missing or not as it was written."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Damaged(
            f"{path} cannot be read ({error.strerror}): the folder was not written to its end"
        ) from None
    except UnicodeDecodeError:
        raise Damaged(f"{path} is damaged: it is not text") from None
    try:
        entries = json.loads(text)["files"]
        same = text == _manifest(entries)
    except (ValueError, TypeError, KeyError, AttributeError):
        same = False
    if not same:
        raise Damaged(
            f"{path} is damaged: its list of files does not have the hash written beside it"
        )
    return entries


def verify(folder: Path) -> list[str]:
    """What is wrong with the files that `files.json` lists, one line each; nothing if the folder is whole.

    All ranks call it and get the same answer; each hashes a share of the files.
    """
    try:
        entries = read_manifest(folder)
    except Damaged as error:
        problems = [str(error)]
    else:
        largest_first = sorted(entries, key=lambda name: (-entries[name]["bytes"], name))
        mine = largest_first[dist.get_rank() :: dist.get_world_size()]
        problems = [
            problem
            for name in mine
            if (problem := _problem(folder / name, entries[name])) is not None
        ]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, problems)
    return sorted({problem for some in everyone for problem in some})


def _problem(path: Path, entry: Entry) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} has {size} bytes instead of {entry['bytes']}"
        with path.open("rb") as file:
            same = _hash(file) == entry["blake2b"]
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return (
        None
        if same
        else f"{path} is damaged: its content does not have the hash it was written with"
    )
