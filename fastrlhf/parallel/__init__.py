"""Process groups, pipeline schedule and CPU support: the only package that reads megatron's global parallel state."""

from __future__ import annotations

import logging
import warnings

# What megatron-core and torch say of their own insides at every import and step, and no user can act on.
# apex and Transformer Engine are optional here, and `fastrlhf doctor` says once what is missing.
for _message in (
    "Apex|Transformer Engine|transformer_engine",
    "use DTensor instead",
    "`load_state_dict` is deprecated",
    "all_gather_into_tensor|reduce_scatter_tensor",
    "full scope is deprecated",
    "using the device under current context",
    "grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=f".*({_message}).*")
logging.getLogger("megatron").setLevel(logging.ERROR)
