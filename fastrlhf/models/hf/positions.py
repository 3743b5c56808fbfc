"""Rotary embeddings and sliding windows in a Hugging Face config.json, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ConfigFields = dict[str, Any]
"""Keyword arguments of ModelConfig or of a transformers configuration."""

_LLAMA3 = {
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_positions",
}
"""Key in transformers' `rope_parameters` -> setting of the model section."""


def refuse(path: str | Path, option: str, value: object, expected: str) -> NoReturn:
    """Raise the UserError of an option of config.json that is not supported."""
    raise UserError(
        f"{path}: {option} = {value} in config.json is not supported; expected {expected}"
    )


def read_rope(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    """Return the rotary fields of ModelConfig.

    transformers gives `rope_parameters` also for files with `rope_theta` and `rope_scaling`.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        refuse(path, "rope_scaling", kind, "linear, llama3, or none (rope_scaling: null)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(path, "partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    fields: ConfigFields = {"rope_theta": rope.get("rope_theta", 10000.0)}
    if kind == "default":
        return fields
    names = {"factor": "rope_factor", **(_LLAMA3 if kind == "llama3" else {})}
    for theirs in names:
        if rope.get(theirs) is None:
            refuse(path, f"rope_scaling without {theirs}", rope, f"{theirs} with type {kind}")
    return fields | {"rope_scaling": kind} | {ours: rope[name] for name, ours in names.items()}


def rope_parameters(model: ModelConfig) -> ConfigFields:
    """Return transformers' `rope_parameters` of `model`."""
    kind = model.rope_scaling
    found: ConfigFields = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": model.rope_theta,
    }
    if kind != "none":
        found["factor"] = model.rope_factor
    if kind == "llama3":
        found |= {theirs: getattr(model, ours) for theirs, ours in _LLAMA3.items()}
    return found


def read_window(path: str | Path, config: PretrainedConfig) -> ConfigFields:
    """Return the window fields of ModelConfig; none if the window masks nothing.

    It masks nothing if it is as long as the longest sequence, or no layer has it.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return {}
    if config.model_type == "llama":  # which would ignore it
        refuse(path, "sliding_window", window, "null with model_type llama, or model_type mistral")
    layers = (
        getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    )
    full = layers.index("sliding_attention") if "sliding_attention" in layers else len(layers)
    expected = ["full_attention"] * full + ["sliding_attention"] * (len(layers) - full)
    if layers != expected:
        wanted = "sliding_attention in all layers but some of the first"
        refuse(path, "layer_types", layers, wanted)
    if full == len(layers):
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def window_fields(model: ModelConfig, kind: str) -> ConfigFields:
    """Return the window options of transformers' configuration of model_type `kind`."""
    fields: ConfigFields = {"sliding_window": model.sliding_window}
    if kind == "mistral":
        return fields
    return fields | {
        "use_sliding_window": True,
        "max_window_layers": model.full_attention_layers,
    }
