"""Lines of the JSONL files that a run appends to: metrics.jsonl and samples.jsonl.

A crash can leave NUL bytes, half a line or anything else in them. Such lines are skipped with a
warning: a log never stops a run or a report.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
_SHOWN = 60


class LogLines(NamedTuple):
    """The lines of a log file."""

    records: list[dict[str, Any]]
    """The intact lines, in order; each has a finite number under the key of the file."""
    broken: list[bytes]
    """The other lines, without their ends."""


def read_log(path: Path, key: str) -> LogLines:
    """Read a log file whose lines are objects with a number under `key`.

    Logs one warning with the place of the first broken line and their number. A last line that was
    cut short, as a killed run leaves it, is dropped silently. Raises OSError if the file cannot be
    read.
    """
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    broken: list[bytes] = []
    first = ""
    for number, line in enumerate(lines, 1):
        text = line.strip(b"\0 \t\r")  # blocks that were never written read as NUL bytes
        record = _parse(text, key)
        if record is not None:
            records.append(record)
        elif line.strip() and not (number == len(lines) and text.startswith(b"{")):
            broken.append(line)
            first = first or f"{path}:{number}: {text[:_SHOWN].decode('utf-8', 'replace')!r}"
    if broken:
        more = f" (and {len(broken) - 1} more lines)" if len(broken) > 1 else ""
        logger.warning(
            'warning: broken-log-line: %s is not a line {"%s": ..., ...}%s; it is skipped',
            *(first, key, more),
        )
    return LogLines(records, broken)


def _parse(text: bytes, key: str) -> dict[str, Any] | None:
    """Return the record of a line, or None if it is not an intact one."""
    try:
        record = json.loads(text.decode("utf-8"), parse_int=_integer)
        number = record[key]
        intact = isinstance(number, (int, float)) and not isinstance(number, bool)
        return record if intact and math.isfinite(number) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _integer(digits: str) -> int | float:
    """Return an integer, or infinity for one that no float can hold."""
    return int(digits) if len(digits) < 300 else math.inf
