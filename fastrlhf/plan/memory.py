"""Bytes of each phase on each kind of rank, counted on the run's own models.

The models, gradient buffers and optimizers of a rank are built by the code that trains them, on
fake tensors in a simulated world, and a micro-batch runs through them forward and backward. Only
four things are computed instead: what flash kernels store in place of the attention on a CPU, the
chunk of logits inside the ops of the LM head, the KV cache, and how many micro-batches a pipeline
stage holds at once (1F1B).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch

from fastrlhf import ops
from fastrlhf.config import Config
from fastrlhf.data.batches import PackedBatch
from fastrlhf.generation.memory import row_bytes
from fastrlhf.models import attention
from fastrlhf.models.gpt import DTYPES, GPT, build_model
from fastrlhf.ops.linear_chunks import GPU_ROWS
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.simulated import first_rank_of_stage, simulated_rank
from fastrlhf.plan.layout import Layout
from fastrlhf.plan.meter import StorageMeter, metered
from fastrlhf.plan.roles import Role
from fastrlhf.training.optimizer import Learner

Tensor = torch.Tensor


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch of a model in training or scoring, beyond its weights."""

    kept: int
    """Held between its forward and its backward pass."""
    peak: int
    """The most that is alive at once, one micro-batch in flight."""

    def in_flight(self, micro_batches: int) -> int:
        """Return the peak with `micro_batches` between their forward and backward passes."""
        return (micro_batches - 1) * self.kept + self.peak


@dataclass
class RankBytes:
    """What one kind of rank holds, in bytes by role name."""

    kind: str
    stage: int
    weights: dict[str, int] = field(default_factory=dict)
    """Of every model: parameters, and for trained ones gradients and optimizer state too."""
    training: dict[str, Activations] = field(default_factory=dict)
    """Of the trained models, one micro-batch."""
    scoring: dict[str, Activations] = field(default_factory=dict)
    """Of all models but the average, one micro-batch."""
    gradients: int = 0
    """Of the policy: fp32 gradients that this rank holds after they are reduced."""
    cache_row: int = 0
    """KV cache of one token of one sequence."""


def kinds(layout: Layout) -> list[tuple[str, int]]:
    """Return the kinds of ranks of a pipeline, with a stage of each."""
    stages = layout.pipeline
    if stages == 1:
        return [("first", 0)]
    middle = [("middle", stages // 2)] if stages > 2 else []
    return [("first", 0), *middle, ("last", stages - 1)]


def count_rank(
    config: Config, roles: Sequence[Role], layout: Layout, kind: str, stage: int, tokens: int
) -> RankBytes:
    """Count the bytes of a rank of `stage`, with micro-batches of `tokens` tokens.

    A count that was made before, with other slots or another place for waiting models, is reused.
    """
    key = (
        *((r.name, r.head, r.vocab_size, r.is_trained, r.model.model_dump_json()) for r in roles),
        (config.parallel.model_dump_json(), config.optimizer.model_dump_json()),
        (layout, stage, tokens),
    )
    if key not in _counted:
        _counted[key] = _count_rank(config, roles, layout, kind, stage, tokens)
    return _counted[key]


_counted: dict[object, RankBytes] = {}


def _count_rank(
    config: Config, roles: Sequence[Role], layout: Layout, kind: str, stage: int, tokens: int
) -> RankBytes:
    world_size = layout.tensor * layout.pipeline * layout.data
    rank = first_rank_of_stage(config.parallel, stage, world_size)
    found = RankBytes(kind, stage)
    with simulated_rank(config.parallel, rank, world_size) as mesh, _as_on_a_gpu():
        for role in roles:
            with metered() as meter:
                _count_role(config, role, mesh, meter, tokens, found)
    return found


def _count_role(
    config: Config, role: Role, mesh: Mesh, meter: StorageMeter, tokens: int, found: RankBytes
) -> None:
    model = build_model(role.model, mesh, role.vocab_size, head=role.head)
    if role.name == "policy":
        found.cache_row = row_bytes(model, length=1)
    if not role.is_trained:
        found.weights[role.name] = found.weights.get(role.name, 0) + meter.mark()
        if role.name != "average":
            found.scoring[role.name] = _count_pass(mesh, model, model, meter, tokens, train=False)
        return
    if role.name == "policy":
        shares = mesh.data_size if config.optimizer.distributed else 1
        found.gradients = 4 * sum(p.numel() for p in model.parameters()) // shares
    learner = Learner(mesh, model, config.optimizer, config.schedule, total_steps=1)
    found.weights[role.name] = meter.mark()
    found.training[role.name] = _count_pass(mesh, learner.ddp, model, meter, tokens, train=True)
    found.scoring[role.name] = _count_pass(mesh, model, model, meter, tokens, train=False)


def _count_pass(
    mesh: Mesh,
    stage: torch.nn.Module,
    model: GPT,
    meter: StorageMeter,
    tokens: int,
    *,
    train: bool,
) -> Activations:
    """Run a micro-batch of one sequence through `stage` and count what it holds."""
    batch = _fake_batch(tokens)
    dtype = DTYPES[model.model_config.dtype]
    base = meter.mark()
    if not mesh.is_first_stage:
        rows = tokens // mesh.tensor_size if mesh.sequence_parallel else tokens
        received = torch.empty(rows, 1, model.config.hidden_size, dtype=dtype)
        model.set_input_tensor([received.requires_grad_(train)])
    model.train(train)
    synchronized = stage.no_sync() if train else contextlib.nullcontext()  # type: ignore[operator]
    with torch.set_grad_enabled(train), synchronized:
        out = stage(batch)
        kept = meter.held - base
        chunk = 0
        if mesh.is_last_stage:
            out, chunk = _head(model, out, batch, train=train)
        if train:
            out.backward(torch.empty_like(out))
    model.zero_grad()
    return Activations(kept, max(meter.peak - base, kept + chunk))


def _head(model: GPT, hidden: Tensor, batch: PackedBatch, *, train: bool) -> tuple[Tensor, int]:
    """Return a loss or log-probs, and the bytes of the logits that the op holds at a time."""
    if model.head_kind == "scalar":
        return model.score(hidden), 0
    head = model.lm_head()
    rows = min(hidden.shape[0], GPU_ROWS)
    chunk = rows * head["weight"].shape[0] * head["weight"].element_size()
    if train:
        loss = ops.linear_cross_entropy(
            hidden, labels=batch.labels, mask=batch.loss_mask, denominator=1.0, **head
        )
        return loss, chunk
    return ops.linear_logprobs(hidden, labels=batch.labels, **head).logprobs, chunk


def _fake_batch(tokens: int) -> PackedBatch:
    """Return one sequence of `tokens` tokens; call it in a `metered` block."""
    integers = torch.empty(tokens, dtype=torch.int64)
    return PackedBatch(
        tokens=integers,
        positions=integers,
        cu_seqlens=torch.empty(2, dtype=torch.int32),
        labels=integers,
        loss_mask=torch.empty(tokens, dtype=torch.bool),
        max_seqlen=tokens,
        num_counted=tokens,
    )


class _FlashStorage(torch.autograd.Function):
    """Attention that computes nothing and stores what flash kernels store.

    Those are the inputs, the output and an fp32 statistic for each row.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        out, statistic = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, statistic)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def, override]
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Run the modules that a GPU runs: megatron's, with an attention that stores no scores."""

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        return _FlashStorage.apply(q, k, v)

    with (
        mock.patch.object(attention, "packed_attention", flash),
        mock.patch.object(GPT, "_use_eager_forward", property(lambda _: False)),
    ):
        yield
