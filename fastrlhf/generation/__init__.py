"""In-process rollouts on the training weights: continuous batching over a KV cache, sampling from a sharded
vocabulary.
"""

from fastrlhf.generation.engine import Generated, generate, generate_all
from fastrlhf.generation.sampling import SamplingParams

__all__ = ["Generated", "SamplingParams", "generate", "generate_all"]
