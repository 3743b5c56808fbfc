"""Fixtures: tiny random Hugging Face models, their folders and their stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastrlhf.config import ModelConfig
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.hf import load_hf, model_config_from_hf
from fastrlhf.parallel.mesh import Mesh

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
# All architectures, with every option that changes the arithmetic or the tensors.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-exact-gelu-untied": {
        "model_type": "gpt2",
        **GPT2,
        "activation_function": "gelu",
        "n_inner": 40,
        "tie_word_embeddings": False,
    },
    "llama": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama-biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "smollm": {
        "model_type": "llama",
        **SIZES,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen2-tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16},
    # Frequencies of 1, 0.2, 0.04 and 0.009 radians per token: one kept, one interpolated, two
    # divided. Sequences are four times as long as the original positions.
    "llama3-rope": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 0.2,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8,
        },
    },
    "linear-rope": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "mistral-window": {"model_type": "mistral", **SIZES, "sliding_window": 5, "head_dim": 16},
    "qwen2-window": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3-window": {
        "model_type": "qwen3",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 1,
        "max_window_layers": 1,
    },
}


@pytest.fixture(scope="session")
def largest_logit() -> float:
    """Return a bound on the logits and scores of `hf_model`'s models, the scale of their rounding.

    test_hf_parity.py checks it.
    """
    return 6.0


@pytest.fixture(scope="session")
def logit_bound(
    rounding: Callable[..., float], largest_logit: float
) -> Callable[[ModelConfig], float]:
    """Return `logit_bound(model)`: the difference allowed between two fp32 evaluations of logits.

    It is for sequences of up to 33 tokens.
    """
    return lambda model: largest_logit * rounding(model, 33)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Return each architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def hf_model() -> Callable[..., Any]:
    """Return `hf_model(variant, auto_class, **options)`, which makes a tiny random model.

    transformers initializes biases to 0 and norms to 1, which would hide mistakes.
    """

    def build(variant: str, kind: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
        config = transformers.AutoConfig.for_model(**{**VARIANTS[variant], **options})
        torch.manual_seed(3)
        model = kind.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture(scope="session")
def hf_folder(
    tmp_path_factory: pytest.TempPathFactory, hf_model: Callable[..., Any]
) -> Callable[[str], Path]:
    """Return `hf_folder(variant)`: the folder of `hf_model(variant)`, written once, read-only."""
    folders: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp(variant)
            hf_model(variant).save_pretrained(folders[variant])
        return folders[variant]

    return folder


@pytest.fixture
def load(mesh: Mesh) -> Callable[..., GPT]:
    """Return `load(folder, **changes)`: the stage of a Hugging Face model, in evaluation mode."""

    def load_stage(folder: Path, **changes: Any) -> GPT:
        model = model_config_from_hf(folder).model_copy(update=changes)
        stage = build_model(model, mesh, VOCAB)
        load_hf(folder, stage)
        return stage.eval()

    return load_stage


@pytest.fixture
def sequences() -> list[list[int]]:
    """Return random sequences of several lengths, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(VOCAB, (length,), generator=generator).tolist()
        for length in (1, 9, 2, 33, 17)
    ]
