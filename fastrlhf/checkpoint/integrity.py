"""Integrity of folders: manifests with the hash of every file, and text files written atomically.

`files.json` lists size and BLAKE2b of the files of a folder, and the hash of that list. BLAKE2b is
in the standard library, releases the interpreter's lock, and is faster than most disks (about 1
GB/s per core). Each rank hashes its own files. The manifest detects damage, not forgery: whoever
can change a file can change the list too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TypedDict

import torch.distributed as dist

MANIFEST = "files.json"
_BLOCK = 1 << 22


class Entry(TypedDict):
    """What `files.json` records of a file."""

    bytes: int
    blake2b: str


def hash_and_sync(path: Path) -> Entry:
    """Flush a file to the disk and return its entry for `files.json`.

    Raises OSError if the file cannot be read or flushed.
    """
    with path.open("rb") as file:
        entry = Entry(bytes=path.stat().st_size, blake2b=_hash(file))
        os.fsync(file.fileno())
    return entry


def _hash(file: IO[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names, without which a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old text or the new one, even after a crash."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> Entry:
    """Write `files.json` with `entries`, by path relative to `folder`; return its own entry."""
    replace_text(folder / MANIFEST, _manifest_text(entries))
    return hash_and_sync(folder / MANIFEST)


def _manifest_text(entries: Mapping[str, Entry]) -> str:
    files = dict(sorted(entries.items()))
    digest = hashlib.blake2b(json.dumps(files).encode(), digest_size=32).hexdigest()
    return json.dumps({"files": files, "blake2b": digest}, indent=1) + "\n"


class DamagedManifestError(Exception):
    """`files.json` is missing or damaged; the message is one line."""


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Return the entries of `files.json`.

    Raises DamagedManifestError if the file is missing, differs from what was written, or names a
    file outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DamagedManifestError(
            f"{path} cannot be read ({error.strerror}): the folder is incomplete"
        ) from None
    except UnicodeDecodeError:
        raise DamagedManifestError(f"{path} is damaged: it is not text") from None
    try:
        entries = json.loads(text)["files"]
        same = text == _manifest_text(entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        same = False
    if not same or not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise DamagedManifestError(
            f"{path} is damaged: its list of files does not match the hash stored with it"
        )
    for name in entries:
        if not is_inside(name):
            raise DamagedManifestError(
                f"{path} is damaged: it names {name!r:.60}, outside the folder"
            )
    return entries


def is_inside(name: str) -> bool:
    """Return whether a relative path leads to a file inside its folder by its name alone."""
    parts = PurePosixPath(name).parts
    absolute = name.startswith("/") or PureWindowsPath(name).drive != ""
    return bool(parts) and not absolute and ".." not in parts and "\0" not in name


def _is_entry(entry: object) -> bool:
    """Return whether a value of `files.json` has the types of an `Entry`."""
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("blake2b"), str)
    )


def verify(folder: Path) -> list[str]:
    """Check the files that `files.json` lists against their hashes.

    Returns one line for each problem, none if the folder is intact. All ranks call it and get the
    same answer; each hashes a share of the files.
    """
    problems = local_problems(folder, dist.get_rank(), dist.get_world_size())
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    return sorted({problem for rank_problems in gathered for problem in rank_problems})


def local_problems(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """Check the files of one of `shares` equal shares as `verify` does; not a collective."""
    try:
        entries = read_manifest(folder)
    except DamagedManifestError as error:
        return [str(error)]
    largest_first = sorted(entries, key=lambda name: (-entries[name]["bytes"], name))
    return [
        problem
        for name in largest_first[share::shares]
        if (problem := _problem(folder / name, entries[name])) is not None
    ]


def _problem(path: Path, entry: Entry) -> str | None:
    """Return what differs between a file and its entry, or None."""
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
        else f"{path} is damaged: its content does not match the hash of what was written"
    )
