"""GPT and Llama models as megatron-core pipeline stages, with our attention, norms and heads."""

from __future__ import annotations

import fastrlhf.parallel  # noqa: F401  first of all: its filters quiet what megatron warns of when it is imported
