"""Packed micro-batches: one flat row of T tokens holds S sequences back to back, without padding.

The sequences are delimited by `cu_seqlens`. `pack` builds a batch from sequences with prompts (SFT,
sampling, PPO), `pack_rankings` from K ranked responses per prompt (reward model), `pack_branches`
from prompts that each occur once in the row, followed by several responses, and `pack_windows` from
pretraining windows.

Out of scope: truncation (datasets.py) and batch composition (loader.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

IGNORED_LABEL = -100

Batch = TypeVar("Batch", bound="PackedBatch")


@dataclass(frozen=True)
class TokenizedDemonstration:
    """Prompt and response as one sequence of tokens.

    The loss counts the tokens after the first `prompt_length`. Of the prompt it counts only the
    spans [start, end) in `trained`: earlier turns of the assistant.
    """

    tokens: list[int]
    prompt_length: int
    trained: tuple[tuple[int, int], ...] = ()
    is_pretraining: bool = False
    """True for a row of pretraining text that is mixed into demonstrations."""

    @property
    def num_labels(self) -> int:
        """Number of labels that the loss counts: a sequence's first token is no label."""
        response = len(self.tokens) - max(self.prompt_length, 1)
        return max(response, 0) + sum(max(end - max(first, 1), 0) for first, end in self.trained)


@dataclass(frozen=True)
class TokenizedRanking:
    """One prompt with K ranked responses.

    A lower rank is better; equal ranks are a tie. `user_id` wrote the prompt, `labeler_id` ranked
    the responses.
    """

    prompt_tokens: list[int]
    responses: list[list[int]]
    ranks: Sequence[int | float]
    user_id: str | None = None
    labeler_id: str | None = None


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt to sample a response to, and the other columns of its record."""

    tokens: list[int]
    columns: dict[str, object] = field(default_factory=dict)


@dataclass(kw_only=True)
class PackedBatch:
    """S sequences in one row of T tokens; all tensors are on one device.

    - tokens int64 [T].
    - positions int64 [T], counted from 0 in each sequence.
    - cu_seqlens int32 [S+1]: sequence s is [cu_seqlens[s], cu_seqlens[s+1]).
    - labels int64 [T]: the next token of the same sequence, -100 at its last token.
    - loss_mask bool [T]: True where the label counts.
    - max_seqlen: length of the longest sequence. It is a Python int so that attention kernels do
      not wait for the device. 0 means: computed here.

    If sequences branch from a prompt that the row holds once (`pack_branches`), sequence s attends
    to the tokens key_index[cu_seqlens_kv[s] : cu_seqlens_kv[s+1]]: those of its prompt, then its
    own. key_index is int64, cu_seqlens_kv int32 [S+1], and max_seqlen_kv the longest such range.
    Positions of a branch continue from its prompt's.

    num_counted is the number of labels that count. `to` computes it before the mask leaves the
    host, so that on a GPU the LM head can skip the other labels without a synchronization. It is
    None on a CPU, where the mask itself can be read.

    pretraining, bool [T], is True for the tokens of pretraining rows that are mixed into
    demonstrations. It is None if the batch has none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    max_seqlen: int = 0
    key_index: torch.Tensor | None = None
    cu_seqlens_kv: torch.Tensor | None = None
    max_seqlen_kv: int = 0
    num_counted: int | None = None
    pretraining: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.max_seqlen == 0:
            self.max_seqlen = int(self.cu_seqlens.diff().max())

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences."""
        return self.cu_seqlens.numel() - 1

    def to(self: Batch, device: torch.device | str) -> Batch:
        """Return a copy with every tensor on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        if self.loss_mask.device.type == "cpu" != torch.device(device).type:
            moved["num_counted"] = int(self.loss_mask.sum())
        return replace(self, **moved)


