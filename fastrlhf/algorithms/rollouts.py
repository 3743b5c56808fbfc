"""Sampled episodes as tensors, and as packed micro-batches for scoring and training.

Rows are episodes in the order of the prompts over all data-parallel ranks; every rank holds all of them (a few MB), so
that whitening and minibatches are those of the whole batch. Left out on purpose: what is done with them (ppo.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastrlhf.config import TrainConfig
from fastrlhf.data import packing
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.generation.engine import Generated
from fastrlhf.ops.masked import true_places
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor


@dataclass
class Rollouts:
    """B episodes of at most L tokens and R response tokens, and what is known of them; response columns count from the
    first response token. What stands behind a sequence's end is never read.
    """

    tokens: Tensor
    """int64 [B, L]: prompt and response."""
    prompt_lengths: Tensor
    """int64 [B]."""
    response_lengths: Tensor
    """int64 [B], the stop token included."""
    stopped: Tensor
    """bool [B]: the response ended with a stop token."""
    logprobs: Tensor
    """fp32 [B, R]: of the sampled tokens, by the policy that sampled them, at the sampling temperature."""
    ref_logprobs: Tensor
    """fp32 [B, R]: of the same tokens, by the reference."""
    values: Tensor
    """fp32 [B, R]: value of the state before each token."""
    scores: Tensor
    """fp32 [B]: what the reward models and the reward function say, before any penalty."""

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def mask(self) -> Tensor:
        """bool [B, R]: real response tokens."""
        R = self.logprobs.shape[1]
        return torch.arange(R, device=self.tokens.device) < self.response_lengths[:, None]

    def sequences(self, rows: Tensor) -> list[list[int]]:
        """Prompt and response of each of `rows`, without anything behind them."""
        tokens, lengths = self.tokens[rows].cpu(), self.lengths[rows].tolist()
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]

    def pack(self, rows: Tensor) -> PackedBatch:
        """The given episodes as one packed micro-batch; its loss_mask marks the positions that predict response
        tokens.
        """
        return pack(self.sequences(rows), self.prompt_lengths[rows].tolist()).to(self.tokens.device)

    def to_padded(self, rows: Tensor, per_token: Tensor) -> Tensor:
        """`per_token`, the response tokens of `rows` one after another, as [len(rows), R] with 0 behind each."""
        padded = self.logprobs.new_zeros(rows.numel(), self.logprobs.shape[1])
        padded[self.mask[rows]] = per_token
        return padded

    def all_gather_rows(self, mesh: Mesh, rows: Tensor, own: Tensor) -> Tensor:
        """`own` [len(rows), ...] in the place of the episodes `rows`, [B, ...], and the other data-parallel ranks' rows
        from them.
        """
        filled = own.new_zeros(self.tokens.shape[0], *own.shape[1:])
        filled[rows] = own
        return mesh.sum_over_data(filled)


@dataclass(kw_only=True)
class PPOBatch(PackedBatch):
    """A packed micro-batch of episodes with what the losses need, fp32 [T], 0 outside loss_mask."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor


def gather(mesh: Mesh, episodes: Sequence[tuple[list[int], Generated]]) -> Rollouts:
    """The (prompt, response) pairs of all data-parallel ranks, each of which brings as many; not scored yet."""
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in episodes])
    response_lengths = torch.tensor([len(answer.tokens) for _, answer in episodes])
    longest = torch.stack([(prompt_lengths + response_lengths).max(), response_lengths.max()])
    L, R = mesh.max_over_data(longest.to(mesh.device)).tolist()
    tokens = [torch.tensor([*prompt, *answer.tokens]) for prompt, answer in episodes]
    logprobs = [torch.tensor(answer.logprobs, dtype=torch.float32) for _, answer in episodes]

    def everyones(own: Tensor) -> Tensor:
        return mesh.gather_over_data(own.to(mesh.device))

    gathered = everyones(_padded(logprobs, R))
    return Rollouts(
        tokens=everyones(_padded(tokens, L)),
        prompt_lengths=everyones(prompt_lengths),
        response_lengths=everyones(response_lengths),
        stopped=everyones(torch.tensor([answer.stopped for _, answer in episodes])),
        logprobs=gathered,
        ref_logprobs=torch.zeros_like(gathered),
        values=torch.zeros_like(gathered),
        scores=gathered.new_zeros(gathered.shape[0]),
    )


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - row.numel())) for row in rows])


def own_rows(mesh: Mesh, rows: Tensor, lengths: Tensor, train: TrainConfig) -> list[Tensor]:
    """This data-parallel rank's share of `rows` (int64 [n]), one tensor of row numbers a micro-batch.

    Micro-batches hold train.micro_batch_size episodes; or, under train.max_tokens_per_micro_batch, as many as fit, and
    ranks get about equal tokens. `lengths` int64 [B] are those of all episodes.
    """
    budget = train.max_tokens_per_micro_batch
    if budget is None:
        return list(rows.chunk(mesh.data_size)[mesh.data_rank].split(train.micro_batch_size))
    shares = packing.share(lengths[rows.to(lengths.device)].tolist(), mesh.data_size, budget)
    return [rows[micro_batch] for micro_batch in shares[mesh.data_rank]]


def counted_places(batch: PackedBatch) -> Tensor:
    """int64 [n]: the places of the row that predict response tokens, in order; a mask would wait for a GPU to count."""
    return true_places(batch.loss_mask, batch.num_counted)


def training_batch(
    rollouts: Rollouts, advantages: Tensor, returns: Tensor, rows: Tensor
) -> PPOBatch:
    """The episodes `rows` as a packed micro-batch with their targets; advantages and returns [B, R]."""
    batch = rollouts.pack(rows)
    places, response_tokens = (
        counted_places(batch),
        true_places(rollouts.mask[rows].flatten(), batch.num_counted),
    )

    def spread(per_response: Tensor) -> Tensor:
        row = per_response.new_zeros(batch.tokens.numel())
        row[places] = per_response[rows].flatten()[response_tokens]
        return row

    return PPOBatch(
        **vars(batch),
        old_logprobs=spread(rollouts.logprobs),
        advantages=spread(advantages),
        old_values=spread(rollouts.values),
        returns=spread(returns),
    )


def sample_records(
    rollouts: Rollouts, scores: Tensor, tokenizer: Any, count: int
) -> list[dict[str, Any]]:
    """The first `count` episodes for people to read: prompt, response, score (penalty included), kl (k1, nats) and
    whether a stop token ended it.
    """
    kl = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).sum(1)
    prompts, responses = texts(rollouts, torch.arange(min(count, scores.numel())), tokenizer)
    return [
        {
            "prompt": prompt,
            "response": response,
            "score": scores[row].item(),
            "kl": kl[row].item(),
            "stopped": bool(rollouts.stopped[row]),
        }
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def texts(rollouts: Rollouts, rows: Tensor, tokenizer: Any) -> tuple[list[str], list[str]]:
    """(prompts as the model read them, responses without special tokens) of `rows`."""
    prompts, responses = [], []
    for tokens, prompt in zip(
        rollouts.sequences(rows), rollouts.prompt_lengths[rows].tolist(), strict=True
    ):
        prompts.append(str(tokenizer.decode(tokens[:prompt])))
        responses.append(str(tokenizer.decode(tokens[prompt:], skip_special_tokens=True)))
    return prompts, responses
