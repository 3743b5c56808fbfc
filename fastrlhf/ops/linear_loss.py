"""Cross-entropy and the PPO policy loss from hidden states and LM-head weight, in three GEMMs.

Everything that weighs a token (mask, advantage, old log-prob) is known before the forward, so each chunk of rows is
    logits = h W^T;   dlogits in place of logits;   dh = dlogits W and dW += dlogits^T h
and nothing is recomputed or held whole; the backward only scales dh and dW.
Left out on purpose: what linear.py leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives, ppo
from fastrlhf.ops.linear import check_counted, linear_inputs, linear_logprobs_ref
from fastrlhf.ops.linear_chunks import (
    CountedRows,
    Gradients,
    as_matrix,
    divided,
    head,
    one_behind,
    reused,
    saved_are_spare,
    scaled,
    unit_of,
)
from fastrlhf.ops.logprob import (
    BACKWARD,
    STATISTICS,
    check_tokens,
    combine_statistics,
    finish_statistics,
)
from fastrlhf.ops.ppo import PPOLoss
from fastrlhf.ops.registry import custom_op, register_autograd, register_fake
from fastrlhf.ops.rows import flat, local_columns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, *, bias: Tensor | None = None,
    denominator: float | Tensor | None = None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    tokens = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, mask=mask, temperature=temperature
    )
    return -tokens.logprobs.sum() / (
        mask.sum().clamp(min=1) if denominator is None else denominator
    )


def linear_ppo_loss_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip: float = 0.2, entropy_coef: float = 0.0, temperature: float = 1.0, bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PPOLoss:  # fmt: skip
    tokens = linear_logprobs_ref(
        hidden, weight, labels, bias=bias, mask=mask, temperature=temperature
    )
    return ppo.ppo_loss_ref(
        tokens.logprobs, old_logprobs, advantages, mask, clip=clip, entropy=tokens.entropy, entropy_coef=entropy_coef,
        denominator=denominator,
    )  # fmt: skip


class _Chunk(NamedTuple):
    at: slice
    hidden: Tensor
    labels: Tensor
    mask: Tensor | None
    logits: Tensor
    statistics: Callable[[], Tensor]
    """Those of the whole vocabulary: waits for the other shards'."""
    formed: bool
    """whether `logits` holds their gradient already"""


def _chunks(
    rows: CountedRows, weight: Tensor, bias: Tensor | None, labels_N: Tensor, where: tuple[float, int, int],
    group_name: str, backend: str, d_logp: Tensor | None,
) -> Iterator[_Chunk]:  # fmt: skip
    """Each chunk's logits and statistics. Sharded, the statistics travel while the next chunk's GEMM runs.

    `where`: temperature, vocab_start, columns. `d_logp` [N]: the upstream gradient, when it needs no statistics; a
    backend that can then forms the gradient in the same read of the logits.
    """
    made = _chunk_logits(rows, weight, bias, labels_N, where, group_name, backend, d_logp)
    return one_behind(made) if group_name else made


def _chunk_logits(
    rows: CountedRows, weight: Tensor, bias: Tensor | None, labels_N: Tensor, where: tuple[float, int, int],
    group_name: str, backend: str, d_logp: Tensor | None,
) -> Iterator[_Chunk]:  # fmt: skip
    alive = 2 if group_name else 1  # chunks whose logits are held at a time
    width = weight.shape[0]
    buffers = reused(rows.hidden, alive * rows.step, width).view(alive, rows.step, width)
    chosen = STATISTICS.choose(buffers, backend, sharded=bool(group_name))
    for i, at in enumerate(rows):
        chunk, labels, mask = rows.chunk(at), rows.take(labels_N, at), rows.take(rows.mask, at)
        logits = head(chunk, weight, bias, out=buffers[i % alive, : at.stop - at.start])
        formed = chosen == "cuda" and d_logp is not None
        if formed:
            both = torch.ops.fastrlhf_cuda.logprob_forward_backward
            stats = both(
                logits[None], labels, mask, rows.take(d_logp, at), None, None, *where, logits[None]
            )
        else:
            stats = STATISTICS.on(logits, chosen)(logits[None], labels, mask, *where)
        yield _Chunk(at, chunk, labels, mask, logits, _whole(stats, where[0], group_name), formed)


