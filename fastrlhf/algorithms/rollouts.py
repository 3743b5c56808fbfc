"""Sampled episodes as tensors, and as packed micro-batches for scoring and training.

Rows are episodes in the order of the prompts over all data-parallel ranks. Every rank holds all of
them (a few MB), so that whitening and minibatches are those of the full batch. Out of scope: losses
and updates (ppo.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastrlhf.config import TrainConfig
from fastrlhf.data import packing
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.generation.engine import Generated
from fastrlhf.ops.masked import true_places
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tensor = torch.Tensor
Records: TypeAlias = list[dict[str, object]]
"""The other columns of the records of prompts."""


@dataclass
class Rollouts:
    """B episodes of at most L tokens and R response tokens.

    Columns of response tensors count from the first response token. Entries past the end of a
    sequence are never read.
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
    """fp32 [B, R]: of the sampled tokens under the sampling policy, at the sampling temperature."""
    ref_logprobs: Tensor
    """fp32 [B, R]: of the same tokens, by the reference."""
    values: Tensor
    """fp32 [B, R]: value of the state before each token."""
    scores: Tensor
    """fp32 [B]: of the reward models and the reward function, before any penalty."""
    records: Records | None = None
    """[B]: the other columns of each prompt's record, if the reward function takes them."""

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: number of tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def mask(self) -> Tensor:
        """bool [B, R]: True for response tokens, False for padding."""
        R = self.logprobs.shape[1]
        return torch.arange(R, device=self.tokens.device) < self.response_lengths[:, None]

    def sequences(self, rows: Tensor) -> list[list[int]]:
        """Return prompt and response of each of `rows`, without padding."""
        tokens, lengths = self.tokens[rows].cpu(), self.lengths[rows].tolist()
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]

    def pack(self, rows: Tensor) -> PackedBatch:
        """Pack the episodes `rows` into one micro-batch.

        Its loss_mask is True at the positions that predict response tokens.
        """
        return pack(self.sequences(rows), self.prompt_lengths[rows].tolist()).to(self.tokens.device)

    def to_padded(self, rows: Tensor, per_token: Tensor) -> Tensor:
        """Pad `per_token`, the concatenated response tokens of `rows`, to [len(rows), R] with 0."""
        padded = self.logprobs.new_zeros(rows.numel(), self.logprobs.shape[1])
        padded[self.mask[rows]] = per_token
        return padded

    def all_gather_rows(self, mesh: Mesh, rows: Tensor, own: Tensor) -> Tensor:
        """All-gather per-episode results over the data-parallel ranks.

        Scatters this rank's `own` [len(rows), ...] into [B, ...] at `rows` and fills in the other
        ranks' rows.
        """
        filled = own.new_zeros(self.tokens.shape[0], *own.shape[1:])
        filled[rows] = own
        return mesh.sum_over_data(filled)


@dataclass(kw_only=True)
class PPOBatch(PackedBatch):
    """A packed micro-batch of episodes with inputs of the losses, fp32 [T], 0 outside loss_mask."""

    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor


class SampleRecord(TypedDict):
    """An episode in a form for people to read, a line of samples.jsonl."""

    prompt: str
    response: str
    score: float
    """Penalty included."""
    kl: float
    """k1, nats, summed over the response."""
    stopped: bool
    """Whether the response ended with a stop token."""


