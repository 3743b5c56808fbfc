"""Text files to megatron-core's indexed data set (.bin of tokens, .idx of document ends), by one process or several.

Documents are cut into pieces, which processes tokenize; this one writes them in their order, so that the bytes do not
depend on the number of processes. megatron-core does the writing and is imported only for it.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrlhf.data.files import Paths, Position, as_files, make_folder
from fastrlhf.data.records import Counts, OnError, parse_record, placed_rows
from fastrlhf.data.tokenize import encode_plain
from fastrlhf.errors import UserError
from fastrlhf.progress import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

PIECE = (
    1 << 20
)  # characters tokenized in one call, so that a book-sized document needs little memory
Pieces = list[tuple[str, bool]]  # text, and whether its document ends there


def bin_file(prefix: Path) -> Path:
    """The tokens of the data set `prefix`."""
    return Path(f"{prefix}.bin")


def idx_file(prefix: Path) -> Path:
    """The index of the data set `prefix`."""
    return Path(f"{prefix}.idx")


def write_indexed(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    prefix: Path,
    *,
    workers: int = 1,
    on_error: OnError = "strict",
) -> dict[str, int]:
    """Write {prefix}.bin and {prefix}.idx, each document ended by eos; returns the numbers of documents and tokens.

    Both appear under their names when they are whole. Under "quarantine" malformed records go to
    {prefix}.rejected.jsonl.
    """
    import torch

    from fastrlhf.parallel.indexed_dataset import DType, IndexedDatasetBuilder

    files, position, counts, tokens = as_files(paths), Position(), Counts(), 0
    _check_there(files)
    make_folder(prefix.parent)
    partial = Path(f"{prefix}.partial{os.getpid()}")
    builder = IndexedDatasetBuilder(
        str(bin_file(partial)), dtype=DType.optimal_dtype(len(tokenizer))
    )
    eos = torch.tensor([tokenizer.eos_token_id])
    title = f"tokenizing {files[0].name}" + (
        f" and {len(files) - 1} more" if len(files) > 1 else ""
    )
    try:
        with ExitStack() as stack:
            aside = None
            if on_error == "quarantine":
                rejected = stack.enter_context(
                    open(f"{prefix}.rejected.jsonl", "w", encoding="utf-8")
                )
                aside = rejected.write
            chunks = _chunks(files, on_error, aside, counts, position)
            progress = stack.enter_context(
                Meter(title, sum(path.stat().st_size for path in files), percent=True)
            )
            for ids, ends in _encoded(chunks, tokenizer, workers, stack):
                for own, last in zip(ids, ends, strict=True):
                    builder.add_item(torch.from_numpy(own))
                    tokens += len(own)
                    if last:
                        builder.add_item(eos)
                        builder.end_document()
                        tokens += 1
                progress.update(position.before + position.inside, f"{tokens:,} tokens")
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
    documents = counts.read - counts.rejected
    log.info(
        "%s: %d documents, %d tokens, %d records set aside",
        bin_file(prefix),
        documents,
        tokens,
        counts.rejected,
    )
    return {"documents": documents, "tokens": tokens, "rejected": counts.rejected}


def _check_there(files: list[Path]) -> None:
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path")


def pieces(text: str) -> Iterator[str]:
    """Cut a long document after line ends, where a tokenizer would seldom join, into pieces of at most about PIECE
    characters.
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
    aside: Callable[[str], Any] | None,
    counts: Counts,
    position: Position,
) -> Iterator[Pieces]:
    """The documents' pieces, about PIECE characters at a time."""
    chunk: Pieces = []
    size = 0
    rows = placed_rows(
        files,
        "text",
        lambda row: [parse_record(row, "text")],
        on_error,
        aside,
        counts,
        position=position,
    )
    for _, (record,) in rows:
        own = list(pieces(record.text))
        for number, piece in enumerate(own, 1):
            chunk.append((piece, number == len(own)))
            size += len(piece)
            if size >= PIECE:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(
    chunks: Iterator[Pieces], tokenizer: PreTrainedTokenizerFast, workers: int, stack: ExitStack
) -> Iterator[tuple[list[np.ndarray], list[bool]]]:
    """Each chunk's token ids, in order. At most two chunks a process are under way, so memory does not grow."""
    if workers == 1:
        for chunk in chunks:
            ids = encode_plain(tokenizer, [text for text, _ in chunk])
            yield [np.asarray(own, dtype=np.int64) for own in ids], [last for _, last in chunk]
        return
    # Spawned, as the tokenizer's threads do not survive a fork; the vocabulary alone travels, so a start is cheap.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.backend_tokenizer.to_str(),),
    )
    stack.callback(pool.shutdown, cancel_futures=True)
    waiting: deque[tuple[Future[list[np.ndarray]], list[bool]]] = deque()
    for chunk in chunks:
        waiting.append(
            (pool.submit(_encode, [text for text, _ in chunk]), [last for _, last in chunk])
        )
        if len(waiting) > 2 * workers:
            future, ends = waiting.popleft()
            yield future.result(), ends
    while waiting:
        future, ends = waiting.popleft()
        yield future.result(), ends


_worker: Any = None


def _start_worker(vocabulary: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    global _worker
    _worker = Tokenizer.from_str(vocabulary)
    _worker.encode_special_tokens = (
        True  # as plain characters: what `encode_plain` asks of transformers
    )
    _worker.no_truncation()


def _encode(texts: list[str]) -> list[np.ndarray]:
    found = _worker.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(own.ids, dtype=np.int64) for own in found]
