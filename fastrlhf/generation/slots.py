"""The sequences that decode together: their cache rows, kept dense, and the micro-batches made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastrlhf.data.batches import pack
from fastrlhf.models.attention import KVCache
from fastrlhf.models.gpt import CachedInput

Tensor = torch.Tensor
PREFILL_TOKENS = 8192
"""Prompt tokens in one prefill micro-batch (one longer prompt still goes): bounds the memory of its activations."""
LENGTH_STEP = 32
"""Attention reads the cache up to the longest active sequence, rounded up to this."""


@dataclass
class Running:
    """A sequence in flight; `limit` is the most tokens its response may have."""

    index: int
    id: int
    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Draw(CachedInput):
    """A micro-batch that ends with one new token for each of the rows first .. first + count - 1 of `group`."""

    group: SlotGroup
    first: int
    count: int
    last: Tensor | None
    """int64 [count]: index in the micro-batch of each row's newest token; None in a decode step, where every token
    is one.
    """

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


class SlotGroup:
    """Up to `slots` running sequences. Row r of the cache and of the state belongs to running[r]: there are no holes,
    so a decode step is over rows 0 .. B - 1 and spends nothing on finished sequences.
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self.slots = slots
        self.cache = KVCache(slots, length)
        self.running: list[Running] = []
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        """[slots]: newest token of each row, which the cache does not hold yet."""
        self.positions = torch.zeros_like(self.tokens)
        """[slots]: its position."""
        self.ids = torch.zeros_like(self.tokens)
        """[slots]: the sequence's id."""
        self.prompt_lengths = torch.zeros_like(self.tokens)
        """[slots]"""
        self.active = torch.zeros_like(self.tokens, dtype=torch.bool)
        """bool [slots]: rows of running sequences. The others stand at token 0, position 0."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What is known of each row, besides the cache."""
        return self.tokens, self.positions, self.ids, self.prompt_lengths, self.active

    @property
    def free(self) -> int:
        return self.slots - len(self.running)

    def admit(self, sequences: Sequence[Running]) -> list[Draw]:
        """Gives free rows to `sequences`; returns the micro-batches that prefill them and draw their first tokens."""
        return [self._prefill(chunk) for chunk in _chunks(sequences)]

    def _prefill(self, sequences: list[Running]) -> Draw:
        first, count = len(self.running), len(sequences)
        self.running += sequences
        device = self.tokens.device
        prompts = pack([sequence.prompt for sequence in sequences], [0] * count).to(device)
        lengths = prompts.cu_seqlens.diff()
        rows = torch.arange(first, first + count, device=device).repeat_interleave(
            lengths, output_size=prompts.tokens.numel()
        )
        batch = CachedInput.prefill(prompts, self.cache, rows)
        draw = Draw(
            batch.tokens, batch.layout, self, first, count, prompts.cu_seqlens[1:].long() - 1
        )
        self.ids[draw.rows] = torch.tensor([sequence.id for sequence in sequences], device=device)
        self.prompt_lengths[draw.rows] = lengths.long()
        self.positions[draw.rows] = lengths.long() - 1
        self.active[draw.rows] = True
        return draw

    def advance(self, rows: slice, drawn: Tensor) -> None:
        """Appends the drawn tokens, int64 [rows], to the rows that are active."""
        active = self.active[rows]
        self.tokens[rows] = drawn * active
        self.positions[rows] = (self.positions[rows] + 1) * active

    def decode(self) -> Draw:
        """The micro-batch that continues every running sequence by one token."""
        length = min(-(-self.longest // LENGTH_STEP) * LENGTH_STEP, self.cache.length)
        return self.decode_rows(len(self.running), length)

    @property
    def longest(self) -> int:
        """Tokens of the longest running sequence."""
        return max(len(sequence.prompt) + len(sequence.tokens) for sequence in self.running)

    def decode_rows(self, B: int, length: int) -> Draw:
        """The micro-batch that continues the first B rows, none of them longer than `length` with the new token."""
        batch = CachedInput.decode(self.tokens[:B], self.positions[:B], self.cache, length)
        return Draw(batch.tokens, batch.layout, self, 0, B, None)

    def retire(self, row: int) -> None:
        """Frees a row; the last one moves into its place."""
        last = len(self.running) - 1
        if row != last:
            moved = self.running[last]
            self.running[row] = moved
            self.cache.move(last, row, len(moved.prompt) + len(moved.tokens))
            for state in self.state:
                state[row] = state[last]
        for state in self.state:
            state[last] = 0
        self.running.pop()


def _chunks(sequences: Sequence[Running]) -> list[list[Running]]:
    """Runs of sequences whose prompts, padded to the longest of the run, stay within PREFILL_TOKENS."""
    chunks: list[list[Running]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence.prompt))
        if not chunks or longest * (len(chunks[-1]) + 1) > PREFILL_TOKENS:
            chunks.append([])
            longest = len(sequence.prompt)
        chunks[-1].append(sequence)
    return chunks
