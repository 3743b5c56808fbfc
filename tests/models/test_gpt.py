"""Stages on one rank: dropout, recomputation, dtypes, heads, initial weights, parameter counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrlhf.config import ModelConfig, load_config
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.models import attention, eager_forward
from fastrlhf.models.attention import packed_attention
from fastrlhf.models.gpt import GPT, VOCAB_MULTIPLE, build_model, global_names
from fastrlhf.models.layout import SequenceLayout
from fastrlhf.parallel.mesh import Mesh, seed_generators

VOCAB = 101
CONFIGS = Path(__file__).parents[2] / "configs" / "instructgpt"
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
    "dtype": "fp32",
}
GPT2 = {"family": "gpt", **SHAPE}
LLAMA = {"family": "llama", "num_kv_heads": 2, "ffn_size": 48, **SHAPE}


@pytest.fixture
def batch(sequences: list[list[int]]) -> PackedBatch:
    return pack(sequences, [0] * len(sequences))


def loss_and_gradients(
    stage: GPT, batch: PackedBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    stage.zero_grad()
    logits = stage(batch) @ stage.lm_head()["weight"].t()
    loss = F.cross_entropy(logits[:, :VOCAB], batch.labels, ignore_index=-100)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None
    }


class TestDropout:
    """Each dropout acts in training only, at its rate, and keeps the expectation."""

    @pytest.mark.parametrize("kind", ["residual_dropout", "embedding_dropout", "attention_dropout"])
    def test_acts_in_training_only(self, kind: str, mesh: Mesh, batch: PackedBatch) -> None:
        stage = build_model(ModelConfig(**(GPT2 | {kind: 0.3})), mesh, VOCAB, seed=1)
        plain = build_model(ModelConfig(**GPT2), mesh, VOCAB, seed=1)
        with torch.no_grad():
            expected = plain(batch)
            assert not torch.equal(stage.train()(batch), expected)
            assert not torch.equal(stage(batch), stage(batch))
            assert torch.equal(stage.eval()(batch), expected)

    def test_residual(self, mesh: Mesh, batch: PackedBatch) -> None:
        """The residual update is 0 with probability p, else the sub-layer's output / (1 - p)."""
        p = 0.25
        stage = build_model(ModelConfig(**GPT2, residual_dropout=p), mesh, VOCAB, seed=1).train()
        seen: dict[str, Any] = {}
        layer = stage.decoder.layers[0]
        for name in ("self_attention", "mlp"):
            getattr(layer, name).register_forward_hook(
                lambda *args, n=name: seen.update({n: args[-1]})
            )
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            getattr(layer, name).register_forward_hook(
                lambda *args, n=name: seen.update({n: args[1][0]})
            )
        layer.register_forward_hook(lambda *args: seen.update(output=args[-1][0]))
        with torch.no_grad():
            stage(batch)
        stream = [seen["input_layernorm"], seen["pre_mlp_layernorm"], seen["output"]]
        for before, after, name in zip(stream, stream[1:], ("self_attention", "mlp"), strict=False):
            output, bias = seen[name]
            added = after - before
            kept = added != 0
            count = added.numel()
            assert abs(kept.float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
            expected = ((output + bias) / (1 - p))[kept]
            torch.testing.assert_close(added[kept], expected, atol=1e-6, rtol=1e-4)

    def test_embedding(self, mesh: Mesh, batch: PackedBatch) -> None:
        p = 0.4
        stage = build_model(ModelConfig(**GPT2, embedding_dropout=p), mesh, VOCAB, seed=1)
        with torch.no_grad():
            full = stage.eval().embedding(batch.tokens[None], batch.positions[None])
            dropped = stage.train().embedding(batch.tokens[None], batch.positions[None])
        kept = dropped != 0
        assert abs(kept.float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        torch.testing.assert_close(dropped[kept], (full / (1 - p))[kept])

    def test_attention_keeps_its_expectation(self, mesh: Mesh, batch: PackedBatch) -> None:
        torch.manual_seed(0)
        q, k, v = (torch.randn(batch.tokens.numel(), 2, 8) for _ in range(3))
        layout = SequenceLayout.packed(batch.positions, batch.cu_seqlens, batch.max_seqlen)
        exact = packed_attention(q, k, v, layout)
        draws = torch.stack([packed_attention(q, k, v, layout, dropout=0.2) for _ in range(1000)])
        error = draws.std(dim=0) / math.sqrt(len(draws))
        # 5 sigma over ~1000 outputs, plus a margin for the one-token rows, whose distribution is
        # far from normal.
        assert ((draws.mean(dim=0) - exact).abs() < 5 * error + 1e-6).all()
        assert (draws.std(dim=0) > 0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("recompute", "layers", "again"), [("selective", None, 2), ("full", None, 2), ("full", 1, 1)]
)
def test_recomputation_changes_nothing(
    recompute: Any, layers: int | None, again: int, dropout: float, mesh: Mesh, batch: PackedBatch
) -> None:
    options: dict[str, Any] = {
        "residual_dropout": dropout,
        "attention_dropout": dropout,
        "embedding_dropout": dropout,
    }
    results, passes = [], []
    for choice in ({}, {"recompute": recompute, "recompute_layers": layers}):
        stage = build_model(ModelConfig(**LLAMA, **options, **choice), mesh, VOCAB, seed=1).train()
        calls: list[int] = []
        for layer in stage.decoder.layers:
            layer.self_attention.core_attention.register_forward_hook(
                lambda *_, n=calls: n.append(1)
            )
        seed_generators(mesh, 5)
        results.append(loss_and_gradients(stage, batch))
        passes.append(len(calls))
    assert passes == [2, 2 + again]  # two layers, and some of them again in the backward
    (loss, gradients), (same, recomputed) = results
    assert torch.equal(loss, same)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_model_has_an_fp32_scalar_head(
    dtype: Any, mesh: Mesh, batch: PackedBatch
) -> None:
    stage = build_model(
        ModelConfig(**{**LLAMA, "dtype": dtype}), mesh, VOCAB, head="scalar", seed=1
    )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("score.") else half), name
    hidden = stage(batch)
    scores = stage.score(hidden)
    assert (hidden.dtype, scores.dtype, scores.shape) == (half, torch.float32, batch.tokens.shape)
    expected = hidden.double() @ stage.score.weight.double() + stage.score.bias.double()
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=1e-6)


