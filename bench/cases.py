"""Ops under test: inputs of a shape, lower bounds on bytes and operations, float64 references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrlhf.ops.advantage import _gae_torch
from fastrlhf.ops.kl import logits_kl_ref
from fastrlhf.ops.linear import linear_logprobs_ref
from fastrlhf.ops.linear_loss import linear_cross_entropy_ref, linear_ppo_loss_ref
from fastrlhf.ops.logprob import logprobs_ref
from fastrlhf.ops.ppo import ppo_loss_ref
from fastrlhf.ops.ranking import pairwise_ranking_loss_ref

Shape = tuple[int, ...]
Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

MODES = ("fwd", "bwd", "fwd+bwd")
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Op:
    name: str
    dims: str
    """what the numbers of a shape are, such as "N x V"; the first one counts rows"""
    make: Callable[[Shape, torch.dtype, torch.device], Inputs]
    reference: Callable[[Inputs], Outputs]
    """plain torch on float64 inputs"""
    leaves: tuple[str, ...]
    """inputs that get a gradient; none: forward only"""
    outputs: tuple[str, ...]
    moved: dict[str, Callable[[Shape, int], int]]
    """bytes read and written at least, by mode, from the shape and the element size; its keys are
    the op's modes"""
    flops: dict[str, Callable[[Shape], int]] = field(default_factory=dict)
    """operations of the matrix products, by mode"""
    shapes: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)
    """defaults for "cpu", "cuda" and "quick" """
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)

    def least(self, mode: str, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
        """Return the bytes and operations that one call in `mode` cannot do without."""
        flops = self.flops.get(mode)
        return self.moved[mode](shape, dtype.itemsize), flops(shape) if flops else 0

    def check_shape(self, shape: Shape) -> Shape:
        """Return a small shape whose rows have the alignment of the timed ones.

        What is correct at this shape is then correct for the code path that is timed.
        """
        if self.dims.endswith("x V"):
            vocab = min(shape[-1], 1024 + shape[-1] % 128)
            hidden = tuple(min(h, 64) for h in shape[1:-1])
            return (min(shape[0], 64), *hidden, vocab)
        return tuple(min(n, 40) for n in shape)


# --- inputs -------------------------------------------------------------------------------------


def _logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random logits with a standard deviation of 2.

    Filled one block at a time, so that no fp32 copy of [N, V] exists next to them.
    """
    out = torch.empty(rows, vocab, dtype=dtype, device=device)
    for block in out.split(CHUNK_ROWS):
        block.copy_(2 * torch.randn(block.shape, device=device))
    return out


def _labels(rows: int, vocab: int, device: torch.device) -> Tensor:
    return torch.randint(vocab, (rows,), device=device)


def make_logprobs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, vocab = shape
    return {"logits": _logits(rows, vocab, dtype, device), "labels": _labels(rows, vocab, device)}


def make_logits_kl(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, vocab = shape
    return {
        "logits": _logits(rows, vocab, dtype, device),
        "ref_logits": _logits(rows, vocab, dtype, device),
    }


def make_linear(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rows, width, vocab = shape
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    for block in weight.split(1 << 14):
        block.copy_(2 * width**-0.5 * torch.randn(block.shape, device=device))
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    return {
        "hidden": hidden,
        "weight": weight,
        "labels": _labels(rows, vocab, device),
        "mask": mask,
    }


def make_linear_ppo(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return inputs whose old log-probs are near the new ones.

    As after a few inner epochs of PPO, ratios lie on both sides of the clip range.
    """
    x = make_linear(shape, dtype, device)
    old = []
    for hidden, labels in zip(
        x["hidden"].split(CHUNK_ROWS), x["labels"].split(CHUNK_ROWS), strict=True
    ):
        logits = (hidden @ x["weight"].T).float()
        old.append(torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0])
    x["old_logprobs"] = torch.cat(old) + 0.2 * torch.randn(shape[0], device=device)
    x["advantages"] = torch.randn(shape[0], device=device)
    return x


