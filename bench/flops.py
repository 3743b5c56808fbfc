"""Operations and bytes that a step cannot do without.

The model FLOPs utilisation and the decode limit are relative to these counts. A multiply-add is two
operations.

- Forward: 2 N per token, where N is the number of entries of the layers' matrices; 4 * layers *
  heads * head_dim per pair of a query and a key that it may attend to (the score, and its share of
  the sum); 2 H V per position whose logits are read.
- Backward: twice the forward.

SFT on D tokens therefore takes 6 N D, plus attention and LM head (Kaplan et al. 2020, arXiv
2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B, without its assumption
that every query sees every key). Not counted: recomputation (flash attention's scores in the
backward), vocabulary padding, norms, activations, look-ups, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrlhf.config import ModelConfig
from fastrlhf.data.batches import PackedBatch, RankingBatch

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """The work of one pass over some sequences, for any shape of model."""

    tokens: int = 0
    pairs: int = 0
    """(query, visible key), summed over sequences."""
    counted: int = 0
    """Positions that go through the LM head."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens, self.pairs + other.pairs, self.counted + other.counted
        )

    def __mul__(self, times: int) -> Work:
        return Work(self.tokens * times, self.pairs * times, self.counted * times)


def work_of(batch: PackedBatch) -> Work:
    """Return the work of one packed micro-batch.

    A shared prompt counts once. A ranking needs no LM head.
    """
    queries = batch.cu_seqlens.diff().long()
    keys = queries if batch.cu_seqlens_kv is None else batch.cu_seqlens_kv.diff().long()
    # The last query of a sequence sees all of its keys, the one before it one fewer, and so on.
    pairs = queries * keys - queries * (queries - 1) // 2
    counted = 0 if isinstance(batch, RankingBatch) else int(batch.loss_mask.sum())
    return Work(batch.tokens.numel(), int(pairs.sum()), counted)


def prefill(prompts: Sequence[int]) -> Work:
    """Return the work of prompts of the given lengths, each followed by one sampled token."""
    return Work(sum(prompts), sum(P * (P + 1) // 2 for P in prompts), len(prompts))


def decode(prompts: Sequence[int], response: int) -> Work:
    """Return the work of the other `response` - 1 tokens of each prompt.

    The last token is sampled and never read.
    """
    steps = response - 1
    pairs = sum(steps * P + steps * (steps + 1) // 2 for P in prompts)
    return Work(steps * len(prompts), pairs, steps * len(prompts))


def matrix_entries(model: ModelConfig) -> int:
    """Return N, the entries of the projections of all layers, without embeddings and LM head."""
    H, d = model.hidden_size, model.head_dim
    attention = H * d * (2 * model.num_heads + 2 * model.num_kv_heads)
    mlp = H * model.ffn_size * (3 if model.activation == "swiglu" else 2)
    return model.num_layers * (attention + mlp)


def forward_flops(model: ModelConfig, work: Work, vocab: int) -> int:
    """Return the operations of a forward pass; `vocab` is the LM head's columns (scalar head: 1)."""
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * work.pairs
    return (
        2 * matrix_entries(model) * work.tokens
        + attention
        + 2 * model.hidden_size * vocab * work.counted
    )


def training_flops(model: ModelConfig, work: Work, vocab: int) -> int:
    """Return the operations of a forward and a backward pass."""
    return 3 * forward_flops(model, work, vocab)


def decode_bytes(model: ModelConfig, prompts: Sequence[int], response: int, vocab: int) -> int:
    """Return the bytes read by the `response` - 1 decode steps of sequences decoded together.

    Each step reads the matrices and the LM head once, and for each sequence the keys and values of
    its tokens so far.
    """
    size = BYTES[model.dtype]
    weights = matrix_entries(model) + model.hidden_size * vocab
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return size * ((response - 1) * weights + cached * decode(prompts, response).pairs)
