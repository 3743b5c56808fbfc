"""Work files of a `data prepare` in progress, on disk so that memory stays small.

A pass that was interrupted resumes from them. All files are append-only: `save` records their
lengths together with the caller's state, and opening the folder again truncates them to these
lengths. Work files of other inputs or settings are discarded.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

# Fields of a row and their struct codes.
_FIELDS = {
    "prompt": "Q",
    "user": "Q",
    "order": "Q",
    "start": "Q",
    "bytes": "I",
    "source": "I",
    "responses": "I",
    "pairs": "I",
    "prompt_length": "I",
    "response_length": "I",
}
_ROW = struct.Struct("<" + "".join(_FIELDS.values()))
_DTYPE = np.dtype([(name, f"<u{struct.calcsize('<' + code)}") for name, code in _FIELDS.items()])
_NAMES = ("lines.jsonl", "rows", "rejected.jsonl", "pii.jsonl")


class WorkFiles:
    """Work files in `folder`: `close` keeps them for the next run, `remove` deletes them.

    A record is stored as a line and a row. The row has the hashes of its prompt, user and content
    (`order`), the start and size of its line in bytes, the number of its source, its numbers of
    responses and pairs, its prompt length and its mean response length.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        saved = self._load_saved()
        self.state: dict[str, Any] | None = saved["state"] if saved else None
        sizes = saved["sizes"] if saved else dict.fromkeys(_NAMES, 0)
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: (folder / name).open("ab") for name in _NAMES}
        for name, file in self._files.items():
            file.truncate(sizes[name])
            file.seek(0, os.SEEK_END)
        self._end = sizes["lines.jsonl"]

    def _load_saved(self) -> dict[str, Any] | None:
        """Return what an earlier run saved with the same fingerprint, None if there is nothing."""
        try:
            saved: dict[str, Any] = json.loads(
                (self.folder / "state.json").read_text(encoding="utf-8")
            )
        except (FileNotFoundError, ValueError):
            return None
        complete = all((self.folder / name).is_file() for name in _NAMES)
        return saved if saved["fingerprint"] == self._fingerprint and complete else None

    def add(self, line: bytes, **row: int) -> None:
        """Append a record; `row` has all fields except `start` and `bytes`."""
        row["start"], row["bytes"] = self._end, len(line)
        self._files["lines.jsonl"].write(line)
        self._files["rows"].write(_ROW.pack(*(row[name] for name in _FIELDS)))
        self._end += len(line)

    def reject(self, line: str) -> None:
        """Append a line to rejected.jsonl."""
        self._files["rejected.jsonl"].write(line.encode())

    def report_pii(self, entry: dict[str, str]) -> None:
        """Append a line to pii.jsonl."""
        self._files["pii.jsonl"].write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def save(self, state: dict[str, Any]) -> None:
        """Save `state` and the lengths of the files, from which the next run resumes."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        part = self.folder / "state.part"
        part.write_text(
            json.dumps({"fingerprint": self._fingerprint, "sizes": sizes, "state": state}),
            encoding="utf-8",
        )
        os.replace(part, self.folder / "state.json")

    def rows(self) -> np.ndarray:
        """Return all rows as a structured array, 56 bytes per record."""
        self._files["rows"].flush()
        return np.fromfile(self.folder / "rows", dtype=_DTYPE)

    def lines(self) -> memoryview:
        """Return all lines, mapped from disk; a record's line is bytes [start, start + bytes)."""
        self._files["lines.jsonl"].flush()
        if self._end == 0:
            return memoryview(b"")
        with (self.folder / "lines.jsonl").open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def close(self) -> None:
        """Close the files and leave them on disk."""
        for file in self._files.values():
            file.close()

    def remove(self, out: Path) -> None:
        """Move rejected.jsonl and pii.jsonl to `out` if they have lines, and delete the rest."""
        self.close()
        for name in ("rejected.jsonl", "pii.jsonl"):
            if (self.folder / name).stat().st_size:
                os.replace(self.folder / name, out / name)
            else:
                (out / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
