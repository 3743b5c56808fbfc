"""A reward model as the judge of responses: what the evaluations of reward models and of policies share.

Left out on purpose: the rewards of PPO (rewards.py), which are mixed, weighted and centred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrlhf.algorithms.rm import score_rankings
from fastrlhf.config import Config
from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh


def finite_scores(
    config: Config, mesh: Mesh, stage: Any, rankings: Sequence[TokenizedRanking], model: str
) -> list[np.ndarray]:
    """The scores fp32 [K] of every ranking, as `score_rankings` in the configured micro-batches. Raises `UserError`
    naming `model` if one is not finite.
    """
    scores = score_rankings(
        mesh,
        stage,
        rankings,
        micro_batch_size=config.train.micro_batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        shared_prompt=config.model.shared_prompt,
    )
    broken = sum(not bool(row.isfinite().all()) for row in scores)
    if broken:
        raise UserError(
            f"{model} gives the responses of {broken} of {len(rankings)} prompts scores that are not finite: it "
            "diverged; take an earlier checkpoint, or train it again with a lower optimizer.lr"
        )
    return [row.numpy() for row in scores]
