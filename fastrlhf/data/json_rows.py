"""Decode one line of JSON as a row: UTF-8, one object, each key once, a bounded length."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from pydantic_core import from_json

from fastrlhf.data import files
from fastrlhf.data.files import printable

Row: TypeAlias = dict[str, Any]


class BadRecord(Exception):
    """A record is malformed; the message says why, without its location."""


def decode_row(line: bytes) -> Row:
    """Return the JSON object on `line`; raise BadRecord if it is not exactly one."""
    if len(line) > files.LONGEST_LINE:
        raise BadRecord(
            f"the line is longer than {files.LONGEST_LINE} bytes; "
            "expected one JSON object on each line"
        )
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"byte {error.start + 1} of the line is not UTF-8; expected UTF-8 JSON"
        ) from None
    try:
        row = from_json(line.rstrip())
    except ValueError as error:
        # The parser only sees this line; its number in the file is already in the message.
        reason = str(error).replace(" at line 1 column", " at column")
        raise BadRecord(
            f"malformed JSON ({reason}); expected one JSON object on the line"
        ) from None
    if not isinstance(row, dict):
        raise BadRecord(f"the line holds {shown(row)}; expected one JSON object")
    # The fast parser keeps the last of two equal keys; the standard one can report them.
    json.loads(line, object_pairs_hook=_unique_keys, parse_int=float)
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRecord(f"the key {shown(twice)} occurs twice; expected each key once")
    return row


def shown(value: Any) -> str:
    """Return `value` as JSON in at most 40 printable characters, for error messages."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = printable(text[:40])
    return text if len(text) < 40 else text[:37] + "..."
