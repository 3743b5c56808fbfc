"""Direct preference optimization from the log-probs of chosen and rejected responses.

Plain torch: [B] numbers a batch leave nothing to fuse. Out of scope: the log-probs themselves, which
`linear_logprobs` sums up without the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrlhf.ops import checks
from fastrlhf.ops.scalars import Number, as_tensor

KINDS = ("sigmoid", "hinge", "ipo", "robust")


class DPOLoss(NamedTuple):
    """Means over the pairs, 0-dim fp32, detached except for `loss`."""

    loss: Tensor
    accuracy: Tensor
    """Fraction of the pairs whose chosen response has the strictly higher reward."""
    margin: Tensor
    """chosen_reward - rejected_reward"""
    chosen_reward: Tensor
    """beta (chosen - ref_chosen)"""
    rejected_reward: Tensor


def dpo_loss_ref(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of `dpo_loss` from its probabilities, as its papers write them."""
    ratio = (chosen - rejected) - (ref_chosen - ref_rejected)
    p = torch.sigmoid(beta * ratio)
    if kind == "hinge":
        return (1 - beta * ratio).clamp(min=0).mean()
    if kind == "ipo":
        return ((ratio - 1 / (2 * beta)) ** 2).mean()
    right, wrong = -p.log(), -(1 - p).log()
    noisy = (1 - label_smoothing) * right
    if kind == "robust":
        return ((noisy - label_smoothing * wrong) / (1 - 2 * label_smoothing)).mean()
    return (noisy + label_smoothing * wrong).mean()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Number = 0.1,
    kind: str = "sigmoid",
    label_smoothing: Number = 0.0,
) -> DPOLoss:
    """Return the preference loss of pairs, from summed log-probs [B] of policy and reference.

    With d = (chosen - rejected) - (ref_chosen - ref_rejected) and e = label_smoothing:
        "sigmoid": -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)   (arXiv 2305.18290, eq. 7)
        "hinge":   max(0, 1 - beta d)                                      (arXiv 2305.10425)
        "ipo":     (d - 1 / (2 beta))^2      (arXiv 2310.12036, eq. 17; of log-probs averaged over
                   tokens, if their lengths should not count)
        "robust":  (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)
                                                                           (arXiv 2403.00409, eq. 12)
    Differentiable in chosen and rejected; the reference and the scalars (numbers or 0-dim tensors)
    are constants. label_smoothing is below 0.5, and 0 for "hinge" and "ipo". Raises ValueError on
    wrong shapes and dtypes.
    """
    checks.floating("chosen", chosen)
    checks.require(chosen.dim() == 1, "chosen", chosen, "shape [B]")
    others = {"rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    for name, tensor in others.items():
        checks.like(name, tensor, chosen.shape, chosen.device)
    checks.choice("kind", kind, KINDS)
    checks.positive("beta", beta)
    unused = kind in ("hinge", "ipo")
    most, expected = (0.0, f"0 with kind={kind!r}") if unused else (0.4999, "0 or more, below 0.5")
    checks.scalar("label_smoothing", label_smoothing, 0.0, most, expected)
    dtype = checks.compute_dtype(chosen)
    scale, noise = (_constant(x, chosen, dtype) for x in (beta, label_smoothing))
    wins = chosen.to(dtype) - ref_chosen.detach().to(dtype)
    losses = rejected.to(dtype) - ref_rejected.detach().to(dtype)
    d = wins - losses
    if kind == "hinge":
        each = F.relu(1 - scale * d)
    elif kind == "ipo":
        each = (d - 1 / (2 * scale)).square()
    else:
        right, wrong = -F.logsigmoid(scale * d), -F.logsigmoid(-scale * d)
        if kind == "robust":
            each = ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)
        else:
            each = (1 - noise) * right + noise * wrong
    reward, rejected_reward = scale * wins.detach(), scale * losses.detach()
    return DPOLoss(
        each.mean(),
        (reward > rejected_reward).to(dtype).mean(),
        (reward - rejected_reward).mean(),
        reward.mean(),
        rejected_reward.mean(),
    )


def _constant(x: Number, like: Tensor, dtype: torch.dtype) -> Tensor:
    made = as_tensor(x, like)
    assert made is not None
    return made.detach().to(like.device, dtype)
