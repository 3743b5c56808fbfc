"""Tokenize text files into megatron-core's indexed data set: .bin of tokens, .idx of document ends.

Documents are cut into pieces, which one or several worker processes tokenize. This process writes
the pieces in order, so the bytes do not depend on the number of workers. megatron-core writes the
files and is imported only then.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from fastrlhf.data.files import (
    Paths,
    ReadPosition,
    as_files,
    check_readable,
    is_one_text,
    make_folder,
)
from fastrlhf.data.foreign_errors import EncodeError, foreign_errors
from fastrlhf.data.records import Counts, OnError, RecordLocation, located_rows, parse_record
from fastrlhf.data.rejections import Rejections, open_rejections
from fastrlhf.data.token_ids import largest_id
from fastrlhf.data.tokenize import bos_ids, encode_plain, try_each
from fastrlhf.errors import UserError
from fastrlhf.progress import Meter

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fastrlhf.parallel.indexed_dataset import IndexedDatasetBuilder

logger = logging.getLogger(__name__)

# Characters tokenized in one call, so that a book-sized document needs little memory.
PIECE = 1 << 20


class Piece(NamedTuple):
    """A part of a document: its text, whether the document begins or ends there, its location."""

    text: str
    begins: bool
    ends: bool
    location: RecordLocation


Pieces: TypeAlias = list[Piece]
Ids: TypeAlias = "np.ndarray | EncodeError"


def bin_file(prefix: Path) -> Path:
    """Return the path of the tokens of the data set `prefix`."""
    return Path(f"{prefix}.bin")


def idx_file(prefix: Path) -> Path:
    """Return the path of the index of the data set `prefix`."""
    return Path(f"{prefix}.idx")


def write_indexed(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    prefix: Path,
    *,
    workers: int = 1,
    on_error: OnError = "strict",
) -> dict[str, int]:
    """Write {prefix}.bin and {prefix}.idx with eos after each document; return the counts.

    The counts are `documents`, `tokens` and `rejected` (malformed records). Both files appear under
    their names only when they are complete. With on_error="quarantine", malformed records are
    written to {prefix}.rejected.jsonl. Raises UserError if a file is missing or no record is
    usable.
    """
    from fastrlhf.parallel.indexed_dataset import DType, IndexedDatasetBuilder

    files, position, counts, tokens = as_files(paths), ReadPosition(), Counts(), 0
    _check_files_exist(files)
    make_folder(prefix.parent)
    partial = Path(f"{prefix}.partial{os.getpid()}")
    builder = IndexedDatasetBuilder(
        str(bin_file(partial)), dtype=DType.optimal_dtype(largest_id(tokenizer) + 1)
    )
    try:
        with ExitStack() as stack:
            path = Path(f"{prefix}.rejected.jsonl")
            rejections = stack.enter_context(open_rejections(on_error, path, counts))
            writer = _DocumentWriter(builder, tokenizer, rejections)
            chunks = _chunks(files, rejections, position)
            progress = stack.enter_context(_meter(files))
            for chunk, token_ids in _tokenize_chunks(chunks, tokenizer, workers, stack):
                writer.add(chunk, token_ids)
                tokens = writer.tokens
                progress.update(position.finished + position.current, f"{tokens:,} tokens")
        if tokens == 0:
            raise UserError(
                f"{files[0]}: no usable record in {len(files)} files ({counts.rejected} malformed)"
            )
        builder.finalize(str(idx_file(partial)))
        os.replace(bin_file(partial), bin_file(prefix))
        os.replace(idx_file(partial), idx_file(prefix))
    finally:
        builder.data_file.close()
        bin_file(partial).unlink(missing_ok=True)
        idx_file(partial).unlink(missing_ok=True)
    documents, malformed = counts.read - counts.rejected, counts.rejected
    message = "%s: %d documents, %d tokens, %d records set aside"
    logger.info(message, bin_file(prefix), documents, tokens, malformed)
    return {"documents": documents, "tokens": tokens, "rejected": malformed}


class _DocumentWriter:
    """Appends documents to the data set, with bos before (see `bos_ids`) and eos after each.

    A document of which a piece cannot be encoded is rejected; pieces of it that were written before
    end there.
    """

    def __init__(
        self,
        builder: IndexedDatasetBuilder,
        tokenizer: PreTrainedTokenizerFast,
        rejections: Rejections,
    ) -> None:
        self.tokens = 0
        self._builder, self._rejections = builder, rejections
        self._bos, self._eos = bos_ids(tokenizer), tokenizer.eos_token_id
        self._open = False  # pieces of the current document have been written
        self._rejected: RecordLocation | None = None

    def add(self, chunk: Pieces, token_ids: Iterable[Ids]) -> None:
        """Append the pieces of `chunk`, which have these token ids."""
        for piece, ids in zip(chunk, token_ids, strict=True):
            if piece.location == self._rejected:
                continue
            if isinstance(ids, EncodeError):
                self._rejections.reject(piece.location, str(ids))
                self._rejected = piece.location
                if self._open:
                    self._end()
                continue
            self._append([*self._bos, *ids] if piece.begins and self._bos else ids)
            self._open = True
            if piece.ends:
                self._end()

    def _end(self) -> None:
        self._append([self._eos])
        self._builder.end_document()
        self._open = False

    def _append(self, ids: np.ndarray | list[int]) -> None:
        import torch

        self._builder.add_item(torch.from_numpy(np.asarray(ids, dtype=np.int64)))
        self.tokens += len(ids)


def _meter(files: list[Path]) -> Meter:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    size = sum(path.stat().st_size for path in files)
    return Meter(f"tokenizing {files[0].name}{more}", size, percent=True)


def _check_files_exist(files: list[Path]) -> None:
    for path in files:
        check_readable(path, text=True)


def pieces(text: str) -> Iterator[str]:
    """Cut a document into pieces of at most PIECE characters.

    The cuts are after line ends if possible, since tokenizers seldom merge across them.
    """
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start + 1, start + PIECE) + 1 or start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _chunks(files: list[Path], rejections: Rejections, position: ReadPosition) -> Iterator[Pieces]:
    """Yield lists of pieces with about PIECE characters in total."""
    chunk: Pieces = []
    size = 0
    rows = located_rows(
        files, "text", lambda row: [parse_record(row, "text")], rejections, position=position
    )
    for location, (record,) in rows:
        # The raw row is dropped: a document may be a book, cut into many pieces.
        place = location if len(record.text) <= PIECE else location._replace(raw=None)
        cut = list(pieces(record.text))
        for number, piece in enumerate(cut, 1):
            if is_one_text(location.path):
                position.current = location.path.stat().st_size * number // len(cut)
            chunk.append(Piece(piece, number == 1, number == len(cut), place))
            size += len(piece)
            if size >= PIECE:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize_chunks(
    chunks: Iterator[Pieces], tokenizer: PreTrainedTokenizerFast, workers: int, stack: ExitStack
) -> Iterator[tuple[Pieces, Iterable[Ids]]]:
    """Yield each chunk with the token ids of its pieces, in order.

    At most two chunks per worker are in flight, so memory does not grow.
    """
    if workers == 1:
        for chunk in chunks:
            yield chunk, _encode_here(chunk, tokenizer)
        return
    # Spawned, because the tokenizer's threads do not survive a fork. Only the vocabulary is sent,
    # so starting a worker is cheap.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.backend_tokenizer.to_str(),),
    )
    stack.callback(pool.shutdown, cancel_futures=True)
    in_flight: deque[tuple[Future[list[np.ndarray] | None], Pieces]] = deque()
    for chunk in chunks:
        in_flight.append((pool.submit(_encode, [piece.text for piece in chunk]), chunk))
        if len(in_flight) > 2 * workers:
            yield _finished(*in_flight.popleft(), tokenizer)
    while in_flight:
        yield _finished(*in_flight.popleft(), tokenizer)


def _finished(
    future: Future[list[np.ndarray] | None], chunk: Pieces, tokenizer: PreTrainedTokenizerFast
) -> tuple[Pieces, Iterable[Ids]]:
    """Wait for a worker's chunk; one that failed there is encoded here, text by text."""
    found = future.result()
    return chunk, _encode_here(chunk, tokenizer) if found is None else found


def _encode_here(chunk: Pieces, tokenizer: PreTrainedTokenizerFast) -> Iterator[Ids]:
    for ids in try_each(partial(encode_plain, tokenizer), [piece.text for piece in chunk]):
        yield ids if isinstance(ids, EncodeError) else np.asarray(ids, dtype=np.int64)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(vocabulary: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_str(vocabulary)
    # Special tokens in the text are plain characters, as for `encode_plain`.
    _worker_tokenizer.encode_special_tokens = True
    _worker_tokenizer.no_truncation()


def _encode(texts: list[str]) -> list[np.ndarray] | None:
    """Return the token ids of `texts`, None if one of them cannot be encoded."""
    assert _worker_tokenizer is not None
    try:
        with foreign_errors(EncodeError):
            encodings = _worker_tokenizer.encode_batch(texts, add_special_tokens=False)
    except EncodeError:
        return None
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
