"""Process groups, pipeline schedule and CPU support: the only package that reads megatron's global parallel state."""

from __future__ import annotations

import logging
import warnings

# megatron-core warns at every import of a module that could use apex or Transformer Engine and finds neither; both are
# optional here, and `fastrlhf doctor` says once what is missing.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
# torch's sharded tensors, which megatron's checkpoints are made of.
warnings.filterwarnings("ignore", message=".*(use DTensor instead|`load_state_dict` is deprecated).*")
logging.getLogger("megatron").setLevel(logging.ERROR)
