"""A stage's forward pass written out: the arithmetic of megatron's modules on the same parameters, without the modules.

megatron's modules cost some 0.8 ms of Python a layer and step, several times the arithmetic of a decode step; here a
layer is what it computes. It must stay the arithmetic of models/gpt.py: a test compares the two for every kind of
layer. Left out on purpose: dropout, sequence parallelism, recomputation, and gradients over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastrlhf.models.attention import SequenceLayout
from fastrlhf.models.inputs import CachedInput, PackedInput
from fastrlhf.ops.activation import bias_gelu

if TYPE_CHECKING:
    from fastrlhf.models.gpt import GPT

Tensor = torch.Tensor
no_torch_function = torch._C.DisableTorchFunction
"""Context without parallel/cpu.py's redirection of CUDA devices, which costs a fifth of a small step and has nothing to
do where no call names a device. No effect on a GPU."""


def forward(stage: GPT, batch: PackedInput | CachedInput, received: Tensor | None) -> Tensor:
    """A micro-batch of T tokens -> [T, H] on the last stage, after the final norm, else [T, 1, H], the shape that
    megatron's schedules hand to the next stage; `received` is what the previous stage handed over.
    """
    with no_torch_function():
        layout = stage.layout(batch)
        if stage.pre_process:
            x_TH = _embed(stage, batch.tokens, layout.positions)
        else:
            assert received is not None
            x_TH = received[:, 0]
        for layer in stage.decoder.layers:
            x_TH = _layer(stage, layer, x_TH, layout)
        return stage.decoder.final_layernorm(x_TH) if stage.post_process else x_TH[:, None]


def _sum(stage: GPT, x: Tensor) -> Tensor:
    """Sum of the tensor-parallel ranks' parts, in place."""
    if stage.mesh.vocab_group is not None:
        dist.all_reduce(x, group=stage.mesh.vocab_group)
    return x


def _embed(stage: GPT, tokens: Tensor, positions: Tensor) -> Tensor:
    embedding = stage.embedding
    words = embedding.word_embeddings
    if stage.mesh.vocab_group is None:
        x_TH = F.embedding(tokens, words.weight)
    else:
        local = tokens - words.vocab_start_index
        elsewhere = (local < 0) | (local >= words.weight.shape[0])
        x_TH = F.embedding(local.masked_fill(elsewhere, 0), words.weight).masked_fill(
            elsewhere[:, None], 0.0
        )
        _sum(stage, x_TH)
    return (
        x_TH + embedding.position_embeddings(positions)
        if embedding.add_position_embedding
        else x_TH
    )


def _layer(stage: GPT, layer: Any, x_TH: Tensor, layout: SequenceLayout) -> Tensor:
    attention, mlp, config = layer.self_attention, layer.mlp, stage.config
    query, key, value = _heads(attention, layer.input_layernorm(x_TH), qk_norm=config.qk_layernorm)
    context = attention.core_attention(query, key, value, packed_seq_params=layout)
    x_TH = x_TH + _row_parallel(stage, attention.linear_proj, context)
    up = _activated(stage, layer.pre_mlp_layernorm(x_TH), mlp.linear_fc1)
    return x_TH + _row_parallel(stage, mlp.linear_fc2, up)


def _activated(stage: GPT, x_TH: Tensor, linear: Any) -> Tensor:
    """The first projection of an MLP and its activation."""
    if stage.model_config.activation == "gelu_tanh" and linear.bias is not None:
        return bias_gelu(F.linear(x_TH, linear.weight), linear.bias)
    up = F.linear(x_TH, linear.weight, linear.bias)
    if not stage.config.gated_linear_unit:
        return stage.config.activation_func(up)
    gate, up = up.chunk(2, dim=-1)
    return stage.config.activation_func(gate) * up


def _heads(attention: Any, x_TH: Tensor, *, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, heads, d], key and value [T, kv heads, d]; the projection holds them group by group."""
    qkv = F.linear(x_TH, attention.linear_qkv.weight, attention.linear_qkv.bias)
    groups, d = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    qkv = qkv.view(x_TH.shape[0], groups, -1, d)
    query, key, value = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if qk_norm:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    return query, key, value


def _row_parallel(stage: GPT, linear: Any, x: Tensor) -> Tensor:
    if stage.mesh.vocab_group is None:
        return F.linear(x, linear.weight, linear.bias)
    out = _sum(stage, F.linear(x, linear.weight))
    return out if linear.bias is None else out + linear.bias
