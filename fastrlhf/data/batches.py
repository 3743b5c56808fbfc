"""Packed micro-batches: one flat row of T tokens holds S sequences back to back, told apart by cu_seqlens. No padding.

`pack` builds them from sequences with prompts (SFT, sampling, PPO), `pack_rankings` from K ranked responses a prompt
(reward model), `pack_branches` from prompts that stand in the row once with several responses behind them,
`pack_windows` from pretraining windows. Left out on purpose: truncation (datasets.py) and batch composition
(loader.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

IGNORED_LABEL = -100

Batch = TypeVar("Batch", bound="PackedBatch")


@dataclass(frozen=True)
class DemonstrationTokens:
    """Prompt and response as one sequence; of the first `prompt_length` tokens only the spans [start, end) in
    `trained` are trained on: earlier turns of the assistant.
    """

    tokens: list[int]
    prompt_length: int
    trained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TokenizedRanking:
    """One prompt, its K responses, each response's rank (lower is better, equal is a tie), and whose ranking it is."""

    prompt_tokens: list[int]
    responses: list[list[int]]
    ranks: Sequence[int | float]
    user_id: str | None = None
    labeler_id: str | None = None


@dataclass(kw_only=True)
class PackedBatch:
    """S sequences in one row of T tokens; all tensors on one device.

    tokens int64 [T]; positions int64 [T], from 0 in each sequence; cu_seqlens int32 [S+1], sequence s is
    [cu_seqlens[s], cu_seqlens[s+1]); labels int64 [T], the next token of the same sequence, -100 where there is none;
    loss_mask bool [T], True where the label counts; max_seqlen, the longest sequence, a Python int so that attention
    kernels get it without waiting for the device (0: computed here).

    Where sequences branch from a prompt that the row holds once (`pack_branches`), the tokens that sequence s attends
    to, its prompt's before its own, are key_index[cu_seqlens_kv[s] : cu_seqlens_kv[s+1]]: key_index int64,
    cu_seqlens_kv int32 [S+1], max_seqlen_kv the longest of them. Positions of a branch continue from its prompt's.

    num_counted: how many labels count, kept by `to` from before the mask left the host, so that on a GPU the LM head
    can pass over the others without waiting; None on a CPU, where the mask itself can be read.
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

    def __post_init__(self) -> None:
        if self.max_seqlen == 0:
            self.max_seqlen = int(self.cu_seqlens.diff().max())

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.numel() - 1

    def to(self: Batch, device: torch.device | str) -> Batch:
        """A copy with every tensor on `device`."""
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
    """G prompts with N = sum K responses, the responses of a prompt side by side.

    The row holds prompt + response for each response, or each prompt once with its responses branching from it.
    ranks int64 or float32 [N]; prompt_offsets int64 [G+1], prompt g owns responses [prompt_offsets[g],
    prompt_offsets[g+1]); last_index int64 [N], the place in the row of each response's last token, where the score is
    read.
    """

    ranks: torch.Tensor
    prompt_offsets: torch.Tensor
    last_index: torch.Tensor

    @property
    def num_prompts(self) -> int:
        """G."""
        return self.prompt_offsets.numel() - 1

    def separate_tokens(self) -> torch.Tensor:
        """Tokens that one forward per response would process, prompt and response each time; int64 scalar."""
        return (self.positions[self.last_index] + 1).sum()


def pack(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> PackedBatch:
    """Pack S >= 1 non-empty sequences; labels inside the first `prompt_lengths[s]` tokens of sequence s do not count.

    A prompt length of 0 counts every label. The label of a prompt's last token is the first response token, so it
    counts.
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


def pack_demonstrations(demonstrations: Sequence[DemonstrationTokens]) -> PackedBatch:
    """The micro-batch of SFT: one sequence a demonstration, loss on the response and on the `trained` spans."""
    packed = pack([d.tokens for d in demonstrations], [d.prompt_length for d in demonstrations])
    for start, demonstration in zip(packed.cu_seqlens.tolist(), demonstrations, strict=False):
        for first, end in demonstration.trained:
            # A token is trained where it is the label, one place before it; a sequence's first token is no label.
            packed.loss_mask[start + max(first, 1) - 1 : start + end - 1] = True
    return packed


