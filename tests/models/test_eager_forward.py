"""The eager forward pass and its gradients equal those of megatron's modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastrlhf.config import ModelConfig
from fastrlhf.data.batches import pack
from fastrlhf.models import gpt
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.parallel.mesh import Mesh

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"family": "llama", "num_kv_heads": 2, "ffn_size": 48},
    "exact gelu, no biases, untied": {"activation": "gelu", "bias": False, "tie_embeddings": False},
    "biases only in qkv, normalised heads": {
        "family": "llama",
        "num_kv_heads": 2,
        "ffn_size": 48,
        "qkv_bias": True,
        "qk_norm": True,
        "head_dim": 16,
    },
    "rope and layernorm": {"position": "rope"},
    "scaled rope, window in the second layer": {
        "family": "llama",
        "ffn_size": 48,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_positions": 8,
        "sliding_window": 5,
        "full_attention_layers": 1,
    },
}
LENGTHS = {"mixed": (1, 9, 4, 30), "equal": (8, 8, 8), "single": (13,)}


def build(mesh: Mesh, **changes: Any) -> GPT:
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "max_positions": 64,
        "dtype": "fp32",
        "init_std": 0.15,
    }
    return build_model(ModelConfig(**{"family": "gpt", **sizes, **changes}), mesh, 101, seed=5)


def gradients(stage: GPT, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return hidden states and the gradients of their randomly weighted sum."""
    generator = torch.Generator().manual_seed(3)
    batch = pack(
        [torch.randint(0, 101, (n,), generator=generator).tolist() for n in lengths],
        [0] * len(lengths),
    )
    stage.zero_grad()
    hidden = stage(batch)
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    found = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    return found | {"hidden": hidden.detach()}


def assert_close(
    ours: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    bound: Callable[..., float],
    model: ModelConfig,
) -> None:
    """Compare each tensor's differences with its largest element.

    Its small elements are sums that cancel.
    """
    assert expected.keys() == ours.keys() and len(expected) > 10
    longest, tokens = (
        max(max(lengths) for lengths in LENGTHS.values()),
        max(sum(n) for n in LENGTHS.values()),
    )
    for name, value in expected.items():
        relative = bound(model, longest, tokens, backward=name != "hidden")
        torch.testing.assert_close(
            ours[name], value, atol=relative * float(value.abs().max()), rtol=0, msg=name
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_gradients_equal_the_modules(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, name: str, rounding: Callable[..., float]
) -> None:
    stage = build(mesh, **VARIANTS[name])
    ours = {kind: gradients(stage, lengths) for kind, lengths in LENGTHS.items()}
    monkeypatch.setattr(GPT, "_use_eager_forward", False)
    for kind, lengths in LENGTHS.items():
        assert_close(ours[kind], gradients(stage, lengths), rounding, stage.model_config)


@pytest.mark.parametrize(
    ("changes", "training", "grad", "eager"),
    [
        ({}, True, True, True),
        ({"residual_dropout": 0.1}, True, True, False),
        ({"attention_dropout": 0.1}, True, False, False),
        ({"embedding_dropout": 0.1}, False, True, True),
        ({"recompute": "full"}, True, True, False),
        ({"recompute": "full"}, True, False, True),
    ],
)
def test_used_only_where_the_result_is_the_same(
    mesh: Mesh, changes: dict[str, Any], training: bool, grad: bool, eager: bool
) -> None:
    stage = build(mesh, **changes).train(training)
    with torch.set_grad_enabled(grad):
        assert stage._use_eager_forward is (eager and mesh.device.type == "cpu")


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_functions_fused_on_a_gpu_are_the_same_arithmetic(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, name: str, rounding: Callable[..., float]
) -> None:
    """megatron's fused activation and residual sum agree, uncompiled; its fused GELU is tanh's."""
    expected = gradients(build(mesh, **VARIANTS[name]), LENGTHS["mixed"])
    of_gpu = dataclasses.replace(mesh, device=torch.device("cuda"))
    config = gpt.stage_config
    monkeypatch.setattr(gpt, "stage_config", lambda model, _mesh: config(model, of_gpu))
    monkeypatch.setattr(GPT, "_use_eager_forward", False)
    stage = build(mesh, **VARIANTS[name])
    assert stage.config.bias_activation_fusion and stage.config.bias_dropout_fusion
    with torch.compiler.set_stance("force_eager"):
        fused = gradients(stage, LENGTHS["mixed"])
    assert_close(fused, expected, rounding, stage.model_config)
