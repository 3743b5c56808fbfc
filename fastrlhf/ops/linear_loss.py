"""Cross-entropy and the policy losses from hidden states and LM-head weight, in three GEMMs.

Everything that weights a token (mask, advantage, old log-prob) is known before the forward, so each
chunk of rows computes
    logits = h W^T;   dlogits in place of logits;   dh = dlogits W and dW += dlogits^T h
and nothing is recomputed or held for all rows. The backward only scales dh and dW.
Not supported: what linear.py does not support.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrlhf.ops import checks, ppo
from fastrlhf.ops.layouts import PPOMetric
from fastrlhf.ops.linear import check_num_counted, checked_head, fake_gradients
from fastrlhf.ops.linear_chunk_loss import (
    ChunkedLogits,
    CrossEntropy,
    LossOptions,
    LossTerms,
    PolicyTokens,
    add_metrics_,
    all_logprobs,
    policy_loss,
    write_gradient_,
)
from fastrlhf.ops.linear_chunks import (
    CountedRows,
    GradientSums,
    LinearHead,
    LinearTokens,
    as_matrix,
    chunk_rows,
    grad_scale,
    mul_to,
    saved_tensors_are_final,
)
from fastrlhf.ops.linear_refs import linear_cross_entropy_ref as linear_cross_entropy_ref
from fastrlhf.ops.linear_refs import linear_ppo_loss_ref as linear_ppo_loss_ref
from fastrlhf.ops.logprob import check_tokens
from fastrlhf.ops.logprob_kernels import TokenGrads, finish_statistics
from fastrlhf.ops.policy import PolicyArguments, PolicyForm, PPOOptions
from fastrlhf.ops.ppo import PPOLoss
from fastrlhf.ops.ppo_kernels import PLAIN
from fastrlhf.ops.registry import Context, Gradients, custom_op
from fastrlhf.ops.rows import VocabShard, flat, map_tensors, vocab_shard
from fastrlhf.ops.scalars import Number, as_tensor, is_zero, pack, unpack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NO_POLICY = PPOOptions(0.2, 0.2, 0.2, 1.0, 0.0)


class _Outputs(NamedTuple):
    loss: Tensor
    metrics: Tensor
    """[11], laid out as PPOMetric. GRAD_SCALE is the factor that the gradients still lack."""
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def _options(scalars: Tensor, form: PolicyForm, terms: LossTerms) -> LossOptions:
    temperature, softcap, smoothing, z_loss, *policy = unpack(scalars)
    cap = softcap if terms.capped else None
    return LossOptions(temperature, cap, smoothing, z_loss, PPOOptions(*policy), form, terms)


def _rows(
    matrix_NH: Tensor,
    mask_N: Tensor,
    tokens: LinearTokens,
    form: PolicyForm,
    width: int,
    shared: bool,
) -> tuple[CountedRows, bool]:
    """Return the rows, and whether log-probs need a pass of their own before the loss.

    The gradient of a ratio by sequence needs the log-probs of the complete sequence. Chunks are
    then of whole sequences, masked rows included; if one sequence does not fit a chunk, a first
    pass makes the log-probs (a fourth GEMM).
    """
    sequence = None
    first_pass = False
    if form.ratio == "sequence":
        fits = form.length <= chunk_rows(matrix_NH, len(matrix_NH), width, shared)
        sequence, first_pass = (form.length, False) if fits else (None, True)
    counted = tokens.num_counted
    return CountedRows(matrix_NH, mask_N, width, shared, counted, sequence), first_pass


def _scale_of(rows: CountedRows, policy: PolicyTokens, options: LossOptions) -> Tensor | None:
    """Return the power of two that half-precision gradients are computed divided by."""
    if policy.advantages is None:
        return grad_scale(rows)
    weights = policy.weights
    coefficients = (options.policy.entropy_coef, options.policy.kl_coef)
    if weights is None:
        return grad_scale(rows, policy.advantages, at_least=coefficients)
    of_token = [x * weights for x in (policy.advantages.float(), *coefficients)]
    return grad_scale(rows, *of_token)


@custom_op("linear_loss")
def _linear_loss(
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTokens,
    denominator: Tensor | None,
    scalars: Tensor,
    form: PolicyForm,
    terms: LossTerms,
    shard: VocabShard,
    chunk_width: int,
    backend: str,
    needs: list[bool],
) -> _Outputs:
    """Compute the loss and the gradients of the head that `needs` names.

    Half-precision gradients are those of the sum / grad_scale (see there); the others are those of
    the loss itself, so that the backward has nothing left to multiply.
    """
    mask, dtype = flat(tokens.mask), checks.compute_dtype(head.hidden)
    assert mask is not None
    options, policy = _options(scalars, form, terms), map_tensors(flat, policy)
    matrix = as_matrix(head.hidden)
    rows, first_pass = _rows(matrix, mask, tokens, form, chunk_width, shard.sharded)
    scale = _scale_of(rows, policy, options)
    count = mask.sum().clamp(min=1).to(dtype) if denominator is None else denominator.to(dtype)
    divisor = count if scale is None else scale
    metrics = torch.zeros(len(PPOMetric), dtype=dtype, device=head.hidden.device)
    gradients = GradientSums(rows, head.weight, needs)
    is_policy = policy.old_logprobs is not None
    d_logprobs_N = None
    plain = not (is_policy or terms.smoothed or terms.with_z or terms.capped)
    if plain and any(needs):
        d_logprobs_N = torch.where(mask, -1.0 / divisor, 0.0)
    labels_N = flat(tokens.labels).long()
    logits = ChunkedLogits(head, rows, labels_N, options, shard, backend, d_logprobs_N)
    entropy_loss = CrossEntropy(head, options, shard, dtype)
    known: TokenGrads | None = None
    if first_pass:
        logp, entropy = all_logprobs(logits, mask, dtype)
        sums, known = policy_loss(logp, entropy, mask, policy, options, backend)
        add_metrics_(metrics, sums)
    for chunk in logits.chunks() if known is None or any(needs) else ():
        stats = chunk.statistics()
        logp, entropy, lse = finish_statistics(stats, chunk.mask, options.temperature)
        if known is not None:
            grads = map_tensors(lambda g: rows.take(g, chunk.at), known)  # noqa: B023
        else:
            sums, grads = (
                policy_loss(
                    logp,
                    entropy,
                    torch.ones_like(logp, dtype=torch.bool) if chunk.mask is None else chunk.mask,
                    map_tensors(lambda t: rows.take(t, chunk.at), policy),  # noqa: B023
                    options,
                    backend,
                )
                if is_policy
                else entropy_loss.loss(chunk, logp, lse)
            )
            add_metrics_(metrics, sums)
        if any(needs) and not chunk.holds_gradient:
            write_gradient_(chunk, stats, entropy, grads, divisor, options, shard, backend)
        if any(needs):
            gradients.add(chunk.at, chunk.logits, chunk.hidden)
            entropy_loss.add_mean_gradient(chunk, gradients, divisor)
    entropy_loss.finish(gradients)
    ratio_max = metrics[PPOMetric.RATIO_MAX].clone()
    metrics /= count
    metrics[PPOMetric.RATIO_MAX] = ratio_max
    metrics[PPOMetric.GRAD_SCALE] = 1.0 if scale is None else scale / count
    d_hidden, d_weight, d_bias = gradients.reduce(shard.group_name)
    if needs[0]:
        d_hidden = d_hidden.view(head.hidden.shape)
    return _Outputs(metrics[PPOMetric.LOSS].clone(), metrics, d_hidden, d_weight, d_bias)


@_linear_loss.register_fake
def _(
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTokens,
    denominator: Tensor | None,
    scalars: Tensor,
    form: PolicyForm,
    terms: LossTerms,
    shard: VocabShard,
    chunk_width: int,
    backend: str,
    needs: list[bool],
) -> _Outputs:
    dtype = checks.compute_dtype(head.hidden)
    loss, metrics = (head.hidden.new_empty(s, dtype=dtype) for s in ((), (len(PPOMetric),)))
    return _Outputs(loss, metrics, *fake_gradients(head, needs, dtype))


class _Context(Context, Protocol):
    dtypes: list[torch.dtype]
    """Of hidden, weight and bias."""


def _setup(
    ctx: _Context,
    output: _Outputs,
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTokens,
    denominator: Tensor | None,
    scalars: Tensor,
    form: PolicyForm,
    terms: LossTerms,
    shard: VocabShard,
    chunk_width: int,
    backend: str,
    needs: list[bool],
) -> None:
    _loss, *saved = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = [(head.weight if t is None else t).dtype for t in head]
    ctx.save_for_backward(*saved)


def _linear_loss_grad(ctx: _Context, grad_loss: Tensor | None, *_: Tensor | None) -> Gradients:
    if grad_loss is None:
        return {}
    metrics, *computed = ctx.saved_tensors
    upstream, final = grad_loss * metrics[PPOMetric.GRAD_SCALE], saved_tensors_are_final()
    needs = _linear_loss.needs_grad(ctx, *LinearHead._fields)
    by_name = zip(LinearHead._fields, computed, ctx.dtypes, needs, strict=True)
    return {name: mul_to(g, upstream, dtype, final) for name, g, dtype, needed in by_name if needed}


_linear_loss.register_autograd(_linear_loss_grad, _setup)


def _run_loss(
    head: LinearHead,
    tokens: LinearTokens,
    policy: PolicyTokens,
    form: PolicyForm,
    options: PPOOptions,
    *,
    denominator: Number | None,
    temperature: Number,
    softcap: Number | None,
    vocab_start: int | None,
    vocab_size: int | None,
    group: ProcessGroup | None,
    backend: str,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
) -> tuple[Tensor, Tensor]:
    """Check the arguments that both losses share, and return (loss, metrics [11])."""
    lead, device, width = head.hidden.shape[:-1], head.hidden.device, head.weight.shape[0]
    check_tokens(lead, device, tokens.labels, None, None, backend)
    checks.like("mask", tokens.mask, lead, device, "bool")
    checks.denominator(denominator, device)
    checks.positive("temperature", temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    check_num_counted(tokens.num_counted, tokens.mask)
    shard = vocab_shard(width, vocab_start, vocab_size, group)
    # All ranks must cut the same chunks; only the true size gives the others' widths.
    chunk_width = width if group is None else -(-(vocab_size or 0) // group.size())
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in head]
    divide_by = as_tensor(denominator, head.hidden)
    cap = 1.0 if softcap is None else softcap
    scalars = pack(head.hidden, temperature, cap, label_smoothing, z_loss, *options)
    with_entropy, smoothed = not is_zero(options.entropy_coef), not is_zero(label_smoothing)
    terms = LossTerms(softcap is not None, with_entropy, smoothed, not is_zero(z_loss))
    arguments = (divide_by, scalars, form, terms, shard, chunk_width, backend, needs)
    loss, metrics, _, _, _ = _linear_loss(head, tokens, policy, *arguments)
    return loss, metrics


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    denominator: Number | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    num_counted: int | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross-entropy of (hidden @ weight.T + bias) / T at the True positions, 0-dim fp32.

    -sum of log softmax(...)[label] / denominator. The denominator (a number or a 0-dim tensor)
    defaults to the number of True positions. Shapes, dtypes, `softcap`, `num_counted` and `group`
    as in `linear_logprobs`. Three GEMMs in the forward, none in the backward; the logits of all
    rows are never held at once. dW [V, H] is held in fp32 until the backward.

    Args:
        label_smoothing: e in (1 - e) CE + e (lse - mean of the logits / T): the share of the target
            that is uniform over the vocabulary, as in `F.cross_entropy`. Not supported together
            with a softcap, since it takes the mean from the weight's mean row.
        z_loss: Adds z_loss * lse^2 (PaLM, arXiv 2204.02311, section 5).
    """
    checks.scalar("label_smoothing", label_smoothing, 0.0, 1.0, "a number from 0 to 1")
    checks.not_negative("z_loss", z_loss)
    together = softcap is None or is_zero(label_smoothing)
    checks.require(together, "label_smoothing", label_smoothing, "0 together with a softcap")
    loss, _ = _run_loss(
        checked_head(hidden, weight, bias),
        LinearTokens(labels, mask, num_counted),
        PolicyTokens(None, None),
        PLAIN,
        NO_POLICY,
        denominator=denominator,
        temperature=temperature,
        softcap=softcap,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        backend=backend,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return loss


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: Number | tuple[Number, Number] = 0.2,
    dual_clip: Number | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: Number = 0.0,
    kl_estimator: str = "k3",
    weights: Tensor | None = None,
    objective: str = "clip",
    ratio: str = "token",
    entropy_coef: Number = 0.0,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    bias: Tensor | None = None,
    denominator: Number | None = None,
    num_counted: int | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """Return `ppo_loss` of the log-probs and entropy of (hidden @ weight.T + bias) / T.

    The logits are not held. old_logprobs, advantages, ref_logprobs and weights [...] are constants;
    the value fields of the result are 0. The policy options are those of `ppo_loss`, the rest as in
    `linear_cross_entropy`: three GEMMs, the gradient computed in the forward. With ratio="sequence"
    chunks hold whole sequences (the last dimension), masked rows included; a sequence longer than a
    chunk takes a fourth GEMM, for a first pass over its log-probs.
    """
    checks.floating("hidden", hidden)
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        checks.like(name, tensor, hidden.shape[:-1], hidden.device)
    given = PolicyArguments(
        clip, dual_clip, ref_logprobs, kl_coef, kl_estimator, weights, objective, ratio
    )
    form, options = given.checked(hidden.shape[:-1], hidden.device)
    loss, metrics = _run_loss(
        checked_head(hidden, weight, bias),
        LinearTokens(labels, mask, num_counted),
        PolicyTokens(old_logprobs, advantages, ref_logprobs, weights),
        form,
        options._replace(entropy_coef=entropy_coef),
        denominator=denominator,
        temperature=temperature,
        softcap=softcap,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        backend=backend,
    )
    return ppo.result_from(loss, metrics)
