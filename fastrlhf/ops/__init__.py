"""The RLHF ops: pure functions of tensors, scalars and at most one process group.

Importing this package needs torch alone.
"""

from __future__ import annotations

from fastrlhf.ops.advantage import (
    RolloutTargets,
    gae,
    group_advantages,
    rollout_targets,
    shaped_rewards,
)
from fastrlhf.ops.dispatch import backends
from fastrlhf.ops.dpo import DPOLoss, dpo_loss
from fastrlhf.ops.kl import logits_kl, token_kl
from fastrlhf.ops.linear import linear_logprobs
from fastrlhf.ops.linear_loss import linear_cross_entropy, linear_ppo_loss
from fastrlhf.ops.linear_modules import (
    FusedLinearCrossEntropy,
    FusedLinearLogprobs,
    FusedLinearPPOLoss,
)
from fastrlhf.ops.logprob import TokenLogprobs, logprobs
from fastrlhf.ops.masked import masked_mean, masked_var, masked_whiten
from fastrlhf.ops.ppo import PPOLoss, ppo_loss
from fastrlhf.ops.ranking import RankingLoss, pairwise_ranking_loss

__all__ = [
    "DPOLoss",
    "FusedLinearCrossEntropy",
    "FusedLinearLogprobs",
    "FusedLinearPPOLoss",
    "PPOLoss",
    "RankingLoss",
    "RolloutTargets",
    "TokenLogprobs",
    "backends",
    "dpo_loss",
    "gae",
    "group_advantages",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_ppo_loss",
    "logits_kl",
    "logprobs",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pairwise_ranking_loss",
    "ppo_loss",
    "rollout_targets",
    "shaped_rewards",
    "token_kl",
]
