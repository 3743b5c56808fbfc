"""Process groups, pipeline schedule and CPU support.

This is the only package that reads megatron's global parallel state.
"""

from __future__ import annotations

import logging
import warnings

# Warnings of megatron-core and torch at every import and step that no user can act on. apex and
# Transformer Engine are optional here; `fastrlhf doctor` reports what is missing.
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