def gather(
    mesh: Mesh,
    episodes: Sequence[tuple[list[int], Generated]],
    records: Records | None = None,
) -> Rollouts:
    """Gather the (prompt, response) pairs of all data-parallel ranks, without scores.

    Every rank has the same number of pairs. `records` are those of its prompts.
    """
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in episodes])
    response_lengths = torch.tensor([len(answer.tokens) for _, answer in episodes])
    longest = torch.stack([(prompt_lengths + response_lengths).max(), response_lengths.max()])
    L, R = mesh.max_over_data(longest.to(mesh.device)).tolist()
    tokens = [torch.tensor([*prompt, *answer.tokens]) for prompt, answer in episodes]
    logprobs = [torch.tensor(answer.logprobs, dtype=torch.float32) for _, answer in episodes]

    def all_gather(own: Tensor) -> Tensor:
        return mesh.gather_over_data(own.to(mesh.device))

    gathered = all_gather(_padded(logprobs, R))
    return Rollouts(
        tokens=all_gather(_padded(tokens, L)),
        prompt_lengths=all_gather(prompt_lengths),
        response_lengths=all_gather(response_lengths),
        stopped=all_gather(torch.tensor([answer.stopped for _, answer in episodes])),
        logprobs=gathered,
        ref_logprobs=torch.zeros_like(gathered),
        values=torch.zeros_like(gathered),
        scores=gathered.new_zeros(gathered.shape[0]),
        records=None if records is None else _gather_records(mesh, records),
    )


def _gather_records(mesh: Mesh, own: Records) -> Records:
    parts = [own] * mesh.data_size
    if mesh.data_size > 1:
        dist.all_gather_object(parts, own, group=mesh.data_group)
    return [record for part in parts for record in part]


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - row.numel())) for row in rows])


def own_rows(mesh: Mesh, rows: Tensor, lengths: Tensor, train: TrainConfig) -> list[Tensor]:
    """Return this data-parallel rank's share of `rows` (int64 [n]), split into micro-batches.

    A micro-batch has train.micro_batch_size episodes. With train.max_tokens_per_micro_batch it has
    as many as fit, and ranks get about equal numbers of tokens. `lengths` int64 [B] are those of
    all episodes.
    """
    budget = train.max_tokens_per_micro_batch
    if budget is None:
        return list(rows.chunk(mesh.data_size)[mesh.data_rank].split(train.micro_batch_size))
    shares = packing.assign_micro_batches(
        lengths[rows.to(lengths.device)].tolist(), mesh.data_size, budget
    )
    return [rows[micro_batch] for micro_batch in shares[mesh.data_rank]]


def counted_positions(batch: PackedBatch) -> Tensor:
    """Return the indices into the packed row of the tokens whose label counts, in order; int64 [n].

    Of an episode those are the positions that predict response tokens. Indexing with the mask
    itself would wait for a GPU to count it.
    """
    return true_places(batch.loss_mask, batch.num_counted)


def training_batch(
    rollouts: Rollouts, advantages: Tensor, returns: Tensor, rows: Tensor
) -> PPOBatch:
    """Pack the episodes `rows` with their targets; advantages and returns [B, R]."""
    batch = rollouts.pack(rows)
    positions = counted_positions(batch)
    response_tokens = true_places(rollouts.mask[rows].flatten(), batch.num_counted)

    def to_packed(per_response: Tensor) -> Tensor:
        row = per_response.new_zeros(batch.tokens.numel())
        row[positions] = per_response[rows].flatten()[response_tokens]
        return row

    return PPOBatch(
        **vars(batch),
        old_logprobs=to_packed(rollouts.logprobs),
        advantages=to_packed(advantages),
        old_values=to_packed(rollouts.values),
        returns=to_packed(returns),
    )


def sample_records(
    rollouts: Rollouts, scores: Tensor, tokenizer: PreTrainedTokenizerFast, count: int
) -> list[SampleRecord]:
    """Return the first `count` episodes for people to read; scores [B], penalty included."""
    kl = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).sum(1)
    prompts, responses = decode_texts(rollouts, torch.arange(min(count, scores.numel())), tokenizer)
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


def decode_texts(
    rollouts: Rollouts, rows: Tensor, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[str], list[str]]:
    """Decode `rows` to (prompts as the model read them, responses without special tokens)."""
    prompts, responses = [], []
    for tokens, prompt in zip(
        rollouts.sequences(rows), rollouts.prompt_lengths[rows].tolist(), strict=True
    ):
        prompts.append(str(tokenizer.decode(tokens[:prompt])))
        responses.append(str(tokenizer.decode(tokens[prompt:], skip_special_tokens=True)))
    return prompts, responses
