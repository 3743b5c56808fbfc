"""Pretraining text: documents joined by eos, read as windows of memory-mapped tokens.

Text files are tokenized once and cached as megatron-core's .bin/.idx pair (indexed.py).
megatron-core reads the pair (imported only when a stream is opened), so files prepared for
Megatron-LM can be used as they are.

Not supported: attention masks that reset at document boundaries (GPT-3 had none).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastrlhf.data.blend import blend_order
from fastrlhf.data.files import make_folder
from fastrlhf.data.foreign_errors import foreign_errors
from fastrlhf.data.indexed import bin_file, idx_file, write_indexed
from fastrlhf.data.loader import permutation
from fastrlhf.data.records import Paths, as_paths
from fastrlhf.data.token_ids import id_range, largest_id
from fastrlhf.data.tokenizer_folder import bos_ids
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER_BYTES = 34  # magic, version, dtype code, sequence count, document count
_AGAIN = "preprocess the text again"
_CHECKED_DOCUMENTS = 1000


class TokenStream:
    """Flat memory-mapped token arrays, uint16 or int32: one per .bin file, in the order given."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        """Return the number of tokens in all parts."""
        return sum(len(part) for part in self.parts)

    @classmethod
    def open(
        cls, paths: Paths, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path
    ) -> TokenStream:
        """Open text files and .bin/.idx pairs.

        Text files are .txt, .jsonl with "text", .gz of both, and .parquet. A pair is given by
        either file or by their common prefix. Text is tokenized on first use into `cache_dir`. The
        key of the cache is the path, size and modification time of the file, and the tokenizer.
        Several processes may open the same stream at once: one writes, the others wait for it.
        """
        parts = []
        for path in as_paths(paths):
            prefix = indexed_prefix(path) or _tokenize_cached(path, tokenizer, Path(cache_dir))
            parts.append(_read_indexed(prefix, tokenizer))
        return cls(parts)


class PretrainWindows:
    """A data set of all windows of L + 1 tokens.

    Each window starts at the last token of the one before, so every token but the first of a part
    is a label exactly once. The tail of a part that does not fill a window is dropped.

    `weights`, one per part, make a blend: `order` then draws the parts in these proportions. Raises
    UserError if there is no window, or with weights if a part has none.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, weights: Sequence[float] | None = None
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.weights = weights
        windows = [max(len(part) - 1, 0) // sequence_length for part in stream.parts]
        self._ends = np.cumsum(windows)
        if len(self) == 0:
            raise UserError(
                f"the pretraining text has {len(stream)} tokens, fewer than one window of "
                f"data.sequence_length + 1 = {sequence_length + 1}; "
                "add text or lower data.sequence_length"
            )
        if weights is not None and min(windows) == 0:
            number = windows.index(0) + 1
            raise UserError(
                f"source {number} of data.pretrain has {len(stream.parts[number - 1])} tokens, "
                f"fewer than one window of data.sequence_length + 1 = {sequence_length + 1}; "
                "remove it, or lower data.sequence_length"
            )

    def __len__(self) -> int:
        """Return the number of windows in all parts."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> list[int]:
        """Return window `index` as a list of L + 1 tokens."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - int(self._ends[part - 1] if part else 0)) * self.sequence_length
        window: list[int] = self.stream.parts[part][
            start : start + self.sequence_length + 1
        ].tolist()
        return window

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """Return the windows of one epoch, int64 [len(self)]; the same on every machine.

        Without weights, each window occurs once; a blend has the order of `blend_order`.
        """
        if self.weights is None:
            return permutation(len(self), seed, epoch, shuffle)
        return blend_order(self._ends, self.weights, seed, epoch, shuffle)


def indexed_prefix(path: Path) -> Path | None:
    """Return the common prefix of the .bin/.idx pair that `path` names, None for a text file.

    `path` is either file of the pair, or the prefix. Raises UserError if one file of the pair is
    missing.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if bin_file(prefix).is_file() and idx_file(prefix).is_file():
        return prefix
    if path.suffix in (".bin", ".idx"):
        raise UserError(
            f"{path}: expected both {bin_file(prefix)} and {idx_file(prefix)}; {_AGAIN}"
        )
    return None


def _read_indexed(prefix: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the tokens of one .bin/.idx pair as a flat memory map.

    Raises UserError if the pair is damaged or does not fit the tokenizer.
    """
    from fastrlhf.parallel.indexed_dataset import IndexedDataset

    with idx_file(prefix).open("rb") as file:
        head, size = file.read(len(_INDEX_MAGIC)), os.fstat(file.fileno()).st_size
    if head != _INDEX_MAGIC or size < _INDEX_HEADER_BYTES:
        raise UserError(
            f"{idx_file(prefix)}: not a readable megatron index ({size} bytes); {_AGAIN}"
        )
    damaged = f"{idx_file(prefix)}: not a readable megatron index"
    if (size := bin_file(prefix).stat().st_size) == 0:
        raise UserError(f"{bin_file(prefix)}: is empty; copy it again, or {_AGAIN}")
    with (
        _quiet_destructors(),
        foreign_errors(lambda why: UserError(f"{damaged} ({why}); {_AGAIN}")),
    ):
        index = IndexedDataset(str(prefix)).index
    if not np.issubdtype(index.dtype, np.integer):
        raise UserError(
            f"{idx_file(prefix)}: holds {np.dtype(index.dtype)}, expected token ids; {_AGAIN}"
        )
    if size % (width := np.dtype(index.dtype).itemsize):
        raise UserError(
            f"{bin_file(prefix)}: has {size} bytes, expected a multiple of {width} (the bytes of a "
            f"token by its index); copy it again, or {_AGAIN}"
        )
    tokens = np.memmap(bin_file(prefix), dtype=index.dtype, mode="r")
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    if len(ends) == 0 or ends[-1] != len(tokens):
        expected = int(ends[-1]) if len(ends) else 0
        raise UserError(
            f"{bin_file(prefix)}: has {len(tokens)} tokens, "
            f"expected {expected} by its index; {_AGAIN}"
        )
    with foreign_errors(lambda why: UserError(f"{damaged} ({why}); {_AGAIN}")):
        documents = np.asarray(index.document_indices[1 : _CHECKED_DOCUMENTS + 1])
        document_ends = ends[documents - 1]
    _check_tokens(prefix, tokens, document_ends, tokenizer)
    return tokens


@contextmanager
def _quiet_destructors() -> Iterator[None]:
    """Suppress errors of destructors: megatron's fail for a data set that could not be opened."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except UserError as error:
        if error.__context__ is not None:  # its frames keep the half-open data set alive
            traceback.clear_frames(error.__context__.__traceback__)
            error.__context__.__traceback__ = None
        raise
    finally:
        sys.unraisablehook = hook


def _check_tokens(
    prefix: Path, tokens: np.ndarray, document_ends: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise UserError if the tokens are from another tokenizer or documents do not end in eos.

    Either would silently train a bad model. All tokens are read once (`id_range`); the ends of the
    first thousand documents are checked.
    """
    smallest, largest = id_range(bin_file(prefix), tokens)
    if smallest < 0:
        raise UserError(f"{bin_file(prefix)}: holds the token {smallest}; {_AGAIN}")
    if largest > (last := largest_id(tokenizer)):
        gaps = f" with ids up to {last}" if last != len(tokenizer) - 1 else ""
        raise UserError(
            f"{bin_file(prefix)}: holds token {largest}, but the tokenizer has {len(tokenizer)} "
            f"tokens{gaps}; use the tokenizer it was made with"
        )
    if not (tokens[document_ends - 1] == tokenizer.eos_token_id).all():
        raise UserError(
            f"{bin_file(prefix)}: documents do not end in the tokenizer's eos "
            f"({tokenizer.eos_token_id}); preprocess with --append-eod and the same tokenizer"
        )


def _tokenize_cached(path: Path, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Path:
    """Return the .bin/.idx prefix of a text file; tokenize the file if the cache lacks it."""
    from filelock import FileLock

    if not path.is_file():
        raise UserError(f"{path}: no such file, nor {path}.bin with {path}.idx; check the path")
    prefix = cache_dir / f"{path.name}.{_fingerprint(path, tokenizer)}"
    make_folder(cache_dir)
    with FileLock(f"{prefix}.lock"):
        # The index is renamed into place last, so if it exists, its .bin is complete.
        if not idx_file(prefix).exists():
            write_indexed(path, tokenizer, prefix)
    return prefix


def _fingerprint(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    stat = path.stat()
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = [
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        vocabulary,
        tokenizer.eos_token_id,
        *bos_ids(tokenizer),
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
