"""Responses that branch from one prompt have the scores and gradients of separate forwards."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrlhf.config import ModelConfig
from fastrlhf.data.batches import (
    RankingBatch,
    TokenizedRanking,
    pack_branches,
    pack_rankings,
    ranking_tokens,
)
from fastrlhf.models.attention import packed_attention
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.layout import SequenceLayout
from fastrlhf.ops import pairwise_ranking_loss
from fastrlhf.parallel.mesh import Mesh

VOCAB = 101
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
    "dtype": "fp32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt", **SHAPE},
    "llama": {"family": "llama", "num_kv_heads": 2, "ffn_size": 48, **SHAPE},
    "window": {"family": "llama", "ffn_size": 48, "sliding_window": 4, **SHAPE},
}
# (prompt tokens, tokens of each response). "several" has a prompt of a single token, and one with
# two responses of a single token.
PACKINGS = {
    "one": [(17, (5, 1, 9, 3))],
    "several": [(17, (5, 1, 9, 3)), (1, (4, 2, 11)), (30, (1, 1)), (6, (8, 8, 8, 2, 1))],
}


def rankings(packing: str) -> list[TokenizedRanking]:
    generator = torch.Generator().manual_seed(5)

    def draw(length: int) -> list[int]:
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    return [
        TokenizedRanking(
            draw(prompt), [draw(length) for length in responses], list(range(len(responses)))
        )
        for prompt, responses in PACKINGS[packing]
    ]


def build(mesh: Mesh, family: str, **changes: Any) -> GPT:
    return build_model(
        ModelConfig(**{**FAMILIES[family], "init_std": 0.2, **changes}),
        mesh,
        VOCAB,
        head="scalar",
        seed=1,
    )


def scores_and_gradients(
    stage: GPT, batch: RankingBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    stage.zero_grad()
    scores = stage.score(stage(batch)[batch.last_index])
    pairwise_ranking_loss(scores, batch.ranks, batch.prompt_offsets).loss.backward()
    return scores.detach(), {
        name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None
    }


def assert_same(
    one: tuple[torch.Tensor, dict], other: tuple[torch.Tensor, dict], tolerance: float = 1e-5
) -> None:
    (scores, gradients), (same_scores, same_gradients) = one, other
    assert scores.std() > 0.1
    torch.testing.assert_close(same_scores, scores, atol=tolerance, rtol=tolerance)
    assert gradients.keys() == same_gradients.keys()
    # A pairwise loss does not change when all scores change by the same amount, so the last biases
    # have gradients of 0: sums of up to 16 terms of size 1 that cancel up to 6 standard deviations
    # of their rounding, eps sqrt(6 * 16) = 1.2e-6.
    for name, gradient in gradients.items():
        assert (
            same_gradients[name] - gradient
        ).abs().max() <= 1.2e-6 + tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_separate_forwards(
    family: str, packing: str, mesh: Mesh
) -> None:
    stage, groups = build(mesh, family), rankings(packing)
    shared, separate = pack_rankings(groups, shared_prompt=True), pack_rankings(groups)
    assert shared.tokens.numel() == sum(
        ranking_tokens(group, shared_prompt=True) for group in groups
    )
    assert separate.tokens.numel() == sum(
        ranking_tokens(group, shared_prompt=False) for group in groups
    )
    assert (
        shared.unshared_tokens()
        == separate.unshared_tokens()
        == separate.tokens.numel()
        > shared.tokens.numel()
    )
    assert_same(scores_and_gradients(stage, separate), scores_and_gradients(stage, shared))


def test_packing_prompts_together_changes_nothing(mesh: Mesh) -> None:
    stage, groups = build(mesh, "llama"), rankings("several")
    with torch.no_grad():
        together = stage(batch := pack_rankings(groups, shared_prompt=True))[batch.last_index]
        alone = [
            stage(b := pack_rankings([group], shared_prompt=True))[b.last_index] for group in groups
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_no_response_sees_another(mesh: Mesh) -> None:
    """Changing a response changes its score alone; changing a prompt, those of its responses."""
    stage, groups = build(mesh, "gpt").eval(), rankings("several")

    def score(groups: Sequence[TokenizedRanking]) -> torch.Tensor:
        batch = pack_rankings(groups, shared_prompt=True)
        with torch.no_grad():
            return stage.score(stage(batch)[batch.last_index])

    before = score(groups)
    groups[0].responses[2][0] ^= 1
    moved = (score(groups) - before).abs() > 1e-6
    assert moved.nonzero().flatten().tolist() == [2]
    before = score(groups)
    groups[1].prompt_tokens[0] ^= 1
    moved = (score(groups) - before).abs() > 1e-6
    assert moved.nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str, mesh: Mesh) -> None:
    batch = pack_rankings(rankings("several"), shared_prompt=True)
    plain, again = (
        scores_and_gradients(build(mesh, "llama", recompute=r).train(), batch)
        for r in ("none", recompute)
    )
    assert_same(plain, again)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    left: int = -1,
) -> torch.Tensor:
    """Compute what variable-length kernels do with causal=True (flash-attn >= 2.1).

    A sequence's last query attends to all its keys, the query before it to all but the last, and so
    on. A kv head serves a group of query heads. `left` is the number of keys to the left of a query
    that it attends to, -1 for all of them.
    """
    out = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) / math.sqrt(q.shape[-1])
        diagonal = k1 - k0 - (q1 - q0)
        hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(diagonal + 1)
        if left >= 0:
            hidden |= torch.ones_like(hidden).tril(diagonal - left - 1)
        out.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
        )
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_arguments_of_variable_length_kernels(
    packing: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's path, its kernel replaced by torch, has the padded path's outputs and gradients."""

    def flash_attn_varlen_func(
        *args: Any, dropout_p: float, causal: bool, window_size: tuple[int, int]
    ) -> torch.Tensor:
        assert dropout_p == 0.0 and causal and window_size[1] == 0
        return varlen_attention(*args, left=window_size[0])

    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    )
    batch = pack_rankings(rankings(packing), shared_prompt=True)
    generator = torch.Generator().manual_seed(2)
    T = batch.tokens.numel()
    inputs = [
        torch.randn(T, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    ]
    upstream = torch.randn(T, 4, 8, generator=generator)
    results = []
    for backend in ("sdpa", "flash"):
        layout = SequenceLayout.of(batch)
        layout.set_window(window)
        out = packed_attention(*inputs, layout, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream)))
    for padded, varlen in zip(*results, strict=True):
        torch.testing.assert_close(varlen, padded, atol=1e-5, rtol=1e-5)


