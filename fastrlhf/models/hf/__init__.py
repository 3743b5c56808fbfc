"""Import and export of Hugging Face models, with an LM head or a reward head.

Supported are GPT-2, Llama (and SmolLM), Mistral, Qwen 2 / 2.5 and Qwen 3, with linear and llama3
RoPE scaling and sliding windows. `shapes` converts
config.json to a ModelConfig and back, `mapping` lists which of their tensors make up which of our
parameters, `files` reads safetensors (and GGUF), `weights` copies tensors to and from pipeline
stages, `pad_token` and `generation_settings` describe an export, `verify` compares logits. Not
supported: pickled weights (.bin), which can run code when they are loaded, quantized weights other
than GGUF, and remote code.
"""

from __future__ import annotations

from fastrlhf.models.hf.generation_settings import generation_from_hf
from fastrlhf.models.hf.shapes import head_from_hf, model_config_from_hf, vocab_size_from_hf
from fastrlhf.models.hf.verify import LogitMismatch, verify_logits
from fastrlhf.models.hf.weights import load_hf, save_hf

__all__ = [
    "LogitMismatch",
    "generation_from_hf",
    "head_from_hf",
    "load_hf",
    "model_config_from_hf",
    "save_hf",
    "verify_logits",
    "vocab_size_from_hf",
]
