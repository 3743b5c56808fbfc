"""Ranges of token ids: of tokenizers, and of files of tokens.

A tokenizer's ids may have gaps, so its largest id counts, not its length. The largest id of a file
is found by reading all of it once, and is kept next to it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BLOCK = 1 << 24  # tokens read at once: 64 MiB


def largest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest token id of `tokenizer`; its ids may have gaps."""
    return max(max(tokenizer.get_vocab().values(), default=-1), len(tokenizer) - 1)


def missing_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids below the largest one that are no token of `tokenizer`, in order."""
    return sorted(set(range(largest_id(tokenizer))) - set(tokenizer.get_vocab().values()))


def check_ids(
    largest: int, vocab_size: int, what: str, fix: str, owner: str = "the vocabulary"
) -> None:
    """Raise UserError if the id `largest` of `what` is outside `owner`'s `vocab_size` tokens."""
    if largest >= vocab_size:
        raise UserError(
            f"{what} has the token id {largest}, but {owner} has {vocab_size} tokens "
            f"(ids 0 to {vocab_size - 1}); {fix}"
        )


def id_range(path: Path, tokens: np.ndarray) -> tuple[int, int]:
    """Return the smallest and largest of `tokens`, int [N] with N > 0, mapped from the file `path`.

    The result is kept in `path`.ids.json with the file's size and modification time, and is read
    from there while these are the same. A folder that cannot be written is no error.
    """
    kept, stat = path.with_name(f"{path.name}.ids.json"), path.stat()
    key = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if {name: found[name] for name in key} == key:
            return int(found["smallest"]), int(found["largest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: read the tokens
    blocks = [tokens[start : start + _BLOCK] for start in range(0, len(tokens), _BLOCK)]
    smallest = min(int(block.min()) for block in blocks)
    largest = max(int(block.max()) for block in blocks)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps({**key, "smallest": smallest, "largest": largest}) + "\n")
        os.replace(partial, kept)
    except OSError:
        partial.unlink(missing_ok=True)
    return smallest, largest
