"""GPT and Llama models as megatron-core pipeline stages, with our attention, norms and heads."""

from __future__ import annotations

# Imported first: installs the filters of the warnings that megatron emits when it is imported.
import fastrlhf.parallel  # noqa: F401
