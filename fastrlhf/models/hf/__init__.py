"""Hugging Face models in and out: GPT-2, Llama (and SmolLM), Mistral, Qwen 2 / 2.5 and Qwen 3, with an LM or a reward
head.

`shapes` turns config.json into a ModelConfig and back, `mapping` says which of their tensors make up which of our
parameters, `files` reads safetensors (and GGUF), `weights` moves tensors in and out of pipeline stages, `verify`
compares logits. Left out on purpose: pickled weights (.bin), which can run code when they are loaded, quantised
weights other than GGUF, and remote code.
"""

from __future__ import annotations

from fastrlhf.models.hf.shapes import head_from_hf, model_config_from_hf, vocab_size_from_hf
from fastrlhf.models.hf.verify import LogitMismatch, verify_logits
from fastrlhf.models.hf.weights import load_hf, save_hf

__all__ = [
    "LogitMismatch",
    "head_from_hf",
    "load_hf",
    "model_config_from_hf",
    "save_hf",
    "verify_logits",
    "vocab_size_from_hf",
]
