"""The LM head fused with the log-probs of its tokens: hidden states and weight in, `TokenLogprobs` out.

Rows go through in chunks, so logits [..., V] need never be held whole. The upstream gradient is unknown in the forward:
four GEMMs, or three when the logits are kept for the backward. The losses that know theirs are in linear_loss.py.
Left out on purpose: hidden states sharded over the sequence (gather them first), weights of another dtype than hidden
(but under torch.autocast, which casts both).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrlhf.ops import checks, collectives
from fastrlhf.ops.linear_chunks import (
    CountedRows,
    Gradients,
    as_matrix,
    divided,
    head,
    logits_fit,
    reused,
    scaled,
    unit_of,
)
from fastrlhf.ops.logprob import (
    BACKWARD,
    STATISTICS,
    TokenLogprobs,
    check_tokens,
    combine_statistics,
    given,
    logprobs_ref,
    outputs_from,
)
from fastrlhf.ops.registry import custom_op, register_autograd, register_fake
from fastrlhf.ops.rows import flat, local_columns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logits_ref(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain torch: the whole [..., V] logits."""
    return torch.nn.functional.linear(hidden, weight, bias)


def linear_logprobs_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any
) -> TokenLogprobs:
    return logprobs_ref(linear_logits_ref(hidden, weight, bias), labels, **options)


def _kept_rows(labels: Tensor, num_counted: int | None) -> int:
    return labels.numel() if num_counted is None else min(num_counted, labels.numel())


# --- log-probs -------------------------------------------------------------------------------------------------------


