"""Slot groups: the sequences that decode together, their dense cache rows and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastrlhf.data.batches import pack
from fastrlhf.models.inputs import CachedInput
from fastrlhf.models.layout import KVCache

Tensor = torch.Tensor
PREFILL_TOKENS = 8192
"""Maximum padded prompt tokens in a prefill micro-batch; bounds the memory of its activations.

A prompt that is longer is prefilled alone.
"""
LENGTH_STEP = 32
"""Attention reads the cache up to the longest active sequence, rounded up to a multiple of this."""


@dataclass
class Request:
    """A prompt and the response generated so far."""

    index: int
    """Index of the prompt in the caller's list."""
    id: int
    """Key of its random numbers."""
    prompt: list[int]
    limit: int
    """Maximum length of the response."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class DecodeBatch(CachedInput):
    """A prefill or decode micro-batch; yields a token for rows first .. first + count - 1."""

    group: SlotGroup
    first: int
    count: int
    last: Tensor | None
    """int64 [count]: index in the micro-batch of each row's newest token.

    None in a decode step, where each row has one token.
    """

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


class SlotGroup:
    """Up to `slots` running requests.

    Row r of the cache and of the state belongs to running[r]. There are no holes: a decode step
    processes rows 0 .. B - 1 and computes nothing for finished sequences.
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self.slots = slots
        self.cache = KVCache(slots, length)
        self.running: list[Request] = []
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        """[slots]: newest token of each row, not yet in the cache."""
        self.positions = torch.zeros_like(self.tokens)
        """[slots]: its position."""
        self.ids = torch.zeros_like(self.tokens)
        """[slots]: the request's id."""
        self.prompt_lengths = torch.zeros_like(self.tokens)
        """[slots]"""
        self.active = torch.zeros_like(self.tokens, dtype=torch.bool)
        """bool [slots]: rows of running requests. The others hold token 0 at position 0."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The state tensors of the rows, without the cache."""
        return self.tokens, self.positions, self.ids, self.prompt_lengths, self.active

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.slots - len(self.running)

    def admit(self, requests: Sequence[Request]) -> list[DecodeBatch]:
        """Assign free rows to `requests`; return the micro-batches that prefill them."""
        return [self._prefill(chunk) for chunk in _chunks(requests)]

    def _prefill(self, requests: list[Request]) -> DecodeBatch:
        first, count = len(self.running), len(requests)
        self.running += requests
        device = self.tokens.device
        prompts = pack([request.prompt for request in requests], [0] * count).to(device)
        lengths = prompts.cu_seqlens.diff()
        rows = torch.arange(first, first + count, device=device).repeat_interleave(
            lengths, output_size=prompts.tokens.numel()
        )
        cached = CachedInput.prefill(prompts, self.cache, rows)
        last = prompts.cu_seqlens[1:].long() - 1
        batch = DecodeBatch(cached.tokens, cached.layout, self, first, count, last)
        self.ids[batch.rows] = torch.tensor([request.id for request in requests], device=device)
        self.prompt_lengths[batch.rows] = lengths.long()
        self.positions[batch.rows] = lengths.long() - 1
        self.active[batch.rows] = True
        return batch

    def advance(self, rows: slice, sampled: Tensor) -> None:
        """Append the sampled tokens, int64 [rows], to the active ones of `rows`."""
        active = self.active[rows]
        self.tokens[rows] = sampled * active
        self.positions[rows] = (self.positions[rows] + 1) * active

    def decode(self) -> DecodeBatch:
        """Return the micro-batch that continues every running sequence by one token."""
        length = min(-(-self.longest // LENGTH_STEP) * LENGTH_STEP, self.cache.length)
        return self.decode_rows(len(self.running), length)

    @property
    def longest(self) -> int:
        """Length of the longest running sequence, in tokens of prompt and response."""
        return max(len(request.prompt) + len(request.tokens) for request in self.running)

    def decode_rows(self, B: int, length: int) -> DecodeBatch:
        """Return the micro-batch that continues the first B rows by one token.

        With the new token, none of them may be longer than `length`.
        """
        batch = CachedInput.decode(self.tokens[:B], self.positions[:B], self.cache, length)
        return DecodeBatch(batch.tokens, batch.layout, self, 0, B, None)

    def evict(self, row: int) -> None:
        """Free a row and move the last row into its place."""
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


def _chunks(requests: Sequence[Request]) -> list[list[Request]]:
    """Split requests into chunks of at most PREFILL_TOKENS prompt tokens.

    Tokens count as padded to the longest prompt of the chunk. Longer prompts get their own chunk.
    """
    chunks: list[list[Request]] = []
    longest = 0
    for request in requests:
        longest = max(longest, len(request.prompt))
        if not chunks or longest * (len(chunks[-1]) + 1) > PREFILL_TOKENS:
            chunks.append([])
            longest = len(request.prompt)
        chunks[-1].append(request)
    return chunks
