"""The forward pass of a stage without megatron's modules: same arithmetic, same parameters.

megatron's modules cost about 0.8 ms of Python per layer and step, several times the arithmetic of
a decode step. The arithmetic here must stay that of models/gpt.py; a test compares the two for
every kind of layer. Not supported: dropout, sequence parallelism, recomputation, and gradients over
tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from fastrlhf.models.inputs import StageInput
from fastrlhf.models.layout import SequenceLayout
from fastrlhf.models.stage import Stage
from fastrlhf.ops.activation import bias_gelu

Tensor = torch.Tensor
no_torch_function = torch._C.DisableTorchFunction
"""Context manager that disables parallel/cpu.py's redirection of CUDA devices.

The redirection costs a fifth of a small step and is needed only where a call names a device. No
effect on a GPU.
"""


def forward(stage: Stage, batch: StageInput, received: Tensor | None) -> Tensor:
    """Run a micro-batch of T tokens through a stage.

    `received` is the previous stage's output (None on the first stage). Returns [T, H] after the
    final norm on the last stage, otherwise [T, 1, H], the shape that megatron's schedules send.
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


def _all_reduce(stage: Stage, x: Tensor) -> Tensor:
    """Sum `x` over the tensor-parallel ranks, in place."""
    if stage.mesh.vocab_group is not None:
        dist.all_reduce(x, group=stage.mesh.vocab_group)
    return x


def _embed(stage: Stage, tokens: Tensor, positions: Tensor) -> Tensor:
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
        _all_reduce(stage, x_TH)
    return (
        x_TH + embedding.position_embeddings(positions)
        if embedding.add_position_embedding
        else x_TH
    )


def _layer(stage: Stage, layer: TransformerLayer, x_TH: Tensor, layout: SequenceLayout) -> Tensor:
    attention, mlp, config = layer.self_attention, layer.mlp, stage.config
    query, key, value = _qkv(attention, layer.input_layernorm(x_TH), qk_norm=config.qk_layernorm)
    context = attention.core_attention(query, key, value, packed_seq_params=layout)
    x_TH = x_TH + _row_parallel(stage, attention.linear_proj, context)
    up = _mlp_up(stage, layer.pre_mlp_layernorm(x_TH), mlp.linear_fc1)
    return x_TH + _row_parallel(stage, mlp.linear_fc2, up)


def _mlp_up(stage: Stage, x_TH: Tensor, linear: ColumnParallelLinear) -> Tensor:
    """Apply the first projection of an MLP and its activation."""
    if stage.model_config.activation == "gelu_tanh" and linear.bias is not None:
        return bias_gelu(F.linear(x_TH, linear.weight), linear.bias)
    up = F.linear(x_TH, linear.weight, linear.bias)
    if not stage.config.gated_linear_unit:
        return stage.config.activation_func(up)
    gate, up = up.chunk(2, dim=-1)
    return stage.config.activation_func(gate) * up


def _qkv(attention: SelfAttention, x_TH: Tensor, *, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [T, heads, d], key and value [T, kv heads, d].

    The projection interleaves them per query group: [its query heads, key, value].
    """
    qkv = F.linear(x_TH, attention.linear_qkv.weight, attention.linear_qkv.bias)
    groups, d = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    qkv = qkv.view(x_TH.shape[0], groups, -1, d)
    query, key, value = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if qk_norm:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    return query, key, value


def _row_parallel(stage: Stage, linear: RowParallelLinear, x: Tensor) -> Tensor:
    if stage.mesh.vocab_group is None:
        return F.linear(x, linear.weight, linear.bias)
    out = _all_reduce(stage, F.linear(x, linear.weight))
    return out if linear.bias is None else out + linear.bias