@dataclass(kw_only=True)
class RankingBatch(PackedBatch):
    """G prompts with N = sum K responses; the responses of a prompt are adjacent.

    The row holds prompt + response for each response, or each prompt once with its responses
    branching from it.

    - ranks int64 or float32 [N].
    - prompt_offsets int64 [G+1]: prompt g has the responses
      [prompt_offsets[g], prompt_offsets[g+1]).
    - last_index int64 [N]: index in the row of each response's last token, where the score is read.
    """

    ranks: torch.Tensor
    prompt_offsets: torch.Tensor
    last_index: torch.Tensor

    @property
    def num_prompts(self) -> int:
        """G, the number of prompts."""
        return self.prompt_offsets.numel() - 1

    def unshared_tokens(self) -> torch.Tensor:
        """Return the number of tokens if every response had its own copy of the prompt.

        The result is an int64 scalar tensor.
        """
        return (self.positions[self.last_index] + 1).sum()


def pack(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> PackedBatch:
    """Pack S >= 1 non-empty sequences into one row.

    Labels that are among the first `prompt_lengths[s]` tokens of sequence s do not count; with a
    prompt length of 0 every label counts. The label of a prompt's last token is the first response
    token, so it counts. Raises ValueError if a sequence is empty or the lengths do not match.
    """
    lengths = _lengths(sequences)
    if len(prompt_lengths) != len(lengths):
        raise ValueError(
            f"prompt_lengths has {len(prompt_lengths)} entries for {len(lengths)} sequences"
        )
    cu_seqlens = _offsets(lengths)
    tokens = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    positions = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], lengths)
    last = cu_seqlens[1:] - 1
    labels = np.roll(tokens, -1)
    labels[last] = IGNORED_LABEL
    loss_mask = positions + 1 >= np.repeat(np.asarray(prompt_lengths, dtype=np.int64), lengths)
    loss_mask[last] = False
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        max_seqlen=int(lengths.max()),
    )


def pack_demonstrations(demonstrations: Sequence[TokenizedDemonstration]) -> PackedBatch:
    """Pack demonstrations: one sequence each, with loss on the response and the `trained` spans."""
    packed = pack([d.tokens for d in demonstrations], [d.prompt_length for d in demonstrations])
    for start, demonstration in zip(packed.cu_seqlens.tolist(), demonstrations, strict=False):
        for first, end in demonstration.trained:
            # A token is trained where it is the label, one position earlier; a sequence's first
            # token is no label.
            packed.loss_mask[start + max(first, 1) - 1 : start + end - 1] = True
    mixed = torch.tensor([demonstration.is_pretraining for demonstration in demonstrations])
    if mixed.any():
        packed.pretraining = mixed.repeat_interleave(packed.cu_seqlens.diff())
    return packed


def pack_rankings(
    rankings: Sequence[TokenizedRanking], *, shared_prompt: bool = False
) -> RankingBatch:
    """Pack rankings with all responses of each prompt, so that all C(K,2) pairs can be formed.

    With `shared_prompt` the row holds each prompt once and its responses branch from it, which
    gives the same scores from fewer tokens. Raises ValueError if a response is empty or the number
    of ranks differs from the number of responses.
    """
    for g, r in enumerate(rankings):
        if len(r.ranks) != len(r.responses):
            raise ValueError(
                f"ranking {g} has {len(r.ranks)} ranks for {len(r.responses)} responses"
            )
        if not all(r.responses):
            raise ValueError(
                f"ranking {g}: response {r.responses.index([])} is empty; "
                "expected at least one token"
            )
    if shared_prompt:
        packed, last = pack_branches(
            [r.prompt_tokens for r in rankings], [r.responses for r in rankings]
        )
    else:
        sequences = [r.prompt_tokens + response for r in rankings for response in r.responses]
        packed = pack(sequences, [len(r.prompt_tokens) for r in rankings for _ in r.responses])
        last = packed.cu_seqlens[1:].long() - 1
    ranks = [rank for r in rankings for rank in r.ranks]
    integral = all(isinstance(rank, int) for rank in ranks)
    return RankingBatch(
        **vars(packed),
        ranks=torch.tensor(ranks, dtype=torch.int64 if integral else torch.float32),
        prompt_offsets=torch.from_numpy(
            _offsets(np.array([len(r.responses) for r in rankings], dtype=np.int64))
        ),
        last_index=last,
    )