def _whole(stats: Tensor, temperature: float, group_name: str) -> Callable[[], Tensor]:
    if not group_name:
        return lambda: stats
    gathered = collectives.gather_stack_later(stats, group_name)
    return lambda: combine_statistics(gathered(), temperature)


def _chunk_loss(
    logp: Tensor, entropy: Tensor, mask: Tensor | None, old_logprobs: Tensor | None, advantages: Tensor | None,
    clip: float, entropy_coef: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(sums laid out as ppo_loss's metrics [10], d / d logprobs, d / d entropy), all of the chunk's sum."""
    counted = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    if old_logprobs is None or advantages is None:
        sums = torch.zeros(10, dtype=logp.dtype, device=logp.device)
        sums[0] = -logp.sum()
        return sums, -counted.to(logp.dtype), None
    one = torch.ones((), dtype=logp.dtype, device=logp.device)
    body = ppo.KERNEL.on(
        logp, "auto" if backend == "cuda" else backend
    )  # which has kernels for the logits alone
    options = (clip, clip, 1.0, entropy_coef)
    sums, d_logp, _ = body(
        logp, old_logprobs, advantages, counted, None, None, None, entropy, one, *options
    )
    return sums, d_logp, -entropy_coef * counted.to(logp.dtype) if entropy_coef else None


@custom_op(
    "linear_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor mask, Tensor? old_logprobs,"
    " Tensor? advantages, Tensor? denominator, float clip, float entropy_coef, float temperature, int? num_counted,"
    " int vocab_start, int columns, int chunk_width, str group_name, str backend, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor, old_logprobs: Tensor | None,
    advantages: Tensor | None, denominator: Tensor | None, clip: float, entropy_coef: float, temperature: float,
    num_counted: int | None, vocab_start: int, columns: int, chunk_width: int, group_name: str, backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, metrics [10], dh, dW, db): metrics as ppo_loss's, but for the last: what the gradients are still to be
    multiplied by, beside the upstream.

    Half-precision ones are of the sum / unit (see `unit_of`); the others of the loss, so that nothing is left to do.
    """
    keep, old, adv, dtype = (
        flat(mask),
        flat(old_logprobs),
        flat(advantages),
        checks.compute_dtype(hidden),
    )
    rows = CountedRows(as_matrix(hidden), keep, chunk_width, bool(group_name), num_counted)
    unit = unit_of(rows, adv, at_least=entropy_coef)
    count = keep.sum().clamp(min=1).to(dtype) if denominator is None else denominator.to(dtype)
    metrics = torch.zeros(10, dtype=dtype, device=hidden.device)
    gradients = Gradients(rows, weight, needs)
    where = (temperature, vocab_start, columns)
    known = -1.0 / (count if unit is None else unit) if old is None and any(needs) else None
    d_logp_N = None if known is None else torch.where(keep, known, 0.0)
    for chunk in _chunks(
        rows, weight, bias, flat(labels).long(), where, group_name, backend, d_logp_N
    ):
        stats = chunk.statistics()
        logp, entropy, _ = finish_statistics(stats, chunk.mask, temperature)
        constants = (rows.take(old, chunk.at), rows.take(adv, chunk.at))
        terms = _chunk_loss(logp, entropy, chunk.mask, *constants, clip, entropy_coef, backend)
        sums, *upstream = terms
        ratio_max = torch.maximum(metrics[8], sums[8])
        metrics += sums
        metrics[8] = ratio_max
        if any(needs) and not chunk.formed:
            d_logp, d_entropy = (divided(t, count if unit is None else unit) for t in upstream)
            saved = (
                chunk.mask,
                stats[0],
                stats[1],
                None if d_entropy is None else entropy,
                d_logp,
                d_entropy,
                None,
            )
            body = BACKWARD.on(chunk.logits, backend)
            body(chunk.logits[None], chunk.labels, *saved, *where, chunk.logits[None])
        if any(needs):
            gradients.add(chunk.at, chunk.logits, chunk.hidden, weight)
    metrics[:8] /= count
    metrics[9] = 1.0 if unit is None else unit / count
    d_hidden, d_weight, d_bias = gradients.reduced(group_name)
    return (
        metrics[0].clone(),
        metrics,
        d_hidden.view(hidden.shape) if needs[0] else d_hidden,
        d_weight,
        d_bias,
    )


@register_fake(_linear_loss)
def _(hidden, weight, *rest):  # type: ignore[no-untyped-def]
    dtype, needs = checks.compute_dtype(hidden), rest[-1]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(10, dtype=dtype),
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=dtype),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[1:])


