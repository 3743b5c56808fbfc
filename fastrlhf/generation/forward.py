"""A pipeline stage's forward pass for sampling, on the same parameters: no autograd, no dropout, no sequence
parallelism.

megatron's modules cost some 0.8 ms of Python a layer and step, several times the arithmetic of a decode step; here a
layer is what it computes. It must stay the arithmetic of models/gpt.py: a test compares the two for every kind of
layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastrlhf.models.attention import SequenceLayout
from fastrlhf.models.gpt import GPT, CachedInput

Tensor = torch.Tensor
direct = torch._C.DisableTorchFunction
"""Context without parallel/cpu.py's redirection of CUDA devices, which costs a fifth of a small step and has nothing to
do where no call names a device. No effect on a GPU."""


class Forward:
    """`forward(batch)` maps a `CachedInput` of T tokens to hidden states: [T, H] on the last stage, after the final
    norm, else [T, 1, H], the shape that megatron's schedules hand to the next stage.
    """

    def __init__(self, stage: GPT) -> None:
        self.stage = stage
        self.config = stage.config
        self.model_type = stage.model_type
        self.group = stage.mesh.vocab_group
        self._input: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """megatron's schedules hand over the previous stage's output here."""
        self._input = input_tensor[0]

    def __call__(self, batch: CachedInput) -> Tensor:
        with direct():
            return self._forward(batch)

    def _forward(self, batch: CachedInput) -> Tensor:
        layout = self.stage.layout(batch)
        if self.stage.pre_process:
            x_TH = self._embed(batch.tokens, layout.positions)
        else:
            assert self._input is not None
            x_TH = self._input[:, 0]
        for layer in self.stage.decoder.layers:
            x_TH = self._layer(layer, x_TH, layout)
        return self.stage.decoder.final_layernorm(x_TH) if self.stage.post_process else x_TH[:, None]

    def _sum(self, x: Tensor) -> Tensor:
        """Sum of the tensor-parallel ranks' parts."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedding = self.stage.embedding
        words = embedding.word_embeddings
        if self.group is None:
            x_TH = F.embedding(tokens, words.weight)
        else:
            local = tokens - words.vocab_start_index
            elsewhere = (local < 0) | (local >= words.weight.shape[0])
            x_TH = F.embedding(local.masked_fill(elsewhere, 0), words.weight).masked_fill(elsewhere[:, None], 0.0)
            self._sum(x_TH)
        return x_TH + embedding.position_embeddings(positions) if embedding.add_position_embedding else x_TH

    def _layer(self, layer: Any, x_TH: Tensor, layout: SequenceLayout) -> Tensor:
        attention, mlp = layer.self_attention, layer.mlp
        query, key, value = self._heads(attention, layer.input_layernorm(x_TH))
        context = attention.core_attention(query, key, value, packed_seq_params=layout)
        x_TH = x_TH + self._row_parallel(attention.linear_proj, context)
        up = F.linear(layer.pre_mlp_layernorm(x_TH), mlp.linear_fc1.weight, mlp.linear_fc1.bias)
        if self.config.gated_linear_unit:
            gate, up = up.chunk(2, dim=-1)
            up = self.config.activation_func(gate) * up
        else:
            up = self.config.activation_func(up)
        return x_TH + self._row_parallel(mlp.linear_fc2, up)

    def _heads(self, attention: Any, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [T, heads, d], key and value [T, kv heads, d]; the projection holds them group by group."""
        qkv = F.linear(x_TH, attention.linear_qkv.weight, attention.linear_qkv.bias)
        groups, d = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        qkv = qkv.view(x_TH.shape[0], groups, -1, d)
        query, key, value = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
        if self.config.qk_layernorm:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        return query, key, value

    def _row_parallel(self, linear: Any, x: Tensor) -> Tensor:
        if self.group is None:
            return F.linear(x, linear.weight, linear.bias)
        out = self._sum(F.linear(x, linear.weight))
        return out if linear.bias is None else out + linear.bias
