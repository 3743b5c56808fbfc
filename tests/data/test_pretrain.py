"""Pretraining text in megatron-core's files: windows, cache, blends and the mixture."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastrlhf.data.indexed as indexed
import fastrlhf.data.pretrain as pretrain
from fastrlhf.data.batches import TokenizedDemonstration, pack_demonstrations, pack_windows
from fastrlhf.data.loader import Loader
from fastrlhf.data.mix import Mixture
from fastrlhf.data.pretrain import PretrainWindows, TokenStream
from fastrlhf.data.tokenize import encode_plain
from fastrlhf.errors import UserError

indexed_dataset = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="streams need megatron-core"
)


def write_indexed(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> None:
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_documents_are_joined_by_eos(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a dog ran <|endoftext|>"))
    rows = jsonl({"text": "the cat"}, {"text": "sat on"})
    stream = TokenStream.open([rows, tmp_path / "a.txt.gz"], tokenizer, tmp_path / "cache")
    one, two, three = encode_plain(tokenizer, ["the cat", "sat on", "a dog ran <|endoftext|>"])
    eos = tokenizer.eos_token_id
    assert [part.tolist() for part in stream.parts] == [[*one, eos, *two, eos], [*three, eos]]
    assert stream.parts[0].dtype == np.uint16
    assert all(isinstance(part, np.memmap) for part in stream.parts)


def test_a_long_document_tokenized_in_pieces_reads_the_same(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat sat on the mat.\n" * 30 + "é" * 200
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(indexed, "PIECE", 100)
    assert max(len(piece) for piece in indexed.pieces(text)) <= 100
    stream = TokenStream.open(tmp_path / "a.txt", tokenizer, tmp_path / "cache")
    assert tokenizer.decode(stream.parts[0][:-1].tolist()) == text


def test_text_is_tokenized_once_until_it_or_the_tokenizer_changes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("the cat sat")
    first = TokenStream.open(path, tokenizer, cache).parts[0].tolist()
    calls: list[Path] = []
    write = pretrain.write_indexed

    def counted(path: Path, tokenizer: Any, prefix: Path) -> None:
        calls.append(path)
        write(path, tokenizer, prefix)

    monkeypatch.setattr(pretrain, "write_indexed", counted)
    assert TokenStream.open(path, tokenizer, cache).parts[0].tolist() == first
    assert calls == []
    path.write_text("a dog ran after")
    assert (
        tokenizer.decode(TokenStream.open(path, tokenizer, cache).parts[0][:-1].tolist())
        == "a dog ran after"
    )
    assert calls == [path]
    path.write_text("a cat ran after")  # as long as before: only the time differs
    os.utime(path, ns=(0, 0))
    assert (
        tokenizer.decode(TokenStream.open(path, tokenizer, cache).parts[0][:-1].tolist())
        == "a cat ran after"
    )


def test_a_failed_tokenization_leaves_no_cache(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    path = jsonl({"text": "fine"}, {"text": 3})
    with pytest.raises(UserError, match=r"data\.jsonl:2: "):
        TokenStream.open(path, tokenizer, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_megatron_files_are_read_by_either_name(tmp_path: Path, tokenizer: Any) -> None:
    write_indexed(tmp_path / "corpus", [[5, 6, 0], [7, 0]], dtype=np.int32)
    for name in ("corpus", "corpus.bin", "corpus.idx"):
        (part,) = TokenStream.open(tmp_path / name, tokenizer, tmp_path / "cache").parts
        assert part.tolist() == [5, 6, 0, 7, 0]
        assert part.dtype == np.int32
    assert not (tmp_path / "cache").exists()


def test_unusable_streams_give_one_line_errors(tmp_path: Path, tokenizer: Any) -> None:
    write_indexed(tmp_path / "other", [[5, 3000, 0]])
    write_indexed(tmp_path / "no_eos", [[5, 6], [7, 0]])
    write_indexed(tmp_path / "short", [[5, 6, 0]])
    (tmp_path / "short.bin").write_bytes((tmp_path / "short.bin").read_bytes()[:-2])
    (tmp_path / "alone.bin").write_bytes(b"\0\0")
    write_indexed(tmp_path / "junk", [[5, 6, 0]])
    (tmp_path / "junk.idx").write_bytes(b"junk" * 10)
    write_indexed(tmp_path / "cut", [[5, 6, 0]])
    (tmp_path / "cut.idx").write_bytes((tmp_path / "cut.idx").read_bytes()[:12])
    write_indexed(tmp_path / "folder", [[5, 6, 0]])
    (tmp_path / "folder.idx").unlink()
    (tmp_path / "folder.idx").mkdir()
    for name, message in (
        ("folder.bin", "expected both .*folder.bin and .*folder.idx"),
        (
            "other",
            "holds token 3000, but the tokenizer has 297 tokens; "
            "use the tokenizer it was made with",
        ),
        (
            "no_eos",
            r"documents do not end in the tokenizer's eos \(0\); preprocess with --append-eod",
        ),
        ("short", "has 2 tokens, expected 3 by its index; preprocess the text again"),
        ("alone.bin", "expected both .*alone.bin and .*alone.idx"),
        ("junk", r"not a readable megatron index \(40 bytes\); preprocess the text again"),
        ("cut", r"not a readable megatron index \(12 bytes\); preprocess the text again"),
        ("none", "no such file, nor .*none.bin with .*none.idx; check the path"),
    ):
        with pytest.raises(UserError, match=message) as error:
            TokenStream.open(tmp_path / name, tokenizer, tmp_path / "cache")
        assert "\n" not in str(error.value)


def test_windows_share_one_token_and_stay_inside_a_part() -> None:
    windows = PretrainWindows(TokenStream([np.arange(10), np.arange(20, 23), np.arange(30, 37)]), 3)
    assert [windows[i] for i in range(len(windows))] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
        [30, 31, 32, 33],
        [33, 34, 35, 36],
    ]
    with pytest.raises(IndexError):
        windows[5]
    with pytest.raises(
        UserError, match=r"has 3 tokens, fewer than one window of data.sequence_length \+ 1 = 4"
    ):
        PretrainWindows(TokenStream([np.arange(3)]), 3)


def test_windows_go_through_the_loader() -> None:
    windows = PretrainWindows(TokenStream([np.arange(13)]), 3)
    loader = Loader(
        windows,
        global_batch_size=4,
        micro_batch_size=2,
        data_rank=0,
        data_size=1,
        seed=0,
        collate=pack_windows,
        epochs=1,
    )
    ((first, second),) = list(loader)
    labels = torch.cat([first.labels, second.labels])
    assert sorted(labels.tolist()) == list(range(1, 13))
    assert torch.equal(labels, torch.cat([first.tokens, second.tokens]) + 1)


def test_the_mixture_has_the_configured_fraction_and_is_deterministic() -> None:
    demonstrations = [TokenizedDemonstration([i, i], 1) for i in range(90)]
    windows = PretrainWindows(TokenStream([np.arange(1000, 1201)]), 4)
    mixture = Mixture(demonstrations, windows, 0.1, seed=3)
    rows = [mixture[i] for i in range(len(mixture))]
    assert rows[:90] == demonstrations
    assert len(rows) == 100
    starts = [row.tokens[0] for row in rows[90:]]
    assert all(
        row.tokens == list(range(s, s + 4)) for row, s in zip(rows[90:], starts, strict=True)
    )
    assert len(set(starts)) == 10
    assert [mixture[i] for i in range(100)] == [
        Mixture(demonstrations, windows, 0.1, seed=3)[i] for i in range(100)
    ]
    assert starts != [
        Mixture(demonstrations, windows, 0.1, seed=4)[i].tokens[0] for i in range(90, 100)
    ]
    assert pack_demonstrations(rows[90:91]).loss_mask.tolist() == [True, True, True, False]
    assert len(Mixture(demonstrations, windows, 0.0, seed=3)) == 90


def test_the_loss_weight_makes_the_fraction_the_share_of_the_loss() -> None:
    # Labels: 3 in the response, 1 in the earlier turn; 5, as a first token is no label.
    demonstrations = [
        TokenizedDemonstration([1, 2, 3, 4, 5, 6, 7, 8], 5, ((1, 2),)),
        TokenizedDemonstration([1, 2, 3, 4, 5, 6], 0),
    ] * 20
    windows = PretrainWindows(TokenStream([np.arange(1000)]), 50)
    for fraction in (0.1, 0.3):
        mixture = Mixture(demonstrations, windows, fraction, seed=3)
        packed = pack_demonstrations([mixture[i] for i in range(len(mixture))])
        pretraining, counted = packed.pretraining, packed.loss_mask
        assert pretraining is not None
        mixed, rest = (counted & pretraining).sum(), (counted & ~pretraining).sum()
        assert rest == 20 * (4 + 5) and mixed == mixture.rows * 49
        assert sum(row.num_labels for row in demonstrations) == rest
        weighted = mixture.loss_weight() * float(mixed)
        assert weighted / (weighted + float(rest)) == pytest.approx(fraction)
        assert float(mixed / (mixed + rest)) > 0.5  # what the plain mean gives
    assert Mixture(demonstrations, windows, 0.0, seed=3).loss_weight() == 1.0
    assert pack_demonstrations(demonstrations).pretraining is None


def test_a_mixture_with_too_few_windows_repeats_them_and_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    windows = PretrainWindows(TokenStream([np.arange(9)]), 4)
    mixture = Mixture([TokenizedDemonstration([1], 0)] * 5, windows, 0.5, seed=0)
    assert [mixture[5].tokens, mixture[6].tokens] == [mixture[7].tokens, mixture[8].tokens]
    assert caplog.messages == ["5 pretraining rows are drawn from only 2 windows, so some repeat"]
    with pytest.raises(UserError, match=r"data.pretrain_fraction is 1.0; expected"):
        Mixture([TokenizedDemonstration([1], 0)], windows, 1.0, seed=0)


def blend(
    epochs: int, weights: list[float], parts: tuple[int, ...] = (40, 10), shuffle: bool = True
) -> list[Any]:
    """Return the orders of the first epochs over windows of one token each."""
    stream = TokenStream([np.arange(size + 1) for size in parts])
    windows = PretrainWindows(stream, 1, weights)
    return [windows.order(3, epoch, shuffle).tolist() for epoch in range(epochs)]


def test_a_blend_draws_sources_by_weight_and_each_window_once_per_pass() -> None:
    """With equal weights, an epoch of 50 has 25 draws of each source, evenly spread."""
    orders = blend(8, [3.0, 3.0])
    assert orders == blend(8, [1.0, 1.0])
    assert [len(order) for order in orders] == [50] * 8
    for order in orders:
        small = np.cumsum([window >= 40 for window in order])
        assert np.abs(small - np.arange(1, 51) / 2).max() <= 1
    for first, size in ((0, 40), (40, 10)):
        drawn = [window for order in orders for window in order if first <= window < first + size]
        assert len(drawn) == 200
        passes = [drawn[start : start + size] for start in range(0, 200, size)]
        assert all(sorted(own) == list(range(first, first + size)) for own in passes)
        assert passes[0] != passes[1]
    assert blend(1, [3.0, 1.0], shuffle=False)[0][:8] == [0, 1, 40, 2, 3, 4, 41, 5]


def test_a_blend_is_the_same_with_every_layout_and_resumes() -> None:
    windows = PretrainWindows(TokenStream([np.arange(41), np.arange(100, 111)]), 1, [1.0, 1.0])

    def loader(rank: int = 0, size: int = 1, source: PretrainWindows = windows) -> Loader[Any, Any]:
        return Loader(
            source,
            global_batch_size=12,
            micro_batch_size=2,
            data_rank=rank,
            data_size=size,
            seed=5,
            collate=list,
            epochs=3,
            order=source.order,
        )

    whole = [[window for micro in step for window in micro] for step in loader()]
    assert all(sum(window[0] >= 100 for window in step) == 6 for step in whole)
    shares = [list(loader(rank, 3)) for rank in range(3)]
    joined = [
        [w for own in step for micro in own for w in micro] for step in zip(*shares, strict=True)
    ]
    assert joined == whole
    started = loader()
    for _ in zip(started, range(5), strict=False):
        pass
    state = started.state_dict()
    resumed = loader(1, 2)
    resumed.load_state_dict(state)
    rest = [[window for micro in step for window in micro] for step in resumed]
    assert rest == [step[6:] for step in whole[-len(rest) :]]
    assert len(rest) == len(whole) - state["epoch"] * 4 - state["cursor"] // 12
    other = PretrainWindows(windows.stream, 1, [1.0, 2.0])
    with pytest.raises(UserError, match="cannot resume the data order: the checkpoint has order"):
        loader(source=other).load_state_dict(state)


def test_a_source_too_small_for_a_window_cannot_be_blended() -> None:
    stream = TokenStream([np.arange(10), np.arange(3)])
    with pytest.raises(
        UserError, match=r"source 2 of data.pretrain has 3 tokens, fewer than one window"
    ):
        PretrainWindows(stream, 4, [0.5, 0.5])


def test_several_workers_write_the_same_bytes_as_one(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "PIECE", 200)
    texts = [f"the cat {i} <|endoftext|> sat on the mat.\n" * (1 + i % 12) for i in range(60)]
    path = jsonl(*[{"text": text} for text in texts])
    for workers in (1, 2):
        result = indexed.write_indexed(
            [path, path], tokenizer, tmp_path / str(workers) / "corpus", workers=workers
        )
        assert result["documents"] == 120
    for name in ("corpus.bin", "corpus.idx"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "2").iterdir()) == ["corpus.bin", "corpus.idx"]
    (part,) = TokenStream.open(tmp_path / "2" / "corpus", tokenizer, tmp_path / "cache").parts
    assert len(part) == result["tokens"]
    assert (
        tokenizer.decode(part[: np.flatnonzero(part == tokenizer.eos_token_id)[0]].tolist())
        == texts[0]
    )
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        indexed.write_indexed(tmp_path / "none.jsonl", tokenizer, tmp_path / "none", workers=2)
    bad = jsonl({"text": 3}, {"text": "fine"}, name="bad.jsonl")
    assert (
        indexed.write_indexed(bad, tokenizer, tmp_path / "bad", on_error="quarantine")["rejected"]
        == 1
    )
    assert '"source"' in (tmp_path / "bad.rejected.jsonl").read_text()
