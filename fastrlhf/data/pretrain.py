"""The pretraining stream: documents joined by eos, read as windows from memory-mapped tokens.

Text files are tokenized once and cached as megatron-core's .bin/.idx pair (indexed.py), read by megatron-core itself
(imported here only when a stream is opened), so files prepared for Megatron-LM serve as they are. Left out on purpose:
attention masks that reset at document borders (GPT-3 had none).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrlhf.data.files import make_folder
from fastrlhf.data.indexed import bin_file, idx_file, write_indexed
from fastrlhf.data.loader import permutation
from fastrlhf.data.records import Paths, as_paths
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER_BYTES = 34  # magic, version, dtype code, sequence count, document count
_AGAIN = "preprocess the text again"
_CHECKED_DOCUMENTS = 1000
_CHECKED_TOKENS = 1 << 20


class TokenStream:
    """Flat token arrays, uint16 or int32 and memory-mapped: one per .bin file, in the order given."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        """Tokens in all parts."""
        return sum(len(part) for part in self.parts)

    @classmethod
    def open(
        cls, paths: Paths, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path
    ) -> TokenStream:
        """Open text files (.txt, .jsonl with "text", .gz of both, .parquet) and .bin/.idx pairs (either file, or their
        common prefix).

        Text is tokenized on first use into `cache_dir`; the cache is found again by the files' names, sizes and times
        and by the tokenizer. Several processes may open the same stream at once: one writes, the others wait for it.
        """
        parts = []
        for path in as_paths(paths):
            prefix = indexed_prefix(path) or _tokenized(path, tokenizer, Path(cache_dir))
            parts.append(_read_indexed(prefix, tokenizer))
        return cls(parts)


class PretrainWindows(Sequence[list[int]]):
    """All windows of L + 1 tokens, each starting at the last token of the one before: every token but the first of a
    part is a label exactly once. The tail of a part that fills no window is left out.

    `weights`, one a part, make a blend: `order` then draws the parts in these proportions.
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
                f"the pretraining text has {len(stream)} tokens, fewer than one window of data.sequence_length + 1 = "
                f"{sequence_length + 1}; add text or lower data.sequence_length"
            )
        if weights is not None and min(windows) == 0:
            number = windows.index(0) + 1
            raise UserError(
                f"source {number} of data.pretrain has {len(stream.parts[number - 1])} tokens, fewer than one window "
                f"of data.sequence_length + 1 = {sequence_length + 1}; remove it, or lower data.sequence_length"
            )

    def __len__(self) -> int:
        """Windows in all parts."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        """Window `index` as a list of L + 1 tokens."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - int(self._ends[part - 1] if part else 0)) * self.sequence_length
        return self.stream.parts[part][start : start + self.sequence_length + 1].tolist()

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """The windows of one epoch, int64 [len(self)], for any seed and epoch the same on every machine.

        Without weights each window once. In a blend, part p has its share n_p of the epoch, evenly spread, so that any
        stretch has the proportions up to one window a part; it goes on through its own windows where the epoch before
        left off, each once before any comes again.
        """
        if self.weights is None:
            return permutation(len(self), seed, epoch, shuffle)
        drawn, places = [], []
        for part, count in enumerate(apportion(len(self), self.weights)):
            first = int(self._ends[part - 1]) if part else 0
            size = int(self._ends[part]) - first
            draws = np.arange(epoch * count, (epoch + 1) * count)
            passes = draws // size
            orders = {
                p: permutation(size, seed + part, p, shuffle) for p in np.unique(passes).tolist()
            }
            own = [orders[p][draws[passes == p] % size] for p in orders]
            drawn.append(first + np.concatenate(own) if own else draws)
            places.append((np.arange(count) + 0.5) / max(count, 1))
        return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts proportional to `weights`: rounded down, the rest to the largest remainders."""
    shares = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def indexed_prefix(path: Path) -> Path | None:
    """The common prefix of the .bin/.idx pair that `path` names by either file or by the prefix; None for a text file.
    UserError when half of a pair is missing.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if bin_file(prefix).exists() and idx_file(prefix).exists():
        return prefix
    if path.suffix in (".bin", ".idx"):
        raise UserError(
            f"{path}: expected both {bin_file(prefix)} and {idx_file(prefix)}; preprocess the text again"
        )
    return None


def _read_indexed(prefix: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The tokens behind one .bin/.idx pair as a flat memory map, after checks that it fits the tokenizer."""
    from fastrlhf.parallel.indexed_dataset import IndexedDataset

    with idx_file(prefix).open("rb") as file:
        head, size = file.read(len(_INDEX_MAGIC)), os.fstat(file.fileno()).st_size
    if head != _INDEX_MAGIC or size < _INDEX_HEADER_BYTES:
        raise UserError(
            f"{idx_file(prefix)}: not a readable megatron index ({size} bytes); preprocess the text again"
        )
    try:
        index = IndexedDataset(str(prefix)).index
    except (AssertionError, ValueError, OSError) as error:
        raise UserError(
            f"{idx_file(prefix)}: not a readable megatron index ({error}); preprocess the text again"
        ) from None
    if not np.issubdtype(index.dtype, np.integer):
        raise UserError(
            f"{idx_file(prefix)}: holds {np.dtype(index.dtype)}, expected token ids; preprocess the text again"
        )
    tokens = np.memmap(bin_file(prefix), dtype=index.dtype, mode="r")
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    if len(ends) == 0 or ends[-1] != len(tokens):
        told = int(ends[-1]) if len(ends) else 0
        raise UserError(
            f"{bin_file(prefix)}: has {len(tokens)} tokens, its index tells {told}; preprocess the text again"
        )
    _check_tokens(
        prefix,
        tokens,
        ends[np.asarray(index.document_indices[1 : _CHECKED_DOCUMENTS + 1]) - 1],
        tokenizer,
    )
    return tokens


def _check_tokens(
    prefix: Path, tokens: np.ndarray, document_ends: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A wrong tokenizer or missing eos would train a bad model in silence; the first million tokens show both."""
    largest = int(tokens[:_CHECKED_TOKENS].max())
    if largest >= len(tokenizer):
        raise UserError(
            f"{bin_file(prefix)}: holds token {largest}, but the tokenizer has {len(tokenizer)} tokens; "
            "use the tokenizer it was made with"
        )
    if not (tokens[document_ends - 1] == tokenizer.eos_token_id).all():
        raise UserError(
            f"{bin_file(prefix)}: documents do not end in the tokenizer's eos ({tokenizer.eos_token_id}); "
            "preprocess with --append-eod and the same tokenizer"
        )


def _tokenized(path: Path, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Path:
    """The .bin/.idx prefix of a text file, written first when it is not there yet."""
    from filelock import FileLock

    if not path.is_file():
        raise UserError(f"{path}: no such file, nor {path}.bin with {path}.idx; check the path")
    prefix = cache_dir / f"{path.name}.{_fingerprint(path, tokenizer)}"
    make_folder(cache_dir)
    with FileLock(f"{prefix}.lock"):
        # The index is renamed into place last: where it is, its .bin is whole.
        if not idx_file(prefix).exists():
            write_indexed(path, tokenizer, prefix)
    return prefix


def _fingerprint(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    stat = path.stat()
    vocabulary = tokenizer.backend_tokenizer.to_str()
    made_of = [
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        vocabulary,
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
