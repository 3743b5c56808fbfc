"""The table of Hugging Face tensors that make up each of our parameters, for loading and saving.

Our layout is megatron's: the queries, keys and values of one query group are adjacent ([its query
heads, key, value] per group), and the gate projection is stacked on the up projection, each
sharded. GPT-2 stores its projections [in, out] (Conv1D), the others [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastrlhf.config import ModelConfig
from fastrlhf.models.heads import Head
from fastrlhf.models.hf.shapes import hf_type

Tensor = torch.Tensor


@dataclass(frozen=True)
class Source:
    """Block `part` of `parts` equal row blocks of a Hugging Face tensor, viewed as [out, in]."""

    name: str
    shape: tuple[int, ...]
    """Shape of the full tensor, as it is stored."""
    transposed: bool = False
    """True if the tensor is stored [in, out]."""
    part: int = 0
    parts: int = 1

    @property
    def rows(self) -> int:
        """Number of rows of this block."""
        return self.shape[-1 if self.transposed else 0] // self.parts

    def index(self, dim: int | None, start: int, stop: int) -> tuple[slice, ...]:
        """Return the index in the stored tensor of rows or columns start .. stop of this block.

        `dim` is 0 for rows, 1 for columns, None for the full block.
        """
        rows = slice(self.part * self.rows, (self.part + 1) * self.rows)
        if dim == 0:
            rows = slice(rows.start + start, rows.start + stop)
        index = (rows, slice(start, stop) if dim == 1 else slice(None))[: len(self.shape)]
        return index[::-1] if self.transposed else index


@dataclass(frozen=True)
class Rule:
    """The sources of one of our parameters, how they merge, and the sharded dimension."""

    sources: tuple[Source, ...]
    merge: Literal["copy", "qkv", "gated"] = "copy"
    shard_dim: int | None = None


def tensor_map(model: ModelConfig, vocab_size: int, head: Head) -> dict[str, Rule]:
    """Return our parameter's name in the full model -> its rule.

    `score.bias` has no tensor: it is in config.json.
    """
    kind = hf_type(model)
    H = model.hidden_size
    root = "transformer." if kind == "gpt2" else "model."
    embedding = "wte.weight" if kind == "gpt2" else "embed_tokens.weight"
    rules = {"embedding.word_embeddings.weight": _copy(root + embedding, (vocab_size, H), 0)}
    if kind == "gpt2":
        rules["embedding.position_embeddings.weight"] = _copy(
            root + "wpe.weight", (model.max_positions, H)
        )
    for i in range(model.num_layers):
        layer = (
            _gpt2_layer(model, f"{root}h.{i}.")
            if kind == "gpt2"
            else _llama_layer(model, f"{root}layers.{i}.")
        )
        rules |= {f"decoder.layers.{i}.{name}": rule for name, rule in layer.items()}
    if kind == "gpt2":
        rules |= _norm("decoder.final_layernorm", root + "ln_f", H)
    else:
        rules["decoder.final_layernorm.weight"] = _copy(root + "norm.weight", (H,))
    if head == "scalar":
        rules["score.weight"] = _copy("score.weight", (1, H))
    elif not model.tie_embeddings:
        rules["output_layer.weight"] = _copy("lm_head.weight", (vocab_size, H), 0)
    return rules


def stored_shapes(rules: dict[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor that the rules read, in their order."""
    return {source.name: source.shape for rule in rules.values() for source in rule.sources}


def _copy(name: str, shape: tuple[int, ...], shard_dim: int | None = None) -> Rule:
    return Rule((Source(name, shape),), shard_dim=shard_dim)


def _norm(ours: str, theirs: str, size: int) -> dict[str, Rule]:
    return {f"{ours}.{kind}": _copy(f"{theirs}.{kind}", (size,)) for kind in ("weight", "bias")}


def _gpt2_layer(model: ModelConfig, root: str) -> dict[str, Rule]:
    H, ffn = model.hidden_size, model.ffn_size

    def conv1d(
        name: str, fan_in: int, fan_out: int, shard_dim: int | None
    ) -> Iterator[tuple[str, Rule]]:
        yield (
            "weight",
            Rule(
                (Source(f"{root}{name}.weight", (fan_in, fan_out), transposed=True),),
                shard_dim=shard_dim,
            ),
        )
        yield "bias", _copy(f"{root}{name}.bias", (fan_out,), 0 if shard_dim == 0 else None)

    def fused_qkv(rule: Rule) -> Rule:
        parts = tuple(replace(rule.sources[0], part=part, parts=3) for part in range(3))
        return Rule(parts, "qkv", rule.shard_dim)

    attention, mlp = "self_attention.linear_", "mlp.linear_fc"
    rules = _norm("input_layernorm", root + "ln_1", H) | _norm(
        "pre_mlp_layernorm", root + "ln_2", H
    )
    rules |= {
        f"{attention}qkv.{kind}": fused_qkv(rule)
        for kind, rule in conv1d("attn.c_attn", H, 3 * H, 0)
    }
    rules |= {f"{attention}proj.{kind}": rule for kind, rule in conv1d("attn.c_proj", H, H, 1)}
    rules |= {f"{mlp}1.{kind}": rule for kind, rule in conv1d("mlp.c_fc", H, ffn, 0)}
    rules |= {f"{mlp}2.{kind}": rule for kind, rule in conv1d("mlp.c_proj", ffn, H, 1)}
    return rules