def _prefix_mask(rows: int, length: int, device: torch.device) -> Tensor:
    """Return a mask of responses of random lengths, padded on the right, as in rollouts."""
    lengths = torch.randint(length // 2, length + 1, (rows, 1), device=device)
    return torch.arange(length, device=device) < lengths


def make_ppo(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    def noise(scale: float) -> Tensor:
        return scale * torch.randn(shape, device=device).to(dtype)

    x = {
        "logprobs": noise(1.0) - 2,
        "values": noise(1.0),
        "advantages": noise(1.0),
        "returns": noise(1.0),
    }
    x["old_logprobs"] = x["logprobs"] + noise(0.2)
    x["old_values"] = x["values"] + noise(0.2)
    return {**x, "mask": _prefix_mask(shape[0], shape[1], device)}


def make_gae(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rewards, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return {"rewards": rewards, "values": values, "mask": _prefix_mask(shape[0], shape[1], device)}


def make_ranking(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return rankings of K responses per prompt, with ties."""
    prompts, responses = shape
    scores = torch.randn(prompts * responses, device=device).to(dtype)
    ranks = torch.randint(responses, (prompts * responses,), device=device)
    return {
        "scores": scores,
        "ranks": ranks,
        "offsets": responses * torch.arange(prompts + 1, device=device),
    }


# --- float64 references -------------------------------------------------------------------------


def _ref_logprobs(x: Inputs) -> Outputs:
    return (logprobs_ref(x["logits"], x["labels"]).logprobs,)


def _ref_logprobs_entropy(x: Inputs) -> Outputs:
    tokens = logprobs_ref(x["logits"], x["labels"])
    assert tokens.entropy is not None
    return tokens.logprobs, tokens.entropy


def _ref_linear_logprobs(x: Inputs) -> Outputs:
    tokens = linear_logprobs_ref(x["hidden"], x["weight"], x["labels"])
    assert tokens.entropy is not None
    return tokens.logprobs, tokens.entropy


def _ref_linear_cross_entropy(x: Inputs) -> Outputs:
    return (linear_cross_entropy_ref(x["hidden"], x["weight"], x["labels"], x["mask"]),)


def _ref_linear_ppo(x: Inputs) -> Outputs:
    names = ("hidden", "weight", "labels", "old_logprobs", "advantages", "mask")
    return (linear_ppo_loss_ref(*(x[n] for n in names)).loss,)


def _ref_ppo(x: Inputs) -> Outputs:
    values = {n: x[n] for n in ("values", "old_values", "returns")}
    return (
        ppo_loss_ref(x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"], **values).loss,
    )


def _ref_gae(x: Inputs) -> Outputs:
    return _gae_torch(x["rewards"], x["values"], x["mask"], 1.0, 0.95)


def _ref_ranking(x: Inputs) -> Outputs:
    return (pairwise_ranking_loss_ref(x["scores"], x["ranks"], x["offsets"]).loss,)


# --- the table of ops ---------------------------------------------------------------------------


def _reads(forward: int, backward: int) -> dict[str, Callable[[Shape, int], int]]:
    """Return the bytes of the given number of passes over [N, V], reading or writing."""

    def passes(count: int) -> Callable[[Shape, int], int]:
        return lambda shape, size: count * shape[0] * shape[1] * size

    return {"fwd": passes(forward), "bwd": passes(backward), "fwd+bwd": passes(forward + backward)}


def _linear_moved(forward_only: bool) -> Callable[[Shape, int], int]:
    """Return the bytes of reading h and W once and writing their gradients once."""
    return lambda s, size: (1 if forward_only else 2) * size * s[1] * (s[0] + s[2])


def _gemms(count: int) -> Callable[[Shape], int]:
    return lambda s: 2 * count * s[0] * s[1] * s[2]


def _per_token(size: int, modes: tuple[str, ...]) -> dict[str, Callable[[Shape, int], int]]:
    return dict.fromkeys(modes, lambda shape, _: size * shape[0] * shape[1])


F32, BF16 = torch.float32, torch.bfloat16
_HALF = {"cpu": (F32, BF16), "cuda": (BF16,), "quick": (F32,)}
_FULL = {"cpu": (F32,), "cuda": (F32,), "quick": (F32,)}
_LOGITS = {"cpu": ((256, 50257),), "cuda": ((8192, 128256), (8192, 50257)), "quick": ((32, 5003),)}
_HEAD = {"cpu": ((512, 768, 50257),), "cuda": ((8192, 4096, 128256),), "quick": ((32, 64, 1009),)}
_HEAD_DTYPES = {"cpu": (F32,), "cuda": (BF16,), "quick": (F32,)}
_ROLLOUT = {"cpu": ((512, 1024),), "cuda": ((512, 1024),), "quick": ((16, 64),)}
_RANKING = {"cpu": ((64, 9),), "cuda": ((64, 9),), "quick": ((8, 9),)}


def _linear(
    name: str, make: Callable[..., Inputs], reference: Callable[[Inputs], Outputs], gemms: int
) -> Op:
    outputs = ("logprobs", "entropy") if "logprobs" in name else ("loss",)
    moved = {"fwd": _linear_moved(True), "fwd+bwd": _linear_moved(False)}
    flops = {"fwd": _gemms(1), "fwd+bwd": _gemms(gemms)}
    return Op(
        name,
        "N x H x V",
        make,
        reference,
        ("hidden", "weight"),
        outputs,
        moved,
        flops,
        _HEAD,
        _HEAD_DTYPES,
    )


_ALL = (
    Op(
        "logprobs",
        "N x V",
        make_logprobs,
        _ref_logprobs,
        ("logits",),
        ("logprobs",),
        _reads(1, 2),
        {},
        _LOGITS,
        _HALF,
    ),
    Op(
        "logprobs_entropy",
        "N x V",
        make_logprobs,
        _ref_logprobs_entropy,
        ("logits",),
        ("logprobs", "entropy"),
        _reads(1, 2),
        {},
        _LOGITS,
        _HALF,
    ),
    Op(
        "logits_kl",
        "N x V",
        make_logits_kl,
        lambda x: (logits_kl_ref(x["logits"], x["ref_logits"]),),
        ("logits",),
        ("kl",),
        _reads(2, 3),
        {},
        _LOGITS,
        _HALF,
    ),
    _linear("linear_cross_entropy", make_linear, _ref_linear_cross_entropy, 3),
    _linear("linear_ppo_loss", make_linear_ppo, _ref_linear_ppo, 3),
    _linear("linear_logprobs", make_linear, _ref_linear_logprobs, 3),
    _linear("linear_logprobs_recompute", make_linear, _ref_linear_logprobs, 4),
    # fp32: six inputs and a mask in, two gradients out
    Op(
        "ppo_loss",
        "B x T",
        make_ppo,
        _ref_ppo,
        ("logprobs", "values"),
        ("loss",),
        _per_token(33, ("fwd+bwd",)),
        {},
        _ROLLOUT,
        _FULL,
    ),
    # fp32: rewards, values and a mask in, advantages and returns out
    Op(
        "gae",
        "B x T",
        make_gae,
        _ref_gae,
        (),
        ("advantages", "returns"),
        _per_token(17, ("fwd",)),
        {},
        _ROLLOUT,
        _FULL,
    ),
    # fp32 scores and int64 ranks in, gradients out
    Op(
        "pairwise_ranking_loss",
        "G x K",
        make_ranking,
        _ref_ranking,
        ("scores",),
        ("loss",),
        _per_token(16, ("fwd+bwd",)),
        {},
        _RANKING,
        _FULL,
    ),
)
OPS: dict[str, Op] = {op.name: op for op in _ALL}


def parse_shape(text: str) -> Shape:
    """Parse "8192x128256" as (8192, 128256)."""
    parts = text.lower().split("x")
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(
            f"shape: got {text!r}, expected positive numbers joined by x, such as 8192x128256"
        )
    return tuple(int(p) for p in parts)


def shape_text(shape: Shape) -> str:
    return "x".join(map(str, shape))
