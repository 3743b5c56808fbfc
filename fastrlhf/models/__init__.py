"""GPT and Llama models as megatron-core pipeline stages, with our attention, norms and heads."""
