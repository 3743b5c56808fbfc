"""Continuous batching over the training weights: no copy of the model, no second engine, no server.

`slots` sequences decode at once; one that finishes leaves its slot at once, and waiting prompts are prefilled, packed,
into the free slots. With pipeline stages the slots are split into as many groups, whose steps overlap. All ranks of a
model-parallel group (tensor x pipeline) return the same responses; data-parallel ranks take their own prompts and never
wait for each other. Left out on purpose: prefix sharing, paged caches, preemption.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastrlhf.errors import UserError
from fastrlhf.generation import graphs
from fastrlhf.generation.forward import Forward
from fastrlhf.generation.graphs import DecodeGraphs
from fastrlhf.generation.memory import affordable_slots
from fastrlhf.generation.sampling import Sampler, SamplingParams
from fastrlhf.generation.slots import Draw, Running, SlotGroup
from fastrlhf.generation.stopping import StopStrings
from fastrlhf.models.eager_forward import no_torch_function
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tensor = torch.Tensor
NO_EOS = -1
"""In place of a stop token: no token."""


@dataclass(frozen=True)
class Generated:
    """The response to one prompt."""

    index: int
    """Place of the prompt in the list."""
    tokens: list[int]
    """Response ids, with the stop token (or the token that completes a stop string) when there is one."""
    logprobs: list[float]
    """log softmax(logits / temperature) of each token over the whole vocabulary (temperature 1 when greedy), fp32."""
    stopped: bool
    """True: ended by the stop token or a stop string; False: cut at the length limit."""


def generate(
    stage: GPT,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    mesh: Mesh | None = None,
    eos: int | None = None,
    slots: int = 64,
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    ids: Sequence[int] | None = None,
) -> Iterator[Generated]:
    """Responses to this data-parallel rank's `prompts`, each yielded as soon as it is finished.

    A response depends on the weights, its prompt, `params` and its id alone: `ids[i]` is the number of prompt i over
    all ranks and calls that should differ (default: i). Prompt and response together stay within `max_length` (default
    and upper bound: the model's positions). `eos` defaults to the tokenizer's; with neither, only stop strings and
    limits end a response. `tokenizer` is needed for `params.stop`, `mesh` defaults to the model's. Dropout is off until
    the iterator is exhausted or closed; then the stage's training flag is put back and the cache is freed.

    Raises `UserError` for a prompt that is empty or leaves no room for a response, and where `params.cache_mb` holds
    no sequence; `ValueError` for arguments that do not fit.
    """
    if eos is None:
        eos = (
            tokenizer.eos_token_id
            if tokenizer is not None and tokenizer.eos_token_id is not None
            else NO_EOS
        )
    if slots < 1:
        raise ValueError(f"slots is {slots}; expected 1 or above")
    if eos != NO_EOS and not 0 <= eos < stage.vocab_size:
        raise ValueError(
            f"eos is {eos}; expected a token of the vocabulary, 0 .. {stage.vocab_size - 1}"
        )
    if ids is not None and len(ids) != len(prompts):
        raise ValueError(f"ids has {len(ids)} entries for {len(prompts)} prompts")
    if params.stop and tokenizer is None:
        raise ValueError("params.stop holds strings, which need the tokenizer argument")
    waiting = _waiting(stage, prompts, params, max_length, ids)
    return (
        _Engine(stage, params, mesh or stage.mesh, eos, tokenizer).run(waiting, slots)
        if waiting
        else iter(())
    )


def generate_all(
    stage: GPT, prompts: Sequence[list[int]], params: SamplingParams, **options: object
) -> list[Generated]:
    """`generate` to the end: the responses in the order of the prompts."""
    return sorted(generate(stage, prompts, params, **options), key=lambda response: response.index)  # type: ignore[arg-type]


def _waiting(
    stage: GPT,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    max_length: int | None,
    ids: Sequence[int] | None,
) -> deque[Running]:
    """The queue, longest prompts first: neighbours of like length waste no padding, and the longest run is not the
    last.
    """
    positions = stage.model_config.max_positions
    room, name = positions, "model.max_positions"
    if max_length is not None and max_length < positions:
        room, name = max_length, "max_length"
    sequences = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty; every prompt needs at least one token")
        if len(prompt) >= room:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, and {name} {room} leaves no room for a response; "
                "drop or shorten it (data.max_prompt_tokens)"
            )
        limit = min(params.max_new_tokens, room - len(prompt))
        sequences.append(Running(i, i if ids is None else ids[i], list(prompt), limit))
    return deque(sorted(sequences, key=lambda sequence: -len(sequence.prompt)))


class _Engine:
    def __init__(
        self,
        stage: GPT,
        params: SamplingParams,
        mesh: Mesh,
        eos: int,
        tokenizer: PreTrainedTokenizerFast | None,
    ) -> None:
        self.stage = stage
        self.forward = Forward(stage)
        self.params = params
        self.mesh = mesh
        self.eos = eos
        self.stop = (
            StopStrings(params.stop, tokenizer) if params.stop and tokenizer is not None else None
        )
        self.sampler = Sampler(params, eos=eos, **stage.lm_head()) if mesh.is_last_stage else None
        self.graphs: DecodeGraphs | None = None

    def run(self, waiting: deque[Running], slots: int) -> Iterator[Generated]:
        length = max(len(sequence.prompt) + sequence.limit for sequence in waiting)
        slots = affordable_slots(self.stage, min(slots, len(waiting)), length, self.params.cache_mb)
        stages = self.mesh.pipeline_size
        # ceil(slots / stages) rows a group, and no group without rows.
        sizes = [len(range(i, slots, stages)) for i in range(min(stages, slots))]
        groups = [SlotGroup(size, length, self.mesh.device) for size in sizes]
        if self.params.cuda_graphs and graphs.possible(self.mesh):
            self.graphs = DecodeGraphs(groups[0], partial(self._static_step, groups[0]))
        was_training = self.stage.training
        self.stage.eval()
        try:
            while waiting or any(group.running for group in groups):
                draws = self._refill(groups, waiting, slots)
                if draws or self.graphs is None:
                    draws = draws or [group.decode() for group in groups if group.running]
                    drawn = [
                        (draw.group, draw.first, rows)
                        for draw, rows in zip(draws, self._run(draws), strict=True)
                    ]
                else:
                    drawn = [(groups[0], 0, self._replay(groups[0], self.graphs))]
                yield from self._finish(drawn)
        finally:
            self.graphs = None
            self.stage.train(was_training)

    def _refill(self, groups: list[SlotGroup], waiting: deque[Running], slots: int) -> list[Draw]:
        """Prefills into free slots, once an eighth of them is free: nothing decodes during a prefill. (On a CPU, all
        thresholds from a single slot to a quarter of them are within 5 %.)
        """
        free = sum(group.free for group in groups)
        if not waiting or free < max(1, slots // 8):
            return []
        admitted: list[list[Running]] = [[] for _ in groups]
        for _ in range(min(free, len(waiting))):
            emptiest = max(range(len(groups)), key=lambda g: groups[g].free - len(admitted[g]))
            admitted[emptiest].append(waiting.popleft())
        return [
            draw
            for group, sequences in zip(groups, admitted, strict=True)
            for draw in group.admit(sequences)
        ]

    def _finish(self, drawn: list[tuple[SlotGroup, int, list[list[float]]]]) -> Iterator[Generated]:
        """Appends to each row of the groups what was drawn for it, from the given first row on; yields and retires the
        sequences that end.
        """
        finished: list[tuple[SlotGroup, int]] = []
        for group, first, pairs in drawn:
            for row, (token, logprob) in enumerate(pairs, first):
                sequence = group.running[row]
                sequence.tokens.append(int(token))
                sequence.logprobs.append(logprob)
                stopped = token == self.eos or (
                    self.stop is not None and self.stop.completed_by(sequence.tokens)
                )
                if stopped or len(sequence.tokens) == sequence.limit:
                    finished.append((group, row))
                    yield Generated(sequence.index, sequence.tokens, sequence.logprobs, stopped)
        for group, row in reversed(
            finished
        ):  # from the last row: the row that moves is never one that ends
            group.retire(row)

    @torch.no_grad()
    def _run(self, draws: list[Draw]) -> list[list[list[float]]]:
        """[token, log-probability] of each micro-batch's rows, on every rank; the groups' states move one token on."""
        if self.mesh.pipeline_size == 1:
            drawn = [self._head(self.forward(draw), draw) for draw in draws]
        else:
            drawn = schedule.forward(self.mesh, self.forward, draws, self._head)
        counts = [draw.count for draw in draws]
        drawn_N2 = self._share(drawn, sum(counts))
        for draw, tokens in zip(draws, drawn_N2[:, 0].long().split(counts), strict=True):
            draw.group.advance(draw.rows, tokens)
        rows = iter(drawn_N2.tolist())  # the one wait for the device
        return [list(itertools.islice(rows, count)) for count in counts]

    @torch.no_grad()
    def _replay(self, group: SlotGroup, captured: DecodeGraphs) -> list[list[float]]:
        """`_run` of the one group's decode step, from its graph."""
        return captured(len(group.running), group.longest).tolist()

    def _static_step(self, group: SlotGroup, rows: int, length: int) -> Tensor:
        """A decode step that reads and writes nothing but the group's tensors: what a graph may hold."""
        draw = group.decode_rows(rows, length)
        drawn_N2 = self._head(self.forward(draw), draw)
        group.advance(draw.rows, drawn_N2[:, 0].long())
        return drawn_N2

    def _head(self, hidden: Tensor, draw: Draw) -> Tensor:
        """On the last stage: hidden states [T, H] -> float64 [N, 2], each row's next token and its log-probability."""
        assert self.sampler is not None
        group, rows = draw.group, draw.rows
        newest = hidden if draw.last is None else hidden[draw.last]
        positions = group.positions[rows] + 1
        eos_from = (
            group.prompt_lengths[rows] + self.params.min_new_tokens
            if self.params.min_new_tokens
            else None
        )
        with no_torch_function():
            tokens, logprobs = self.sampler(newest, group.ids[rows], positions, eos_from)
        return torch.stack([tokens.double(), logprobs.double()], dim=1)

    def _share(self, drawn: list[Tensor], rows: int) -> Tensor:
        """The last stage's draws, float64 [rows, 2], on every stage: one broadcast."""
        if self.mesh.pipeline_size == 1:
            return torch.cat(drawn)
        out = torch.empty(rows, 2, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.is_last_stage:
            torch.cat(drawn, out=out)
        group = self.mesh.pipeline_group
        dist.broadcast(
            out, src=dist.get_global_rank(group, self.mesh.pipeline_size - 1), group=group
        )
        return out
