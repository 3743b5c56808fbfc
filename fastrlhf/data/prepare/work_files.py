"""The work files of a `data prepare` under way: what has been read so far, so that memory stays small and a pass that
was stopped goes on where it was.

Everything is appended; `save` writes down how long each file is together with the caller's state, and opening the
folder again cuts the files to those lengths. Work of other inputs or settings is thrown away.
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

_FIELDS = {
    "prompt": "Q",
    "user": "Q",
    "order": "Q",
    "start": "Q",
    "bytes": "I",
    "source": "I",
    "responses": "I",
}
_FIELDS |= {"pairs": "I", "prompt_length": "I", "response_length": "I"}
_ROW = struct.Struct("<" + "".join(_FIELDS.values()))
_DTYPE = np.dtype([(name, f"<u{struct.calcsize('<' + code)}") for name, code in _FIELDS.items()])
_NAMES = ("lines.jsonl", "rows", "rejected.jsonl", "pii.jsonl")


class WorkFiles:
    """Work files in `folder`, which `close` leaves for another run and `remove` deletes.

    A record is its line and a row: hashes of its prompt, user and content (order), where its line is, its source, its
    numbers of responses and pairs, and the lengths of its prompt and of its responses on average.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        found = self._found()
        self.state: dict[str, Any] | None = found["state"] if found else None
        sizes = found["sizes"] if found else dict.fromkeys(_NAMES, 0)
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: (folder / name).open("ab") for name in _NAMES}
        for name, file in self._files.items():
            file.truncate(sizes[name])
            file.seek(0, os.SEEK_END)
        self._end = sizes["lines.jsonl"]

    def _found(self) -> dict[str, Any] | None:
        """What an earlier run saved for the same fingerprint."""
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        whole = all((self.folder / name).is_file() for name in _NAMES)
        return found if found["fingerprint"] == self._fingerprint and whole else None

    def add(self, line: bytes, **row: int) -> None:
        """Append a record; `row` gives the fields that its line does not."""
        row["start"], row["bytes"] = self._end, len(line)
        self._files["lines.jsonl"].write(line)
        self._files["rows"].write(_ROW.pack(*(row[name] for name in _FIELDS)))
        self._end += len(line)

    def reject(self, line: str) -> None:
        """Append a line to rejected.jsonl."""
        self._files["rejected.jsonl"].write(line.encode())

    def report(self, entry: dict[str, Any]) -> None:
        """Append a line to the report of personal data."""
        self._files["pii.jsonl"].write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def save(self, state: dict[str, Any]) -> None:
        """A run that opens this folder next begins here, with `state`."""
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
        """All rows as a structured array; 56 bytes a record."""
        self._files["rows"].flush()
        return np.fromfile(self.folder / "rows", dtype=_DTYPE)

    def lines(self) -> memoryview:
        """All lines, mapped from disk: bytes [start, start + bytes) of it are a record's."""
        self._files["lines.jsonl"].flush()
        if self._end == 0:
            return memoryview(b"")
        with (self.folder / "lines.jsonl").open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def remove(self, out: Path) -> None:
        """Move the two reports into `out` where they have lines, and delete the rest."""
        self.close()
        for name in ("rejected.jsonl", "pii.jsonl"):
            if (self.folder / name).stat().st_size:
                os.replace(self.folder / name, out / name)
            else:
                (out / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