def pack_rankings(
    rankings: Sequence[TokenizedRanking], *, shared_prompt: bool = False
) -> RankingBatch:
    """The micro-batch of the reward model: every response of a prompt is in it, so that all C(K,2) pairs can be
    formed.

    With `shared_prompt` a prompt stands in the row once and its responses branch from it: the same scores from fewer
    tokens.
    """
    for g, r in enumerate(rankings):
        if len(r.ranks) != len(r.responses):
            raise ValueError(
                f"ranking {g} has {len(r.ranks)} ranks for {len(r.responses)} responses"
            )
        if not all(r.responses):
            raise ValueError(
                f"ranking {g}: response {r.responses.index([])} is empty; each has at least one token"
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
    whole = all(isinstance(rank, int) for rank in ranks)
    return RankingBatch(
        **vars(packed),
        ranks=torch.tensor(ranks, dtype=torch.int64 if whole else torch.float32),
        prompt_offsets=torch.from_numpy(
            _offsets(np.array([len(r.responses) for r in rankings], dtype=np.int64))
        ),
        last_index=last,
    )


def ranking_tokens(ranking: TokenizedRanking, *, shared_prompt: bool) -> int:
    """Tokens of one ranking in a row of `pack_rankings`: what it costs of a token budget."""
    copies = 1 if shared_prompt else len(ranking.responses)
    return copies * len(ranking.prompt_tokens) + sum(map(len, ranking.responses))


def pack_branches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]
) -> tuple[PackedBatch, torch.Tensor]:
    """Each prompt once, its responses behind it: prompt 0, its K responses, prompt 1, ...; and int64 [N], the place of
    each response's last token.

    Every prompt and every response is a sequence of the row. A response's tokens stand at the positions after its
    prompt and attend to prompt and response, to no other response, so its hidden states are those of the two in one
    sequence. The label of a prompt's last token, which would be each response's first, is left out.
    """
    sequences: list[Sequence[int]] = []
    prompt_of: list[int] = []  # the sequence that holds a sequence's prompt
    offsets: list[int] = []  # tokens of the prompt before a sequence's own
    uncounted: list[int] = []  # tokens at a sequence's start whose labels do not count
    branches: list[int] = []
    for prompt, continuations in zip(prompts, responses, strict=True):
        first, roots = len(sequences), 1 if prompt else 0
        sequences += [prompt, *continuations] if prompt else continuations
        prompt_of += [first] * (roots + len(continuations))
        offsets += [0] * roots + [len(prompt)] * len(continuations)
        uncounted += [len(prompt)] * roots + [0] * len(continuations)
        branches += range(first + roots, len(sequences))
    packed = pack(sequences, uncounted)
    starts, lengths, shared = (
        packed.cu_seqlens.numpy().astype(np.int64),
        _lengths(sequences),
        np.array(offsets),
    )
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
    """The micro-batch of pretraining: a window of L + 1 tokens becomes one sequence of L tokens whose L labels all
    count.
    """
    packed = pack([window[:-1] for window in windows], [0] * len(windows))
    labels = np.concatenate([np.asarray(window[1:], dtype=np.int64) for window in windows])
    packed.labels = torch.from_numpy(labels)
    packed.loss_mask = torch.ones(len(labels), dtype=torch.bool)
    return packed


def demonstration_tokens(demonstration: DemonstrationTokens) -> int:
    """Tokens that `demonstration` adds to a micro-batch."""
    return len(demonstration.tokens)


def window_tokens(window: Sequence[int]) -> int:
    """Tokens that a pretraining window of L + 1 adds to a micro-batch: L."""
    return len(window) - 1


def _lengths(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    if len(lengths) == 0:
        raise ValueError("sequences is empty; a packed batch holds at least one")
    if lengths.min() == 0:
        raise ValueError(
            f"sequence {int(lengths.argmin())} is empty; every packed sequence has at least one token"
        )
    if lengths.sum() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{int(lengths.sum())} tokens in one batch; cu_seqlens is int32, so at most 2^31 - 1"
        )
    return lengths


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