@custom_op(
    "linear_logprobs",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, Tensor? ref_logprobs,"
    " float temperature, bool with_entropy, bool keep_logits, int? num_counted, int vocab_start, int columns,"
    " str group_name, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor | None,
    ref_logprobs: Tensor | None, temperature: float, with_entropy: bool, keep_logits: bool, num_counted: int | None,
    vocab_start: int, columns: int, group_name: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    labels_N, keep = flat(labels).long(), flat(mask)
    dtype, tokens, width = checks.compute_dtype(hidden), labels.numel(), weight.shape[0]
    rows = CountedRows(as_matrix(hidden), keep, width, num_counted=num_counted)
    # ones where rows are left out: finite, and replaced by zeros in outputs_from
    stats = torch.ones(4, tokens, dtype=dtype, device=hidden.device)
    kept = hidden.new_empty(
        (_kept_rows(labels, num_counted), width) if keep_logits else 0
    )  # those that count come first
    buffer = reused(hidden, 0 if keep_logits else rows.step, width)
    for at in rows:
        logits = head(
            rows.chunk(at),
            weight,
            bias,
            out=kept[at] if keep_logits else buffer[: at.stop - at.start],
        )
        body = STATISTICS.on(logits, backend, sharded=bool(group_name))
        chunk_mask = rows.take(rows.mask, at)
        rows.put(
            stats,
            at,
            body(
                logits[None], rows.take(labels_N, at), chunk_mask, temperature, vocab_start, columns
            ),
        )
    if group_name:
        stats = combine_statistics(collectives.gather_stack(stats, group_name), temperature)
    ref = None if ref_logprobs is None else flat(ref_logprobs).to(dtype)
    results = outputs_from(stats, keep, ref, temperature, with_entropy)
    return *(t.view(labels.shape) if t.numel() == tokens else t for t in results), kept


@register_fake(_linear_logprobs)
def _(
    hidden,
    weight,
    bias,
    labels,
    mask,
    ref_logprobs,
    temperature,
    with_entropy,
    keep_logits,
    num_counted,
    *_,
):  # type: ignore[no-untyped-def]
    def per_token(asked: bool = True) -> Tensor:
        return hidden.new_empty(labels.shape if asked else 0, dtype=checks.compute_dtype(hidden))

    kept = hidden.new_empty(
        (_kept_rows(labels, num_counted), weight.shape[0]) if keep_logits else 0
    )
    entropy, kl = per_token(with_entropy), per_token(ref_logprobs is not None)
    return per_token(), entropy, per_token(), kl, per_token(), per_token(), kept


@custom_op(
    "linear_logprobs_backward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, Tensor row_max, Tensor row_sum,"
    " Tensor? entropy, Tensor kept_logits, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp,"
    " float temperature, int? num_counted, int vocab_start, int columns, str group_name, str backend, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
)
def _linear_logprobs_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, mask: Tensor | None, row_max: Tensor,
    row_sum: Tensor, entropy: Tensor | None, kept_logits: Tensor, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, grad_logsumexp: Tensor | None, temperature: float, num_counted: int | None,
    vocab_start: int, columns: int, group_name: str, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    labels_N, width = flat(labels).long(), weight.shape[0]
    rows = CountedRows(as_matrix(hidden), flat(mask), width, num_counted=num_counted)
    upstream = [flat(t) for t in (grad_logprobs, grad_entropy, grad_logsumexp)]
    unit = unit_of(rows, *upstream)
    per_token = [
        *(flat(t) for t in (row_max, row_sum, entropy)),
        *(divided(g, unit) for g in upstream),
    ]
    gradients = Gradients(rows, weight, needs)
    buffer = reused(hidden, rows.step, width)
    for at in rows:
        chunk, out = rows.chunk(at), buffer[: at.stop - at.start]
        # kept logits survive, for a second backward; recomputed ones are overwritten
        logits = kept_logits[at] if kept_logits.numel() else head(chunk, weight, bias, out=out)
        rest = [rows.take(t, at) for t in (rows.mask, *per_token)]
        body = BACKWARD.on(logits, backend)
        body(
            logits[None],
            rows.take(labels_N, at),
            *rest,
            temperature,
            vocab_start,
            columns,
            out[None],
        )
        gradients.add(at, out, chunk, weight)
    d_hidden, d_weight, d_bias = gradients.reduced(group_name)
    d_hidden = scaled(d_hidden.view(hidden.shape) if needs[0] else d_hidden, unit, hidden.dtype)
    return d_hidden, scaled(d_weight, unit, weight.dtype), scaled(d_bias, unit, weight.dtype)


@register_fake(_linear_logprobs_backward)
def _(hidden, weight, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, mask, _ref, temperature, with_entropy, _keep, *ctx.options = (
        inputs
    )
    ctx.temperature = temperature
    _logp, entropy, _lse, _kl, row_max, row_sum, kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden,
        weight,
        bias,
        labels,
        mask,
        row_max,
        row_sum,
        entropy if with_entropy else None,
        kept,
    )


def _linear_logprobs_grad(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_logp, grad_entropy, grad_lse, grad_kl = given(grads[:4])
    *saved, entropy, kept = ctx.saved_tensors
    mask = saved[4]
    grad_ref = None
    if grad_kl is not None:
        grad_logp = grad_kl if grad_logp is None else grad_logp + grad_kl
        if ctx.needs_input_grad[5]:
            grad_ref = -grad_kl if mask is None else torch.where(mask, -grad_kl, 0.0)
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs):
        return *(None,) * 5, grad_ref, *(None,) * 8
    entropy = entropy if grad_entropy is not None else None
    gradients = _linear_logprobs_backward(
        *saved,
        entropy,
        kept,
        grad_logp,
        grad_entropy,
        grad_lse,
        ctx.temperature,
        *ctx.options,
        needs,
    )
    return (
        *(g if n else None for g, n in zip(gradients, needs, strict=True)),
        None,
        None,
        grad_ref,
        *(None,) * 8,
    )


register_autograd(_linear_logprobs, _linear_logprobs_grad, _setup)


def linear_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as F.linear would take them: checked, and under torch.autocast in its dtype (float64 stays)."""
    checks.floating("hidden", hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = _cast(hidden, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    checks.require(hidden.dim() >= 1, "hidden", hidden, "shape [..., H]")
    fits = isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[-1] == hidden.shape[-1]
    same = (
        fits
        and weight.dtype == hidden.dtype
        and weight.device == hidden.device
        and weight.shape[0] > 0
    )
    expected = (
        f"[V, {hidden.shape[-1]}] with V above 0, of hidden's dtype and device ({hidden.dtype})"
    )
    checks.require(same, "weight", weight, expected)
    if bias is not None:
        fits = (
            isinstance(bias, Tensor)
            and bias.shape == weight.shape[:1]
            and bias.dtype == hidden.dtype
        )
        checks.require(
            fits and bias.device == hidden.device,
            "bias",
            bias,
            f"[{weight.shape[0]}] of hidden's dtype",
        )
    return hidden, weight, bias


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Differentiable; what autocast leaves alone, and what is no tensor, is left to the checks."""
    return (
        x.to(dtype)
        if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        else x
    )


def check_counted(num_counted: int | None, mask: Tensor | None) -> None:
    if num_counted is not None:
        checks.require(mask is not None, "num_counted", num_counted, "None where there is no mask")
        checks.require(
            num_counted >= 0,
            "num_counted",
            num_counted,
            "the number of the mask's True positions, or a larger one",
        )


def linear_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, recompute: bool | str = "auto",
    temperature: float = 1.0, mask: Tensor | None = None, with_entropy: bool = False,
    ref_logprobs: Tensor | None = None, num_counted: int | None = None, vocab_start: int | None = None,
    vocab_size: int | None = None, group: ProcessGroup | None = None, backend: str = "auto",
) -> TokenLogprobs:  # fmt: skip
    """`logprobs(hidden @ weight.T + bias, labels, ...)` without holding the logits.

    hidden [..., H] and weight [V, H], bias [V], of one dtype (torch.autocast casts them); labels [...]; the rest as in
    `logprobs`. recompute=True makes each chunk's logits again in the backward (4 GEMMs, never [..., V]); False keeps
    them in hidden's dtype (3 GEMMs); "auto" keeps them when they fit a quarter of a GPU's free memory, 1 GiB on a CPU,
    or FASTRLHF_LINEAR_BUDGET_MB, which also bounds a chunk's logits. Rows masked out cost nothing on a CPU, nor on a
    GPU when `num_counted` says how many are not (an int, that many or more; a GPU's mask cannot be counted without
    waiting for it). Gradients for hidden, weight (accumulated in fp32) and bias. With `group`,
    weight and bias are this rank's
    rows, hidden is the same on every rank, its gradient is the full one (summed over the group here), and the weight's
    is local.
    """
    hidden, weight, bias = linear_inputs(hidden, weight, bias)
    check_tokens(hidden.shape[:-1], hidden.device, labels, mask, ref_logprobs, temperature, backend)
    check_counted(num_counted, mask)
    checks.choice("recompute", recompute, ("auto", True, False))
    start, columns = local_columns(weight.shape[0], vocab_start, vocab_size, group)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    if keep:
        fits = recompute == "auto" and logits_fit(
            hidden, _kept_rows(labels, num_counted), weight.shape[0]
        )
        keep = fits or recompute is False
    logp, entropy, lse, kl, _, _, _ = _linear_logprobs(
        hidden, weight, bias, labels, mask, ref_logprobs, float(temperature), with_entropy, keep, num_counted, start,
        columns, collectives.name_of(group), backend,
    )  # fmt: skip
    return TokenLogprobs(
        logp, entropy if with_entropy else None, lse, None if ref_logprobs is None else kl
    )