def _loss_grad(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 18
    metrics, *gradients = ctx.saved_tensors
    upstream, spare = grad_loss * metrics[9], saved_are_spare()
    needed = zip(gradients, ctx.needs_input_grad[:3], ctx.dtypes, strict=True)
    return *(scaled(g, upstream, dtype, spare) if needs else None for g, needs, dtype in needed), *(
        None,
    ) * 15


register_autograd(_linear_loss, _loss_grad, _loss_setup)


def _run_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor, old_logprobs: Tensor | None,
    advantages: Tensor | None, denominator: float | Tensor | None, clip: float, entropy_coef: float,
    temperature: float, num_counted: int | None, vocab_start: int | None, vocab_size: int | None,
    group: ProcessGroup | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden, weight, bias = linear_inputs(hidden, weight, bias)
    check_tokens(hidden.shape[:-1], hidden.device, labels, None, None, temperature, backend)
    checks.like("mask", mask, hidden.shape[:-1], hidden.device, "bool")
    checks.denominator(denominator, hidden.device)
    check_counted(num_counted, mask)
    start, columns = local_columns(weight.shape[0], vocab_start, vocab_size, group)
    # Sharded, all ranks must cut the same chunks, and only the true size tells a rank how wide the others are.
    chunk_width = weight.shape[0] if group is None else -(-(vocab_size or 0) // group.size())
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, metrics, _, _, _ = _linear_loss(
        hidden, weight, bias, labels, mask, old_logprobs, advantages, ppo.as_denominator(denominator, hidden),
        float(clip), float(entropy_coef), float(temperature), num_counted, start, columns, chunk_width,
        collectives.name_of(group), backend, needs,
    )  # fmt: skip
    return loss, metrics


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, *, bias: Tensor | None = None,
    denominator: float | Tensor | None = None, temperature: float = 1.0, num_counted: int | None = None,
    vocab_start: int | None = None, vocab_size: int | None = None, group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """-sum over True positions of log softmax((hidden @ weight.T + bias) / T)[label], / denominator; 0-dim fp32.

    The denominator (a float or a 0-dim tensor) defaults to the number of True positions. Shapes, dtypes,
    `num_counted` and `group` as in `linear_logprobs`. Three GEMMs in the forward, none in the
    backward; logits are never held whole. dW
    waits for the backward in fp32: [V, H] of it.
    """
    loss, _ = _run_loss(
        hidden, weight, bias, labels, mask, None, None, denominator, 0.2, 0.0, temperature, num_counted, vocab_start,
        vocab_size, group, backend,
    )  # fmt: skip
    return loss


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip: float = 0.2, entropy_coef: float = 0.0, temperature: float = 1.0, bias: Tensor | None = None,
    denominator: float | Tensor | None = None, num_counted: int | None = None, vocab_start: int | None = None,
    vocab_size: int | None = None, group: ProcessGroup | None = None, backend: str = "auto",
) -> PPOLoss:  # fmt: skip
    """`ppo_loss` of the log-probs and entropy of (hidden @ weight.T + bias) / T, without holding the logits.

    old_logprobs, advantages [...] are constants; value fields of the result are 0. The rest as `linear_cross_entropy`:
    three GEMMs, the gradient formed in the forward.
    """
    checks.floating("hidden", hidden)
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        checks.like(name, tensor, hidden.shape[:-1], hidden.device)
    checks.positive("clip", clip)
    loss, metrics = _run_loss(
        hidden, weight, bias, labels, mask, old_logprobs, advantages, denominator, clip, entropy_coef, temperature,
        num_counted, vocab_start, vocab_size, group, backend,
    )  # fmt: skip
    return PPOLoss(loss, *metrics.detach()[1:9].unbind())