def test_attention_dropout_keeps_its_expectation() -> None:
    torch.manual_seed(0)
    batch = pack_rankings(rankings("several"), shared_prompt=True)
    q, k, v = (torch.randn(batch.tokens.numel(), heads, 8) for heads in (4, 2, 2))
    layout = SequenceLayout.of(batch)
    exact = packed_attention(q, k, v, layout)
    draws = torch.stack([packed_attention(q, k, v, layout, dropout=0.2) for _ in range(500)])
    error = draws.std(dim=0) / math.sqrt(len(draws))
    # 6 sigma over ~3500 outputs, plus a margin for tokens with few keys, whose distribution is far
    # from normal.
    assert ((draws.mean(dim=0) - exact).abs() < 6 * error + 1e-6).all()
    assert (draws.std(dim=0) > 0).all()


def test_half_precision_differs_by_its_rounding_alone(mesh: Mesh) -> None:
    groups = rankings("several")
    exact, _ = scores_and_gradients(build(mesh, "llama"), pack_rankings(groups))
    stage = build(mesh, "llama", dtype="bf16")
    errors = []
    for shared_prompt in (False, True):
        scores, _ = scores_and_gradients(stage, pack_rankings(groups, shared_prompt=shared_prompt))
        errors.append((scores - exact).abs().max())
    assert errors[1] <= 2 * errors[0]


def test_two_prompts_by_hand() -> None:
    batch, last = pack_branches([[1, 2], [7]], [[[3, 0], [4, 5, 0]], [[8, 0], [9]]])
    assert batch.tokens.tolist() == [1, 2, 3, 0, 4, 5, 0, 7, 8, 0, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 7, 8, 10, 11]
    assert batch.key_index is not None and batch.cu_seqlens_kv is not None
    assert batch.key_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 7, 8, 9, 7, 10]
    assert batch.cu_seqlens_kv.tolist() == [0, 2, 6, 11, 12, 15, 17]
    assert (batch.max_seqlen, batch.max_seqlen_kv) == (3, 5)
    assert batch.labels.tolist() == [2, -100, 0, -100, 5, 0, -100, -100, 0, -100, -100]
    assert batch.loss_mask.tolist() == [
        False,
        False,
        True,
        False,
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert last.tolist() == [3, 6, 9, 10]
    dtypes = (batch.positions, batch.key_index, batch.cu_seqlens_kv, last)
    assert [t.dtype for t in dtypes] == [torch.int64, torch.int64, torch.int32, torch.int64]


tokens = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=6), st.lists(tokens, min_size=1)),
        min_size=1,
        max_size=5,
    )
)
def test_a_response_reads_its_prompt_and_itself(
    groups: list[tuple[list[int], list[list[int]]]],
) -> None:
    batch, last = pack_branches(
        [prompt for prompt, _ in groups], [responses for _, responses in groups]
    )
    assert batch.key_index is not None and batch.cu_seqlens_kv is not None
    read = {}
    for s in range(batch.num_sequences):
        keys = batch.key_index[batch.cu_seqlens_kv[s] : batch.cu_seqlens_kv[s + 1]]
        assert batch.positions[keys].tolist() == list(range(len(keys)))
        assert keys[-1] == batch.cu_seqlens[s + 1] - 1
        read[int(keys[-1])] = batch.tokens[keys].tolist()
    expected = [prompt + response for prompt, responses in groups for response in responses]
    assert [read[place] for place in last.tolist()] == expected
    # The first label of a response would belong to a token of its prompt; all others count.
    assert batch.loss_mask.sum() == sum(
        len(response) - 1 for _, responses in groups for response in responses
    )
    # The other sequences are the prompts, each once.
    assert batch.num_sequences == len(expected) + sum(bool(prompt) for prompt, _ in groups)


def test_moves_with_its_batch_and_rejects_empty_responses() -> None:
    batch = pack_rankings(rankings("one"), shared_prompt=True).to("meta")
    assert batch.key_index is not None and batch.key_index.device.type == "meta"
    for shared_prompt in (False, True):
        with pytest.raises(ValueError, match="ranking 1: response 1 is empty"):
            pack_rankings(
                [
                    TokenizedRanking([1], [[2], [3]], (1, 2)),
                    TokenizedRanking([1], [[2], []], (1, 2)),
                ],
                shared_prompt=shared_prompt,
            )
