"""In-process rollouts on the training weights: continuous batching, KV cache, sharded sampling."""

from fastrlhf.generation.engine import Generated, generate, generate_all
from fastrlhf.generation.sampling import SamplingParams

__all__ = ["Generated", "SamplingParams", "generate", "generate_all"]