def test_initial_weights(mesh: Mesh) -> None:
    """Weights follow GPT-2's initialization and depend on the seed; padding rows are 0."""
    model = ModelConfig(**{**GPT2, "hidden_size": 128, "num_layers": 8}, init_std=0.05)
    stage = build_model(model, mesh, VOCAB, seed=1)
    for name, parameter in stage.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = 0.05 / 4 if residual else 0.05
            rows = parameter[:VOCAB] if "word_embeddings" in name else parameter
            # The standard error of a standard deviation is sigma / sqrt(2 n).
            assert abs(rows.std().item() - expected) < 5 * expected / math.sqrt(2 * rows.numel()), (
                name
            )
    assert (stage.embedding.word_embeddings.weight[VOCAB:] == 0).all()
    same, other = (build_model(model, mesh, VOCAB, seed=seed) for seed in (1, 2))
    weights = [s.decoder.layers[3].mlp.linear_fc1.weight for s in (stage, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    score = build_model(model, mesh, VOCAB, head="scalar", seed=1).score
    assert abs(score.weight.std().item() - 1 / math.sqrt(129)) < 5 / math.sqrt(129 * 2 * 128)
    assert score.bias.item() == 0


def expected_parameters(model: ModelConfig, vocab_size: int, head: str) -> int:
    """Return the number of parameters by the formula of the architecture."""
    H, L, d, ffn = model.hidden_size, model.num_layers, model.head_dim, model.ffn_size
    padded = math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    qkv = (model.num_heads + 2 * model.num_kv_heads) * d
    norm = 2 * H if model.norm == "layernorm" else H
    inputs = 2 * ffn if model.activation == "swiglu" else ffn
    layer = H * qkv + model.num_heads * d * H + H * inputs + ffn * H + 2 * norm
    layer += model.qkv_bias * qkv + model.bias * (H + inputs + H) + model.qk_norm * 2 * d
    positions = model.max_positions * H if model.position == "learned" else 0
    ends = {"lm": 0 if model.tie_embeddings else padded * H, "scalar": H + 1}[head]
    return padded * H + positions + L * layer + norm + ends


def count(stage: GPT) -> int:
    return sum(parameter.numel() for _, parameter in global_names(stage))


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qk_norm": True},
        {"qkv_bias": True, "head_dim": 16},
        {"bias": True},
    ],
)
@pytest.mark.parametrize("family", [GPT2, LLAMA])
def test_parameter_count(
    family: dict[str, Any], changes: dict[str, Any], head: Any, mesh: Mesh
) -> None:
    model = ModelConfig(**{**family, **changes})
    if model.norm == "layernorm" and model.qk_norm:
        model = model.model_copy(update={"qk_norm": False})
    assert count(build_model(model, mesh, VOCAB, head=head, device="meta")) == expected_parameters(
        model, VOCAB, head
    )