def _llama_layer(model: ModelConfig, root: str) -> dict[str, Rule]:
    H, ffn, d = model.hidden_size, model.ffn_size, model.head_dim
    q_size, kv_size = model.num_heads * d, model.num_kv_heads * d
    attention, mlp = root + "self_attn.", root + "mlp."
    qkv = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
    gated = (("gate_proj", ffn), ("up_proj", ffn))

    def weights(parent: str, parts: Sequence[tuple[str, int]]) -> tuple[Source, ...]:
        return tuple(Source(f"{parent}{name}.weight", (size, H)) for name, size in parts)

    def biases(parent: str, parts: Sequence[tuple[str, int]]) -> tuple[Source, ...]:
        return tuple(Source(f"{parent}{name}.bias", (size,)) for name, size in parts)

    rules = {
        "input_layernorm.weight": _copy(root + "input_layernorm.weight", (H,)),
        "self_attention.linear_qkv.weight": Rule(weights(attention, qkv), "qkv", 0),
        "self_attention.linear_proj.weight": _copy(attention + "o_proj.weight", (H, q_size), 1),
        "pre_mlp_layernorm.weight": _copy(root + "post_attention_layernorm.weight", (H,)),
        "mlp.linear_fc1.weight": Rule(weights(mlp, gated), "gated", 0),
        "mlp.linear_fc2.weight": _copy(mlp + "down_proj.weight", (H, ffn), 1),
    }
    if model.qkv_bias:
        rules["self_attention.linear_qkv.bias"] = Rule(biases(attention, qkv), "qkv", 0)
    if model.bias:
        rules["self_attention.linear_proj.bias"] = _copy(attention + "o_proj.bias", (H,))
        rules["mlp.linear_fc1.bias"] = Rule(biases(mlp, gated), "gated", 0)
        rules["mlp.linear_fc2.bias"] = _copy(mlp + "down_proj.bias", (H,))
    if model.qk_norm:
        rules["self_attention.q_layernorm.weight"] = _copy(attention + "q_norm.weight", (d,))
        rules["self_attention.k_layernorm.weight"] = _copy(attention + "k_norm.weight", (d,))
    return rules


def merge(rule: Rule, parts: Sequence[Tensor], head_dim: int) -> Tensor:
    """Merge one rank's shards of the sources, [out, in] each, into its parameter."""
    if rule.merge == "qkv":
        q, k, v = parts
        groups = k.shape[0] // head_dim
        return torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], dim=1).flatten(
            0, 1
        )
    return torch.cat(list(parts), dim=0) if rule.merge == "gated" else parts[0]


def split(rule: Rule, shards: Sequence[Tensor], head_dim: int) -> list[Tensor]:
    """Split a parameter into its complete sources, [out, in] each; the inverse of `merge`.

    `shards` are the parameter's shards in order of tensor-parallel rank.
    """
    if rule.merge == "gated":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return [torch.cat([half[i] for half in halves], dim=0) for i in range(2)]
    full = shards[0] if rule.shard_dim is None else torch.cat(list(shards), dim=rule.shard_dim)
    if rule.merge == "qkv":
        groups = rule.sources[1].rows // head_dim
        sizes = [source.rows // groups for source in rule.sources]
        return [part.flatten(0, 1) for part in full.unflatten(0, (groups, -1)).split(sizes, dim=1)]
    # Our vocabulary is padded to equal shards.
    return [full[: rule.sources[0].rows] if rule.shard_dim == 0 else full]


def stored_tensors(rule: Rule, shards: Sequence[Tensor], head_dim: int) -> dict[str, Tensor]:
    """Return a parameter's Hugging Face tensors as they are stored, by name.

    `shards` are the parameter's shards in order of tensor-parallel rank.
    """
    blocks: dict[str, list[Tensor]] = {}
    for source, part in zip(rule.sources, split(rule, shards, head_dim), strict=True):
        blocks.setdefault(source.name, []).append(part)
    stored = {}
    for source in rule.sources:
        full = torch.cat(blocks[source.name], dim=0)
        full = full.t() if source.transposed and full.dim() == 2 else full
        stored[source.name] = full.reshape(source.shape).contiguous().cpu()
    return stored
