"""The shape of a model: which keys it consists of, and whether a layout can hold it.

The same rules serve the configured model and every model that a run loads.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

from fastrlhf.config.model import ModelConfig
from fastrlhf.config.sections import ParallelConfig
from fastrlhf.config.yaml_file import ConfigError, Tree
from fastrlhf.errors import UserError

_READER = "fastrlhf.models.loading:saved_shape"
"""Function that reads the shape of a saved model; found by name, because it is above this part."""
_NO_SHAPE = {
    *("residual_dropout", "embedding_dropout", "attention_dropout", "init_std", "dtype"),
    *("recompute", "recompute_layers", "attention", "shared_prompt", "load", "hf"),
}
SHAPE_KEYS = tuple(name for name in ModelConfig.model_fields if name not in _NO_SHAPE)
"""Keys of the model section that describe what a checkpoint holds."""
_REQUIRED = tuple(name for name, field in ModelConfig.model_fields.items() if field.is_required())


def check_layout(model: ModelConfig, parallel: ParallelConfig, owner: str, fix: str) -> None:
    """Check that pipeline stages divide the layers, and tensor ranks the heads and ffn_size.

    `owner` precedes a key of the model in the message ("model."), `fix` ends it. Raises
    ConfigError.
    """
    for name in ("num_heads", "num_kv_heads", "ffn_size"):
        size = getattr(model, name)
        if size % parallel.tensor:
            raise ConfigError(
                "parallel.tensor",
                f"{parallel.tensor} does not divide {owner}{name} {size}; use a divisor of"
                f" {size}, or {fix.format(name=name)}",
            )
    if model.num_layers % parallel.pipeline:
        layers = model.num_layers
        raise ConfigError(
            "parallel.pipeline",
            f"{parallel.pipeline} does not divide {owner}num_layers {layers}; use a divisor of"
            f" {layers}, or {fix.format(name='num_layers')}",
        )


def complete_shape(data: Tree) -> dict[str, str]:
    """Fill the shape keys that the model section of `data` lacks from its `load` or `hf`.

    Returns the path as the origin of each dotted key that was filled. A path without a model is
    left to the command, which reports it, unless a required key is missing. Raises UserError then.
    """
    model = data.get("model")
    if not isinstance(model, dict):
        return {}
    given = [path for path in (model.get("load"), model.get("hf")) if path is not None]
    if len(given) != 1 or not isinstance(given[0], str):
        return {}
    is_complete = all(name in model for name in _REQUIRED)
    if is_complete and not os.path.exists(given[0]):  # False for a name that is too long
        return {}
    module, _, name = _READER.partition(":")
    read: Callable[[str], dict[str, object]] = getattr(importlib.import_module(module), name)
    try:
        shape = read(given[0])
    except UserError:
        if is_complete:
            return {}
        raise
    missing = [name for name in SHAPE_KEYS if model.get(name) is None]
    model |= {name: shape[name] for name in missing}
    return {f"model.{name}": str(given[0]) for name in missing}
