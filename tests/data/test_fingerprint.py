"""Fingerprints depend on the contents of files and on nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fastrlhf.data import fingerprint as module
from fastrlhf.data.fingerprint import fingerprint, fingerprints, weights_fingerprint

SIZE = 9 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "text.jsonl"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, SIZE - 1, SIZE - (1 << 20)])
def test_head_and_tail_of_a_large_file_count(large: Path, place: int) -> None:
    before = fingerprint(large)
    with large.open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    changed = fingerprint(large)
    with large.open("r+b") as file:
        file.seek(place)
        file.write(b"\0")
    assert changed != before == fingerprint(large)


def test_a_copy_is_equal_and_its_time_does_not_matter(large: Path, tmp_path: Path) -> None:
    copy = shutil.copy(large, tmp_path / "text.jsonl")
    os.utime(copy, (1, 1))
    assert fingerprint(copy) == fingerprint(large)
    with copy.open("ab") as file:
        file.write(b"\0")
    assert fingerprint(copy) != fingerprint(large)


def test_little_of_a_large_file_is_read() -> None:
    parts = list(module._parts(1 << 40, 4 << 20))
    assert sum(length for _, length in parts) == 4 << 20
    assert all(start >= 0 and start + length <= 1 << 40 for start, length in parts)
    ends = [start + length for start, length in parts]
    assert all(end <= start for end, (start, _) in zip(ends, parts[1:], strict=False))


def test_pairs_and_folders(tmp_path: Path) -> None:
    for name in ("a.bin", "a.idx", "folder/x.json", "folder/deep/y.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = [tmp_path / name for name in ("a", "a.bin", "folder", "missing")]
    before = fingerprints(paths)
    assert before[paths[0]] == before[paths[1]] != before[paths[2]]
    assert before[paths[3]] == "No such file or directory"
    (tmp_path / "a.idx").write_text("other")
    (tmp_path / "folder" / "deep" / "y.json").write_text("other")
    after = fingerprints(paths)
    assert all(before[path] != after[path] for path in paths[:3])


def test_weights_count_by_size_and_their_hashes_by_files_json(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"1")
    (tmp_path / "files.json").write_text("1")
    before = weights_fingerprint(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"2")
    assert weights_fingerprint(tmp_path) == before
    (tmp_path / "files.json").write_text("2")
    assert weights_fingerprint(tmp_path) != before
