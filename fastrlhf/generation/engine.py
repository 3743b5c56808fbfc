"""Continuous batching over the training weights: no copy of the model, no second engine, no server.

`slots` sequences decode at once. A sequence that finishes frees its slot immediately, and queued
prompts are packed and prefilled into the free slots. With pipeline stages the slots are split into
one group per stage, so that the steps of the groups overlap. All ranks of a model-parallel group
(tensor x pipeline) return the same responses. Data-parallel ranks process their own prompts and
never wait for each other. Not supported: prefix sharing, paged caches, preemption.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
import torch.distributed as dist

from fastrlhf.data.token_ids import largest_id, missing_ids
from fastrlhf.data.tokenize import stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.generation import graphs
from fastrlhf.generation.forward import EagerStage
from fastrlhf.generation.graphs import DecodeGraphs
from fastrlhf.generation.memory import affordable_slots
from fastrlhf.generation.sampling import Sampler, SamplingParams
from fastrlhf.generation.slots import DecodeBatch, Request, SlotGroup
from fastrlhf.generation.stopping import StopStrings
from fastrlhf.models.eager_forward import no_torch_function
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import schedule
from fastrlhf.parallel.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from typing_extensions import Unpack

Tensor = torch.Tensor


@dataclass(frozen=True)
class Generated:
    """The response to one prompt."""

    index: int
    """Index of the prompt in the list of prompts."""
    tokens: list[int]
    """Response ids, including the stop token or the token that completes a stop string, if any."""
    logprobs: list[float]
    """Per token, fp32: log softmax(logits / T) over the full vocabulary (T = 1 when greedy)."""
    stopped: bool
    """True if a stop token or stop string ended the response; False if the length limit did."""


@dataclass
class PrefillCount:
    """Counts what `generate` prefills."""

    tokens: int = 0
    """Prompt tokens that went through the model."""


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate`."""

    mesh: Mesh | None
    eos: int | Sequence[int] | None
    slots: int
    max_length: int | None
    tokenizer: PreTrainedTokenizerFast | None
    ids: Sequence[int] | None
    prefilled: PrefillCount | None


class _Sampled(NamedTuple):
    """The next tokens of the rows first, first + 1, ... of a slot group."""

    group: SlotGroup
    first: int
    rows: list[list[float]]
    """[token, log-probability] of each row."""


def generate(
    model: GPT,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    mesh: Mesh | None = None,
    eos: int | Sequence[int] | None = None,
    slots: int = 64,
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    ids: Sequence[int] | None = None,
    prefilled: PrefillCount | None = None,
) -> Iterator[Generated]:
    """Yield the responses to this data-parallel rank's `prompts`, each as soon as it is finished.

    A response depends on the weights, its prompt, `params` and its id alone. `ids[i]` identifies
    prompt i across all ranks and calls that should draw different responses (default: i). Prompt
    and response together stay within `max_length` (default and upper bound: the model's
    positions). `eos` is a stop token, or several; it defaults to the tokenizer's eos and end of
    turn (`stop_token_ids`). Without either, only stop strings and limits end a response.
    `tokenizer` is required if `params.stop` is set; ids that it lacks are never sampled. `mesh`
    defaults to the model's. `prefilled` counts the prompt tokens that this rank's model-parallel
    group computes. Dropout is off until the iterator is exhausted or closed; then the model's
    training flag is restored and the cache is freed.

    Raises UserError if a prompt is empty or leaves no room for a response, or if `params.cache_mb`
    is too small for one sequence; ValueError if an argument is out of range.
    """
    if eos is None:
        eos = stop_token_ids(tokenizer) if tokenizer is not None else ()
    stops = (eos,) if isinstance(eos, int) else tuple(eos)
    if slots < 1:
        raise ValueError(f"slots is {slots}; expected 1 or above")
    for token in stops:
        if not 0 <= token < model.vocab_size:
            raise ValueError(
                f"eos is {token}; expected a token of the vocabulary, 0 .. {model.vocab_size - 1}"
            )
    if ids is not None and len(ids) != len(prompts):
        raise ValueError(f"ids has {len(ids)} entries for {len(prompts)} prompts")
    if params.stop and tokenizer is None:
        raise ValueError("params.stop holds strings, which need the tokenizer argument")
    queue = _build_queue(model, prompts, params, max_length, ids)
    return (
        _Engine(model, params, mesh or model.mesh, stops, tokenizer, prefilled).run(queue, slots)
        if queue
        else iter(())
    )


