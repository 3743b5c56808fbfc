"""The policy-loss family: PPO's clip and its relatives, per token, with their gradients.

The options of `ppo_loss` and `linear_ppo_loss`, their checks, and one token's terms in plain torch.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.kl import ESTIMATORS, kl_slope, token_kl
from fastrlhf.ops.scalars import Number, clamp, is_zero

OBJECTIVES = ("clip", "cispo")
RATIOS = ("token", "sequence")
MOST = sys.float_info.max


class PolicyForm(NamedTuple):
    """What selects another formula, and the tokens of a sequence (the last dimension)."""

    objective: str
    ratio: str
    kl_estimator: str
    length: int


class PPOOptions(NamedTuple):
    """Coefficients of the PPO loss: floats, or 0-dim tensors on a GPU."""

    clip_low: Number
    clip_high: Number
    value_clip: Number
    value_coef: Number
    entropy_coef: Number
    dual_clip: Number = float("inf")
    kl_coef: Number = 0.0


class PolicyArguments(NamedTuple):
    """The policy options as a caller gives them."""

    clip: Number | tuple[Number, Number]
    dual_clip: Number | None
    ref_logprobs: Tensor | None
    kl_coef: Number
    kl_estimator: str
    weights: Tensor | None
    objective: str
    ratio: str

    def checked(self, shape: torch.Size, device: torch.device) -> tuple[PolicyForm, PPOOptions]:
        """Check the options for tokens of `shape`, and return them with value terms of 0."""
        low, high = check_policy(
            self.clip,
            self.dual_clip,
            self.kl_coef,
            self.kl_estimator,
            self.objective,
            self.ratio,
        )
        for name, tensor in (("ref_logprobs", self.ref_logprobs), ("weights", self.weights)):
            if tensor is not None:
                checks.like(name, tensor, shape, device)
        needs = self.ref_logprobs is not None or is_zero(self.kl_coef)
        expected = "the reference's log-probs, since kl_coef is set"
        checks.require(needs, "ref_logprobs", None, expected)
        length = shape[-1] if len(shape) else 1
        dual = float("inf") if self.dual_clip is None else self.dual_clip
        form = PolicyForm(self.objective, self.ratio, self.kl_estimator, length)
        return form, PPOOptions(low, high, 0.2, 1.0, 0.0, dual, self.kl_coef)


def check_policy(
    clip: Number | tuple[Number, Number],
    dual_clip: Number | None,
    kl_coef: Number,
    kl_estimator: str,
    objective: str,
    ratio: str,
) -> tuple[Number, Number]:
    """Check the options that are not tensors of the tokens; return (low, high) of `clip`."""
    checks.choice("objective", objective, OBJECTIVES)
    checks.choice("ratio", ratio, RATIOS)
    checks.choice("kl_estimator", kl_estimator, ESTIMATORS)
    checks.finite("kl_coef", kl_coef)
    if dual_clip is not None:
        checks.require(objective == "clip", "dual_clip", dual_clip, "None with objective='cispo'")
        expected = "a number from 1 on, not infinite"
        checks.scalar("dual_clip", dual_clip, 1.0, MOST, expected)
    if not isinstance(clip, tuple | list):
        checks.positive("clip", clip)
        return clip, clip
    checks.require(len(clip) == 2, "clip", clip, "a number, or a pair (low, high)")
    for bound in clip:
        checks.positive("clip", bound)
    return clip[0], clip[1]


class PolicyTerms(NamedTuple):
    """Per token: the policy loss, its slope, and where the clip has cut the gradient."""

    loss: Tensor
    slope: Tensor
    """In the log-ratio for "clip", in the log-prob for "cispo"."""
    cut: Tensor


def policy_terms(
    log_ratio: Tensor, advantage: Tensor, logprobs: Tensor, options: PPOOptions, objective: str
) -> PolicyTerms:
    """Return the terms of tokens with log-ratio log r; every argument is 0 where masked.

    "clip": max(-A r, -A clip(r)), at most -A dual_clip where A < 0. "cispo": -A sg(clip(r)) log p.
    """
    ratio = log_ratio.exp()
    bounded = clamp(ratio, 1 - options.clip_low, 1 + options.clip_high)
    if objective == "cispo":
        slope = -advantage * bounded
        return PolicyTerms(slope * logprobs, slope, ratio != bounded)
    plain, clipped = -advantage * ratio, -advantage * bounded
    ceiling = -advantage * options.dual_clip
    loss, cut = torch.maximum(plain, clipped), clipped > plain
    too_high = (advantage < 0) & (loss > ceiling)
    loss, cut = torch.where(too_high, ceiling, loss), cut | too_high
    return PolicyTerms(loss, torch.where(cut, 0.0, plain), cut)


def sequence_mean(x: Tensor, mask: Tensor, length: int) -> Tensor:
    """Return each sequence's mean of x [N] over its True positions, at each of its tokens [N].

    x is 0 where masked; a sequence is `length` consecutive tokens.
    """
    if x.numel() == 0:
        return x
    count = mask.view(-1, length).sum(1, dtype=x.dtype).clamp(min=1)
    mean = x.view(-1, length).sum(1) / count
    return torch.where(mask, mean[:, None].expand(-1, length).reshape(-1), 0.0)


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Return the estimates of KL(pi || ref) per token, and their slopes in logprobs."""
    d = logprobs - ref_logprobs
    return token_kl(logprobs, ref_logprobs, estimator), kl_slope(d, estimator)
