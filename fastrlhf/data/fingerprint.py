"""Fingerprints of files: size and a hash of samples of the contents, no modification time.

Copies of a file on two nodes have the same fingerprint. A file above 4 MiB is hashed at its head, its
tail and 32 places between, so a fingerprint costs some 4 MiB of reading whatever the size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_WHOLE = 4 << 20
_WHOLE_INDEX = 64 << 20
_END, _SAMPLE, _SAMPLES = 1 << 20, 1 << 16, 32
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def fingerprint(path: Path) -> str:
    """Return "SIZE bytes, blake2b HASH" of a file.

    The index of a .bin/.idx pair is hashed whole up to 64 MiB. A file that cannot be read has the
    system's message as its fingerprint.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.blake2b(digest_size=8)
        with path.open("rb") as file:
            for start, length in _parts(size, _WHOLE_INDEX if path.suffix == ".idx" else _WHOLE):
                file.seek(start)
                digest.update(file.read(length))
    except OSError as error:
        return error.strerror or str(error)
    return f"{size} bytes, blake2b {digest.hexdigest()}"


def _parts(size: int, whole: int) -> Iterable[tuple[int, int]]:
    """Return the (start, length) of the parts that are hashed."""
    if size <= whole:
        return [(0, size)]
    step = (size - 2 * _END) // _SAMPLES
    samples = [(_END + number * step, _SAMPLE) for number in range(_SAMPLES)]
    return [(0, _END), *samples, (size - _END, _END)]


def fingerprints(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the fingerprint of each path: a file, a folder, or the prefix of a .bin/.idx pair."""
    files = {path: _files(path) for path in paths}
    every = [file for found in files.values() for file in found]
    with ThreadPoolExecutor(16) as pool:
        known = dict(zip(every, pool.map(fingerprint, every), strict=True))
    return {
        path: _joined(path, [known[file] for file in found], found) for path, found in files.items()
    }


def weights_fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder: names and sizes, and the contents of its JSON files.

    Our own folders have the hashes of their weights in files.json.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        parts = [
            f"{path.name} {path.stat().st_size}"
            if path.suffix in _WEIGHTS
            else f"{path.name} {fingerprint(path)}"
            for path in files
        ]
    except OSError as error:
        return error.strerror or str(error)
    return f"{len(parts)} files, blake2b {_hash(parts)}"


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    pair = [path.with_name(path.name + suffix) for suffix in (".bin", ".idx")]
    if path.suffix in (".bin", ".idx"):
        pair = [path.with_suffix(".bin"), path.with_suffix(".idx")]
    if not path.is_file() or path.suffix in (".bin", ".idx"):
        return pair if all(file.is_file() for file in pair) else [path]
    return [path]


def _joined(path: Path, parts: list[str], files: list[Path]) -> str:
    if len(parts) == 1 and files == [path]:
        return parts[0]
    named = [
        f"{file.relative_to(path.parent)} {part}" for file, part in zip(files, parts, strict=True)
    ]
    return f"{len(parts)} files, blake2b {_hash(named)}"


def _hash(parts: list[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