def generate_all(
    model: GPT,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    **options: Unpack[GenerateOptions],
) -> list[Generated]:
    """Run `generate` to the end and return the responses in the order of the prompts."""
    return sorted(generate(model, prompts, params, **options), key=lambda response: response.index)


def _build_queue(
    model: GPT,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    max_length: int | None,
    ids: Sequence[int] | None,
) -> deque[Request]:
    """Check the prompts and queue them, longest first.

    Neighbours of similar length waste no padding, and the longest sequences do not start last.
    """
    positions = model.model_config.max_positions
    room, name = positions, "model.max_positions"
    if max_length is not None and max_length < positions:
        room, name = max_length, "max_length"
    requests = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty; every prompt needs at least one token")
        if len(prompt) >= room:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, and {name} {room} leaves no room for a "
                "response; drop or shorten it (data.max_prompt_tokens)"
            )
        limit = min(params.max_new_tokens, room - len(prompt))
        requests.append(Request(i, i if ids is None else ids[i], list(prompt), limit))
    return deque(sorted(requests, key=lambda request: -len(request.prompt)))


class _Engine:
    """The decode loop of one call of `generate`."""

    def __init__(
        self,
        model: GPT,
        params: SamplingParams,
        mesh: Mesh,
        eos: tuple[int, ...],
        tokenizer: PreTrainedTokenizerFast | None,
        prefilled: PrefillCount | None,
    ) -> None:
        self.prefilled = prefilled or PrefillCount()
        self.model = model
        self.forward = EagerStage(model)
        self.params = params
        self.mesh = mesh
        self.eos = eos
        self.stop = (
            StopStrings(params.stop, tokenizer) if params.stop and tokenizer is not None else None
        )
        self.sampler: Sampler | None = None
        if mesh.is_last_stage:
            head = model.lm_head()
            missing: list[int] = []
            if tokenizer is not None:
                head["vocab_size"] = min(head["vocab_size"], largest_id(tokenizer) + 1)
                missing = missing_ids(tokenizer)
            self.sampler = Sampler(params, eos=eos, missing=missing, **head)
        self.graphs: DecodeGraphs | None = None

    def run(self, queue: deque[Request], slots: int) -> Iterator[Generated]:
        """Yield the responses to the queued requests, at most `slots` of them decoding at once."""
        length = max(len(request.prompt) + request.limit for request in queue)
        slots = affordable_slots(self.model, min(slots, len(queue)), length, self.params.cache_mb)
        stages = self.mesh.pipeline_size
        # ceil(slots / stages) rows per group, and no group without rows.
        sizes = [len(range(i, slots, stages)) for i in range(min(stages, slots))]
        groups = [SlotGroup(size, length, self.mesh.device) for size in sizes]
        if self.params.cuda_graphs and graphs.can_capture(self.mesh):
            self.graphs = DecodeGraphs(groups[0], partial(self._static_step, groups[0]))
        was_training = self.model.training
        self.model.eval()
        try:
            while queue or any(group.running for group in groups):
                batches = self._refill(groups, queue, slots)
                if batches or self.graphs is None:
                    batches = batches or [group.decode() for group in groups if group.running]
                    sampled = [
                        _Sampled(batch.group, batch.first, rows)
                        for batch, rows in zip(batches, self._run(batches), strict=True)
                    ]
                else:
                    sampled = [_Sampled(groups[0], 0, self._replay(groups[0], self.graphs))]
                yield from self._finish(sampled)
        finally:
            self.graphs = None
            self.model.train(was_training)

    def _refill(
        self, groups: list[SlotGroup], queue: deque[Request], slots: int
    ) -> list[DecodeBatch]:
        """Prefill queued prompts into the free slots, once an eighth of the slots is free.

        Nothing decodes during a prefill, so prefills are batched. On a CPU, all thresholds from a
        single slot to a quarter of the slots are within 5 %.
        """
        free = sum(group.free for group in groups)
        if not queue or free < max(1, slots // 8):
            return []
        admitted: list[list[Request]] = [[] for _ in groups]
        for _ in range(min(free, len(queue))):
            emptiest = max(range(len(groups)), key=lambda g: groups[g].free - len(admitted[g]))
            admitted[emptiest].append(queue.popleft())
        with no_torch_function():
            batches = [
                batch
                for group, requests in zip(groups, admitted, strict=True)
                for batch in group.admit(requests)
            ]
        self.prefilled.tokens += sum(batch.tokens.numel() for batch in batches)
        return batches

    def _finish(self, sampled: list[_Sampled]) -> Iterator[Generated]:
        """Append the sampled tokens to their requests; yield and evict the requests that end."""
        finished: list[tuple[SlotGroup, int]] = []
        for group, first, pairs in sampled:
            for row, (token, logprob) in enumerate(pairs, first):
                request = group.running[row]
                request.tokens.append(int(token))
                request.logprobs.append(logprob)
                stopped = int(token) in self.eos or (
                    self.stop is not None and self.stop.completed_by(request.tokens)
                )
                if stopped or len(request.tokens) == request.limit:
                    finished.append((group, row))
                    yield Generated(request.index, request.tokens, request.logprobs, stopped)
        # Start at the last row: the row that moves into the free place is then never one that ends.
        with no_torch_function():
            for group, row in reversed(finished):
                group.evict(row)

    @torch.no_grad()
    def _run(self, batches: list[DecodeBatch]) -> list[list[list[float]]]:
        """Return [token, log-probability] of each batch's rows, on every rank.

        The state of each batch's slot group advances by one token.
        """
        if self.mesh.pipeline_size == 1:
            sampled = [self._sample(self.forward(batch), batch) for batch in batches]
        else:
            sampled = schedule.forward(self.mesh, self.forward, batches, self._sample)
        counts = [batch.count for batch in batches]
        sampled_N2 = self._broadcast(sampled, sum(counts))
        for batch, tokens in zip(batches, sampled_N2[:, 0].long().split(counts), strict=True):
            batch.group.advance(batch.rows, tokens)
        rows = iter(sampled_N2.tolist())  # the only device synchronization of a step
        return [list(itertools.islice(rows, count)) for count in counts]

    @torch.no_grad()
    def _replay(self, group: SlotGroup, captured: DecodeGraphs) -> list[list[float]]:
        """Return what `_run` returns for a decode step of the only group, from its graph."""
        return captured(len(group.running), group.longest).tolist()

    def _static_step(self, group: SlotGroup, rows: int, length: int) -> Tensor:
        """Run a decode step that can be captured: it uses only the group's tensors."""
        batch = group.decode_rows(rows, length)
        sampled_N2 = self._sample(self.forward(batch), batch)
        group.advance(batch.rows, sampled_N2[:, 0].long())
        return sampled_N2

    def _sample(self, hidden: Tensor, batch: DecodeBatch) -> Tensor:
        """Sample on the last stage: hidden states [T, H] -> float64 [N, 2].

        Each row is [next token, its log-probability].
        """
        assert self.sampler is not None
        group, rows = batch.group, batch.rows
        newest = hidden if batch.last is None else hidden[batch.last]
        positions = group.positions[rows] + 1
        eos_from = (
            group.prompt_lengths[rows] + self.params.min_new_tokens
            if self.params.min_new_tokens
            else None
        )
        with no_torch_function():
            tokens, logprobs = self.sampler(newest, group.ids[rows], positions, eos_from)
        return torch.stack([tokens.double(), logprobs.double()], dim=1)

    def _broadcast(self, sampled: list[Tensor], rows: int) -> Tensor:
        """Broadcast the last stage's samples, float64 [rows, 2], to every stage."""
        if self.mesh.pipeline_size == 1:
            return torch.cat(sampled)
        out = torch.empty(rows, 2, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.is_last_stage:
            torch.cat(sampled, out=out)
        group = self.mesh.pipeline_group
        dist.broadcast(
            out, src=dist.get_global_rank(group, self.mesh.pipeline_size - 1), group=group
        )
        return out