@pytest.mark.parametrize(
    ("model", "vocab_size", "published"),
    [
        # GPT-2 small: 124,439,808 parameters with 50,257 rows of 768. Ours has 47 more rows.
        (
            {
                "family": "gpt",
                "num_layers": 12,
                "hidden_size": 768,
                "num_heads": 12,
                "max_positions": 1024,
            },
            50257,
            124_439_808 + 47 * 768,
        ),
        # Llama 7B (Touvron et al. 2023), rounded to 6.7 billion in the paper.
        (
            {
                "family": "llama",
                "num_layers": 32,
                "hidden_size": 4096,
                "num_heads": 32,
                "ffn_size": 11008,
                "max_positions": 2048,
            },
            32000,
            6_738_415_616,
        ),
        # Mistral 7B (Jiang et al. 2023), grouped-query attention.
        (
            {
                "family": "llama",
                "num_layers": 32,
                "hidden_size": 4096,
                "num_heads": 32,
                "num_kv_heads": 8,
                "ffn_size": 14336,
                "max_positions": 32768,
            },
            32000,
            7_241_732_096,
        ),
    ],
)
def test_published_parameter_counts(
    model: dict[str, Any], vocab_size: int, published: int, mesh: Mesh
) -> None:
    assert count(build_model(ModelConfig(**model), mesh, vocab_size, device="meta")) == published


def test_every_instructgpt_configuration_has_the_expected_parameter_count(
    mesh: Mesh,
) -> None:
    files = sorted(CONFIGS.glob("*/*.yaml"))
    assert len(files) >= 12, f"expected the configurations of the paper's models under {CONFIGS}"
    for file in files:
        model = load_config(file).model
        vocab_size = model.vocab_size or 50257
        head: Any = "scalar" if file.stem == "rm" else "lm"
        stage = build_model(model, mesh, vocab_size, head=head, device="meta")
        assert count(stage) == expected_parameters(model, vocab_size, head), file


def test_shards_and_replicas_are_marked(mesh: Mesh) -> None:
    """A parameter is marked as a shard if its layer shards it.

    The gradient norm counts a replica once and a shard on every rank.
    """
    stage = build_model(ModelConfig(**GPT2), mesh, VOCAB, seed=1)
    for name, parameter in stage.named_parameters():
        sharded = any(part in name for part in ("linear_qkv", "linear_fc1", "word_embeddings"))
        sharded |= name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert getattr(parameter, "tensor_model_parallel", False) == sharded, name


@pytest.mark.parametrize(
    ("width", "varlen"),
    [(8, True), (128, True), (256, True), (4, False), (12, False), (264, False)],
)
def test_head_widths_without_a_flash_kernel_use_sdpa(
    width: int, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is chosen as on a GPU in half precision; the fake tensors have no storage."""
    chosen = []
    monkeypatch.setattr(attention, "HAVE_FLASH_ATTN", False)
    monkeypatch.setattr(
        torch.nn.attention.varlen, "varlen_attn", lambda q, *_, **__: chosen.append(True) or q
    )
    monkeypatch.setattr(attention, "_padded_attention", lambda q, *_: chosen.append(False) or q)
    with eager_forward.no_torch_function(), FakeTensorMode():  # keep the cuda device
        q = torch.empty(10, 4, width, dtype=torch.bfloat16, device="cuda")
        layout = SequenceLayout.packed(torch.empty(10), torch.empty(4), 5)
        layout.__dict__["paddings"] = (None,)
        packed_attention(q, q, q, layout)
    assert chosen == [varlen]
