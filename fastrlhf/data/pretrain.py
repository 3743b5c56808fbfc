"""The pretraining stream: documents joined by eos, read as windows from memory-mapped tokens.

Text files are tokenized once and cached as megatron-core's .bin/.idx pair, written and read by megatron-core itself
(imported here only when a stream is opened), so files prepared for Megatron-LM serve as they are. Left out on purpose:
weighted blends of sources, and attention masks that reset at document borders (GPT-3 had none).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrlhf.data.records import Paths, as_paths, read_records
from fastrlhf.data.tokenize import encode_plain
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_PIECE = 1 << 20  # characters tokenized in one call, so that a book-sized document needs little memory
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER_BYTES = 34  # magic, version, dtype code, sequence count, document count
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
    def open(cls, paths: Paths, tokenizer: PreTrainedTokenizerFast, cache_dir: str | Path) -> TokenStream:
        """Open text files (.txt, .jsonl with "text", .gz of both, .parquet) and .bin/.idx pairs (either file, or their
        common prefix).

        Text is tokenized on first use into `cache_dir`; the cache is found again by the files' names, sizes and times
        and by the tokenizer. Several processes may open the same stream at once: one writes, the others wait for it.
        """
        parts = []
        for path in as_paths(paths):
            prefix = _indexed_prefix(path) or _tokenized(path, tokenizer, Path(cache_dir))
            parts.append(_read_indexed(prefix, tokenizer))
        return cls(parts)


class PretrainWindows(Sequence[list[int]]):
    """All windows of L + 1 tokens, each starting at the last token of the one before: every token but the first of a
    part is a label exactly once. The tail of a part that fills no window is left out.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        windows = [max(len(part) - 1, 0) // sequence_length for part in stream.parts]
        self._ends = np.cumsum(windows)
        if len(self) == 0:
            raise UserError(
                f"the pretraining text has {len(stream)} tokens, fewer than one window of data.sequence_length + 1 = "
                f"{sequence_length + 1}; add text or lower data.sequence_length"
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


def _indexed_prefix(path: Path) -> Path | None:
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if _bin(prefix).exists() and _idx(prefix).exists():
        return prefix
    if path.suffix in (".bin", ".idx"):
        raise UserError(f"{path}: expected both {_bin(prefix)} and {_idx(prefix)}; preprocess the text again")
    return None


def _bin(prefix: Path) -> Path:
    return Path(f"{prefix}.bin")


def _idx(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")


def _read_indexed(prefix: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The tokens behind one .bin/.idx pair as a flat memory map, after checks that it fits the tokenizer."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with _idx(prefix).open("rb") as file:
        head, size = file.read(len(_INDEX_MAGIC)), os.fstat(file.fileno()).st_size
    if head != _INDEX_MAGIC or size < _INDEX_HEADER_BYTES:
        raise UserError(f"{_idx(prefix)}: not a readable megatron index ({size} bytes); preprocess the text again")
    try:
        index = IndexedDataset(str(prefix)).index
    except (AssertionError, ValueError, OSError) as error:
        raise UserError(f"{_idx(prefix)}: not a readable megatron index ({error}); preprocess the text again") from None
    if not np.issubdtype(index.dtype, np.integer):
        raise UserError(f"{_idx(prefix)}: holds {np.dtype(index.dtype)}, expected token ids; preprocess the text again")
    tokens = np.memmap(_bin(prefix), dtype=index.dtype, mode="r")
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    if len(ends) == 0 or ends[-1] != len(tokens):
        told = int(ends[-1]) if len(ends) else 0
        raise UserError(f"{_bin(prefix)}: has {len(tokens)} tokens, its index tells {told}; preprocess the text again")
    _check_tokens(prefix, tokens, ends[np.asarray(index.document_indices[1 : _CHECKED_DOCUMENTS + 1]) - 1], tokenizer)
    return tokens


def _check_tokens(
    prefix: Path, tokens: np.ndarray, document_ends: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A wrong tokenizer or missing eos would train a bad model in silence; the first million tokens show both."""
    largest = int(tokens[:_CHECKED_TOKENS].max())
    if largest >= len(tokenizer):
        raise UserError(
            f"{_bin(prefix)}: holds token {largest}, but the tokenizer has {len(tokenizer)} tokens; "
            "use the tokenizer it was made with"
        )
    if not (tokens[document_ends - 1] == tokenizer.eos_token_id).all():
        raise UserError(
            f"{_bin(prefix)}: documents do not end in the tokenizer's eos ({tokenizer.eos_token_id}); "
            "preprocess with --append-eod and the same tokenizer"
        )


def _tokenized(path: Path, tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> Path:
    """The .bin/.idx prefix of a text file, written first when it is not there yet."""
    from filelock import FileLock

    if not path.is_file():
        raise UserError(f"{path}: no such file, nor {path}.bin with {path}.idx; check data.pretrain")
    prefix = cache_dir / f"{path.name}.{_fingerprint(path, tokenizer)}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{prefix}.lock"):
        # The index is renamed into place last: where it is, its .bin is whole.
        if not _idx(prefix).exists():
            _write_indexed(path, tokenizer, prefix)
    return prefix


def _fingerprint(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    stat = path.stat()
    vocabulary = tokenizer.backend_tokenizer.to_str()
    made_of = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, vocabulary, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _write_indexed(path: Path, tokenizer: PreTrainedTokenizerFast, prefix: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    log.info("%s: tokenizing into %s", path, _bin(prefix))
    partial = Path(f"{prefix}.partial{os.getpid()}")
    builder = IndexedDatasetBuilder(str(_bin(partial)), dtype=DType.optimal_dtype(len(tokenizer)))
    try:
        for record in read_records(path, "text"):
            for ids in encode_plain(tokenizer, list(_pieces(record.text))):
                builder.add_item(torch.tensor(ids, dtype=torch.int64))
            builder.add_item(torch.tensor([tokenizer.eos_token_id]))
            builder.end_document()
        builder.finalize(str(_idx(partial)))
        os.replace(_bin(partial), _bin(prefix))
        os.replace(_idx(partial), _idx(prefix))
    finally:
        builder.data_file.close()
        _bin(partial).unlink(missing_ok=True)
        _idx(partial).unlink(missing_ok=True)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long document after line ends, where a tokenizer would seldom join, into pieces of at most about _PIECE
    characters.
    """
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start + 1, start + _PIECE) + 1 or start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]