def ranking_tokens(ranking: TokenizedRanking, *, shared_prompt: bool) -> int:
    """Return the number of tokens that `pack_rankings` needs for `ranking`."""
    copies = 1 if shared_prompt else len(ranking.responses)
    return copies * len(ranking.prompt_tokens) + sum(map(len, ranking.responses))


def pack_branches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]
) -> tuple[PackedBatch, torch.Tensor]:
    """Pack each prompt once, followed by its responses: prompt 0, its K responses, prompt 1, ...

    Returns the batch and an int64 tensor [N] with the index in the row of each response's last
    token.

    Every prompt and every response is a sequence of the row. A response's positions continue from
    its prompt's, and its tokens attend to the prompt and to the response itself, but to no other
    response. Its hidden states are therefore those of prompt + response in one sequence. The label
    of a prompt's last token does not count: it would be the first token of each response.
    """
    sequences: list[Sequence[int]] = []
    prompt_of: list[int] = []  # the sequence that holds a sequence's prompt
    offsets: list[int] = []  # tokens of the prompt before a sequence's own
    uncounted: list[int] = []  # tokens at a sequence's start that do not count as labels
    branches: list[int] = []  # the sequences that are responses
    for prompt, continuations in zip(prompts, responses, strict=True):
        first, roots = len(sequences), 1 if prompt else 0
        sequences += [prompt, *continuations] if prompt else continuations
        prompt_of += [first] * (roots + len(continuations))
        offsets += [0] * roots + [len(prompt)] * len(continuations)
        uncounted += [len(prompt)] * roots + [0] * len(continuations)
        branches += range(first + roots, len(sequences))
    packed = pack(sequences, uncounted)
    starts = packed.cu_seqlens.numpy().astype(np.int64)
    lengths, shared = _lengths(sequences), np.array(offsets)
    keys = [
        np.concatenate(
            [np.arange(starts[prompt], starts[prompt] + offset), np.arange(start, start + length)]
        )
        for prompt, offset, start, length in zip(prompt_of, offsets, starts, lengths, strict=False)
    ]
    packed.positions += torch.from_numpy(np.repeat(shared, lengths))
    packed.key_index = torch.from_numpy(np.concatenate(keys))
    packed.cu_seqlens_kv = torch.from_numpy(_offsets(lengths + shared).astype(np.int32))
    packed.max_seqlen_kv = int((lengths + shared).max())
    return packed, torch.from_numpy(starts[1:] - 1)[branches]


def pack_windows(windows: Sequence[Sequence[int]]) -> PackedBatch:
    """Pack windows: L + 1 tokens become a sequence of L tokens whose labels all count."""
    packed = pack([window[:-1] for window in windows], [0] * len(windows))
    labels = np.concatenate([np.asarray(window[1:], dtype=np.int64) for window in windows])
    packed.labels = torch.from_numpy(labels)
    packed.loss_mask = torch.ones(len(labels), dtype=torch.bool)
    return packed


def demonstration_tokens(demonstration: TokenizedDemonstration) -> int:
    """Return the number of tokens that `demonstration` adds to a micro-batch."""
    return len(demonstration.tokens)


def window_tokens(window: Sequence[int]) -> int:
    """Return the number of tokens that a window of L + 1 tokens adds to a micro-batch: L."""
    return len(window) - 1


def _lengths(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    if len(lengths) == 0:
        raise ValueError("sequences is empty; a packed batch holds at least one")
    if lengths.min() == 0:
        raise ValueError(
            f"sequence {int(lengths.argmin())} is empty; "
            "every packed sequence has at least one token"
        )
    if lengths.sum() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{int(lengths.sum())} tokens in one batch; cu_seqlens is int32, so at most 2^31 - 1"
        )
    return lengths


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
