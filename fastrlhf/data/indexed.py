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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastrlhf.data.files import Paths, ReadPosition, as_files, make_folder
from fastrlhf.data.records import Counts, OnError, located_rows, parse_record
from fastrlhf.data.tokenize import encode_plain
from fastrlhf.errors import UserError
from fastrlhf.progress import Meter

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fastrlhf.parallel.indexed_dataset import IndexedDatasetBuilder

logger = logging.getLogger(__name__)

# Characters tokenized in one call, so that a book-sized document needs little memory.
PIECE = 1 << 20
Pieces: TypeAlias = list[tuple[str, bool]]
"""Texts, each with whether its document ends there."""


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
        str(bin_file(partial)), dtype=DType.optimal_dtype(len(tokenizer))
    )
    try:
        with ExitStack() as stack:
            write_rejected = None
            if on_error == "quarantine":
                path = f"{prefix}.rejected.jsonl"
                write_rejected = stack.enter_context(open(path, "w", encoding="utf-8")).write
            chunks = _chunks(files, on_error, write_rejected, counts, position)
            progress = stack.enter_context(_meter(files))
            for token_ids, ends in _tokenize_chunks(chunks, tokenizer, workers, stack):
                tokens += _add_pieces(builder, token_ids, ends, tokenizer.eos_token_id)
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


def _add_pieces(
    builder: IndexedDatasetBuilder, token_ids: list[np.ndarray], ends: list[bool], eos: int
) -> int:
    """Append pieces to the data set, with `eos` where a document ends; return the tokens added."""
    import torch

    for ids, last in zip(token_ids, ends, strict=True):
        builder.add_item(torch.from_numpy(ids))
        if last:
            builder.add_item(torch.tensor([eos]))
            builder.end_document()
    return sum(map(len, token_ids)) + sum(ends)


def _meter(files: list[Path]) -> Meter:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    size = sum(path.stat().st_size for path in files)
    return Meter(f"tokenizing {files[0].name}{more}", size, percent=True)


def _check_files_exist(files: list[Path]) -> None:
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path")


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


def _chunks(
    files: list[Path],
    on_error: OnError,
    write_rejected: Callable[[str], object] | None,
    counts: Counts,
    position: ReadPosition,
) -> Iterator[Pieces]:
    """Yield lists of pieces with about PIECE characters in total."""
    chunk: Pieces = []
    size = 0
    rows = located_rows(
        files,
        "text",
        lambda row: [parse_record(row, "text")],
        on_error,
        write_rejected,
        counts,
        position=position,
    )
    for _, (record,) in rows:
        cut = list(pieces(record.text))
        for number, piece in enumerate(cut, 1):
            chunk.append((piece, number == len(cut)))
            size += len(piece)
            if size >= PIECE:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize_chunks(
    chunks: Iterator[Pieces], tokenizer: PreTrainedTokenizerFast, workers: int, stack: ExitStack
) -> Iterator[tuple[list[np.ndarray], list[bool]]]:
    """Yield the token ids of each chunk's pieces, and whether each ends its document, in order.

    At most two chunks per worker are in flight, so memory does not grow.
    """
    if workers == 1:
        for chunk in chunks:
            token_ids = encode_plain(tokenizer, [text for text, _ in chunk])
            ends = [last for _, last in chunk]
            yield [np.asarray(ids, dtype=np.int64) for ids in token_ids], ends
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
    in_flight: deque[tuple[Future[list[np.ndarray]], list[bool]]] = deque()
    for chunk in chunks:
        in_flight.append(
            (pool.submit(_encode, [text for text, _ in chunk]), [last for _, last in chunk])
        )
        if len(in_flight) > 2 * workers:
            future, ends = in_flight.popleft()
            yield future.result(), ends
    while in_flight:
        future, ends = in_flight.popleft()
        yield future.result(), ends


_worker_tokenizer: Tokenizer | None = None


def _start_worker(vocabulary: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_str(vocabulary)
    # Special tokens in the text are plain characters, as for `encode_plain`.
    _worker_tokenizer.encode_special_tokens = True
    _worker_tokenizer.no_truncation()


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _worker_tokenizer is not None
    encodings = _worker_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
