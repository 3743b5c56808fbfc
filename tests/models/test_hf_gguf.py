"""GGUF files, if the gguf and accelerate packages are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrlhf.errors import UserError
from fastrlhf.models.gpt import build_model
from fastrlhf.models.hf import files, load_hf, model_config_from_hf, verify_logits
from fastrlhf.parallel.mesh import Mesh

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a projection for GGUF.

    GGUF's Llama rotates neighbouring pairs, transformers' rotates the two halves of a head.
    """
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, *, extra: str | None = None) -> Path:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    pytest.importorskip("accelerate", reason="the accelerate package is not installed")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    layers = {
        f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}"
        for i in range(config.num_hidden_layers)
        for theirs, ours in LAYER.items()
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if "q_proj" in name:
            weight = interleave(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = interleave(weight, config.num_key_value_heads)
        stored = (NAMES | layers)[name.removesuffix(".weight")]
        writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(weight))
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("variant", ["llama", "smollm"])
def test_llama_in_gguf(
    variant: str,
    hf_model: Callable[..., Any],
    hf_folder: Any,
    mesh: Mesh,
    tmp_path: Path,
    logit_bound: Any,
) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model(variant))
    model = model_config_from_hf(path)
    assert model.tie_embeddings == (variant == "smollm")
    stage = build_model(model, mesh, 101)
    load_hf(path, stage)
    assert verify_logits(stage, path, mesh) < logit_bound(model)
    assert verify_logits(stage, hf_folder(variant), mesh) < logit_bound(model)


@pytest.mark.parametrize(
    ("extra", "message"),
    [("rope_freqs.weight", "rope_freqs"), ("blk.0.attn_q_norm.weight", "tensors in the file")],
)
def test_tensors_that_transformers_would_skip(
    extra: str, message: str, hf_model: Callable[..., Any], mesh: Mesh, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"), extra=extra)
    stage = build_model(model_config_from_hf(path), mesh, 101)
    with pytest.raises(UserError, match=message):
        load_hf(path, stage)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install gguf accelerate"):
        files.open_tensors(tmp_path / "model.gguf")
