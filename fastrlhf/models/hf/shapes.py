"""Conversion of a Hugging Face folder's config.json to a ModelConfig, and back.

An option that our stages do not implement is an error that names the option and its value: a model
that loads is the model that was saved. Mistral without a sliding window that masks anything and
SmolLM are bitwise identical to Llama, so they are written back as Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from fastrlhf.config import ModelConfig
from fastrlhf.data.foreign_errors import foreign_errors
from fastrlhf.errors import UserError
from fastrlhf.models.heads import Head
from fastrlhf.models.hf.positions import (
    ConfigFields,
    read_rope,
    read_window,
    refuse,
    rope_parameters,
    window_fields,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_GELU = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_HF_GELU = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def gguf_arguments(path: str | Path) -> tuple[str, dict[str, str]]:
    """Return the arguments with which transformers' `from_pretrained` reads a folder or .gguf file.

    The result is (folder, additional keyword arguments).
    """
    path = Path(path)
    return (
        (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
    )


def read_hf_config(path: str | Path) -> PretrainedConfig:
    """Read transformers' configuration of a local model folder or .gguf file.

    Raises UserError if there is none.
    """
    from transformers import AutoConfig

    path = Path(path)
    wanted = path if path.suffix == ".gguf" else path / "config.json"
    if not wanted.is_file():
        raise UserError(
            f"{path}: no Hugging Face model here; expected a local folder with config.json, or a "
            ".gguf file"
        )
    folder, gguf = gguf_arguments(path)

    def damaged(reason: str) -> UserError:
        supported = ", ".join(sorted(_READERS))
        return UserError(f"{wanted}: {reason}; supported model types: {supported}")

    with foreign_errors(damaged):
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **gguf
        )


def model_config_from_hf(path: str | Path) -> ModelConfig:
    """Return the shape, dropouts and dtype of the model saved in a local folder or .gguf file.

    Raises UserError naming the option if the architecture or one of its options is not supported.
    """
    config = read_hf_config(path)
    if config.model_type not in _READERS:
        supported = ", ".join(sorted(_READERS))
        raise UserError(
            f"{path}: model_type {config.model_type} is not supported; supported are {supported}"
        )
    if getattr(config, "quantization_config", None) is not None and Path(path).suffix != ".gguf":
        refuse(
            path, "quantization_config", config.quantization_config, "weights in fp32, bf16 or fp16"
        )
    dtype = getattr(config, "dtype", None) or torch.float32
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:  # it may be a mapping
        refuse(path, "dtype", dtype, "float32, bfloat16 or float16")

    def invalid(reason: str) -> UserError:
        return UserError(f"{path}: config.json describes no valid model: {reason}")

    with foreign_errors(invalid):  # transformers does not check the types of all fields
        fields = _READERS[config.model_type](path, config) | {"dtype": _DTYPES[dtype]}
    try:
        return ModelConfig(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            init_std=config.initializer_range,
            tie_embeddings=config.tie_word_embeddings,
            **fields,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise invalid(f"{where} {first['msg']}") from None


def vocab_size_from_hf(path: str | Path) -> int:
    """Return the vocabulary size of the model saved in `path`: the rows of its embedding.

    It is at least the tokenizer's size.
    """
    return read_hf_config(path).vocab_size


def head_from_hf(path: str | Path) -> Head:
    """Return "scalar" for a reward model and "lm" for a language model.

    A reward model is `...ForSequenceClassification` with one label.
    """
    config = read_hf_config(path)
    names = config.architectures or ["ForCausalLM"]
    architecture = str(names[0] if isinstance(names, list) else names)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "lm"
    if not architecture.endswith("ForSequenceClassification"):
        refuse(
            path, "architectures", architecture, "...ForCausalLM or ...ForSequenceClassification"
        )
    if config.num_labels != 1:
        refuse(path, "num_labels", config.num_labels, "1: a reward model gives one number")
    return "scalar"


def _read_gpt2(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    if config.activation_function not in _GELU:
        refuse(
            path, "activation_function", config.activation_function, "one of " + ", ".join(_GELU)
        )
    for option, wanted in (
        ("add_cross_attention", False),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
    ):
        if getattr(config, option) != wanted:
            refuse(path, option, getattr(config, option), str(wanted))
    return {
        "family": "gpt",
        "activation": _GELU[config.activation_function],
        "ffn_size": config.n_inner or 4 * config.n_embd,
        "norm_eps": config.layer_norm_epsilon,
        "residual_dropout": config.resid_pdrop,
        "embedding_dropout": config.embd_pdrop,
        "attention_dropout": config.attn_pdrop,
    }


def _read_llama_like(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    """Return the fields that Llama, Mistral and Qwen share, without biases and head norms."""
    if config.hidden_act not in ("silu", "swish"):
        refuse(path, "hidden_act", config.hidden_act, "silu")
    return {
        "family": "llama",
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "ffn_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "attention_dropout": config.attention_dropout,
        **read_rope(path, config),
        **read_window(path, config),
    }


def _read_llama(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    if config.attention_bias != config.mlp_bias:
        refuse(
            path,
            "attention_bias",
            config.attention_bias,
            f"the same as mlp_bias ({config.mlp_bias})",
        )
    return _read_llama_like(path, config) | {"bias": config.attention_bias}


def _read_qwen2(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    return _read_llama_like(path, config) | {"qkv_bias": True}


def _read_qwen3(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    if config.attention_bias:
        refuse(path, "attention_bias", True, "false (Qwen 3 normalises queries and keys instead)")
    return _read_llama_like(path, config) | {"qk_norm": True}


_READERS: dict[str, Callable[[str | Path, PretrainedConfig], ConfigFields]] = {
    "gpt2": _read_gpt2,
    "llama": _read_llama,
    "mistral": _read_llama_like,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
}


def hf_type(model: ModelConfig) -> str:
    """Return the Hugging Face model_type that computes `model`.

    Raises UserError if none of the supported ones does.
    """
    shape = (model.position, model.norm, model.activation == "swiglu")
    if shape == ("learned", "layernorm", False):
        standard = (
            model.num_kv_heads == model.num_heads
            and model.head_dim * model.num_heads == model.hidden_size
        )
        if standard and model.bias and model.qkv_bias and not model.qk_norm:
            return "gpt2"
    elif shape == ("rope", "rmsnorm", True):
        kinds = {
            (False, False, False): "llama",
            (True, True, False): "llama",
            (False, True, False): "qwen2",
            (False, False, True): "qwen3",
        }
        kind = kinds.get((model.bias, model.qkv_bias, model.qk_norm))
        if model.sliding_window is not None and kind == "llama":
            mistral = not model.bias and model.full_attention_layers == 0
            kind = "mistral" if mistral else None
        if kind:
            return kind
    options = (
        "position",
        "norm",
        "activation",
        "bias",
        "qkv_bias",
        "qk_norm",
        "num_kv_heads",
        "head_dim",
        "sliding_window",
        "full_attention_layers",
    )
    described = ", ".join(f"{name}={getattr(model, name)}" for name in options)
    raise UserError(
        f"no Hugging Face architecture computes this model ({described}); it can only be saved in "
        "our own checkpoints"
    )


def hf_config(
    model: ModelConfig,
    vocab_size: int,
    head: Head,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PretrainedConfig:
    """Return transformers' configuration of `model`, with the special tokens of `tokenizer`."""
    from transformers import AutoConfig

    kind = hf_type(model)
    fields = _gpt2_fields(model) if kind == "gpt2" else _llama_fields(model)
    if kind == "llama":
        fields |= {"attention_bias": model.bias, "mlp_bias": model.bias}
    if model.sliding_window is not None:
        fields |= window_fields(model, kind)
    if kind == "qwen2" and model.head_dim * model.num_heads == model.hidden_size:
        del fields["head_dim"]
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        **({"num_labels": 1} if head == "scalar" else {}),
        **fields,
    )
    names = {"gpt2": "GPT2"}
    lm_head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    config.architectures = [
        names.get(kind, kind.capitalize())
        + (lm_head if head == "lm" else "ForSequenceClassification")
    ]
    config.dtype = next(dtype for dtype, name in _DTYPES.items() if name == model.dtype)
    return config


def _gpt2_fields(model: ModelConfig) -> ConfigFields:
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "n_positions": model.max_positions,
        "activation_function": _HF_GELU[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.residual_dropout,
        "embd_pdrop": model.embedding_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def _llama_fields(model: ModelConfig) -> ConfigFields:
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope_parameters(model),
        "attention_dropout": model.attention_dropout,
    }
