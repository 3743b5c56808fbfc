"""The values that `model.family` gives to unset fields of the model section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, object]
"""The fields of a section that are validated already."""

FAMILIES: dict[str, Fields] = {
    "gpt": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "llama": {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
}
"""Values that `model.family` gives to unset fields."""


# Any: pydantic validates the value against the type of the field.
def family_default(key: str) -> Callable[[Fields], Any]:  # type: ignore[explicit-any]
    """Return the default factory of a field whose value the family gives."""
    return lambda fields: FAMILIES[str(fields["family"])][key]


def ffn_default(fields: Fields) -> int:
    """Return the feed-forward width of an unset `model.ffn_size`."""
    hidden = fields["hidden_size"]
    # 0 is refused by the model section's check, with the cure.
    return 4 * hidden if fields["family"] == "gpt" and isinstance(hidden, int) else 0
