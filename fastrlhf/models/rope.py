"""Rotary position embeddings: frequencies, their scaling, and the tables of a micro-batch.

Not supported: scaling that depends on the length of the sequence (dynamic, longrope) or that also
scales the attention scores (yarn).
"""

from __future__ import annotations

import math

import torch

from fastrlhf.config import ModelConfig

Tensor = torch.Tensor
ROPE_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_positions",
)
"""The settings of the model section that `rope_tables` reads."""


def rope_tables(positions: Tensor, head_dim: int, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of rotary embeddings, fp32 [T, 1, head_dim], half-split convention.

    Source: Su et al. 2021, eq. 34.
    """
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling != "none":
        frequencies = _scaled(frequencies, model)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Scale frequencies [head_dim / 2], in radians per token, as `model.rope_scaling` says.

    linear: f / factor (Chen et al. 2023, arXiv:2306.15595). llama3: with n turns in the original
    positions, f (s + (1 - s) / factor) where s = (n - low) / (high - low) within [0, 1], as in
    Meta's and transformers' Llama 3.1.
    """
    assert model.rope_factor is not None  # checked by the configuration
    if model.rope_scaling == "linear":
        return frequencies / model.rope_factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = frequencies * (model.rope_original_positions / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / model.rope_factor)
