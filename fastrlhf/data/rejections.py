"""What happens to malformed records: one error line, or a counted entry in a file of rejected ones.

Parsing, tokenizing and `data prepare` reject records through the same class, so every error of a
record has its file and line and obeys `on_error`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from fastrlhf.data import files
from fastrlhf.data.json_rows import Row
from fastrlhf.errors import UserError

logger = logging.getLogger(__name__)

OnError: TypeAlias = Literal["strict", "quarantine"]

_LONG_LINE_KEPT = 1000  # bytes of a line above LONGEST_LINE that are written to rejected.jsonl
LINE_FIX = "; fix the line, or set on_error to quarantine to skip such lines"


@dataclass
class Counts:
    """Counts of the records of one file set; the loaders log them, manifests contain them."""

    read: int = 0
    kept: int = 0
    rejected: int = 0  # malformed, set aside under on_error="quarantine"
    long_prompts: int = 0  # dropped: prompt over the limit
    cut_responses: int = 0  # kept, but the response was cut at the limit
    end_markers: int = 0  # kept, but the response ended in a written end marker, which was removed
    tied_pairs: int = 0  # ranked pairs of equal responses, which are ties
    unranked: int = 0  # dropped: a ranking without a pair of different responses

    def __str__(self) -> str:
        lost = [
            f"{count} {reason}"
            for count, reason in (
                (self.rejected, "malformed and set aside"),
                (self.long_prompts, "dropped for a long prompt"),
                (self.unranked, "dropped since their responses are equal"),
                (self.cut_responses, "responses cut"),
                (self.end_markers, "end markers removed from responses"),
                (self.tied_pairs, "pairs of equal responses ignored"),
            )
            if count
        ]
        return f"kept {self.kept} of {self.read} records" + (
            f" ({', '.join(lost)})" if lost else ""
        )


class RecordLocation(NamedTuple):
    """Location of a record: number of the file among those read, its path, line or row from 1.

    `raw` is the row as it was read, for the file of rejected records.
    """

    file: int
    path: Path
    line: int
    raw: bytes | Row | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass
class Rejections:
    """Applies `on_error` to malformed records, whether found in parsing or in tokenizing.

    Under "strict" a malformed record raises UserError with its file and line. Under "quarantine" it
    is counted in `counts.rejected`, and `write` is called with its line of rejected.jsonl.
    """

    on_error: OnError
    counts: Counts
    write: Callable[[str], object] | None = None

    def reject(self, location: RecordLocation, reason: str, fix: str = LINE_FIX) -> None:
        """Reject the record at `location` for `reason`; `fix` ends the error message."""
        if self.on_error == "strict":
            raise UserError(f"{location}: {reason}{fix}")
        self.counts.rejected += 1
        if self.write is not None:
            self.write(_rejection(location, reason))


@contextmanager
def open_rejections(
    on_error: OnError, rejected: Path | None, counts: Counts
) -> Iterator[Rejections]:
    """Open the file `rejected` for malformed records, and warn at the end if there were any.

    Nothing is written if `rejected` is None or under on_error="strict".
    """
    before = counts.rejected
    with ExitStack() as stack:
        write: Callable[[str], object] | None = None
        if rejected is not None and on_error == "quarantine":
            Path(rejected).parent.mkdir(parents=True, exist_ok=True)
            write = stack.enter_context(open(rejected, "w", encoding="utf-8")).write
        yield Rejections(on_error, counts, write)
    if counts.rejected > before:
        see = f", see {rejected}" if rejected else ""
        logger.warning("%d malformed records skipped%s", counts.rejected - before, see)


def _rejection(location: RecordLocation, reason: str) -> str:
    """Return the line of rejected.jsonl for the record at `location`."""
    record, entry = location.raw, dict[str, Any]()
    if isinstance(record, bytes):
        kept = record[:_LONG_LINE_KEPT] if len(record) > files.LONGEST_LINE else record
        text = kept.decode("utf-8", "backslashreplace").rstrip("\r\n")
        entry = {"source": str(location), "reason": reason, "record": text}
    else:
        entry = {"source": str(location), "reason": reason, "record": record}
    return json.dumps(entry, default=str) + "\n"
