"""Scores of a reward model as a judge, for the evaluations of reward models and policies.

Out of scope: the rewards of PPO (rewards.py), which are mixed, weighted and centred.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastrlhf.algorithms.rm import score_rankings
from fastrlhf.config import Config
from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel.mesh import Mesh


def finite_scores(
    config: Config, mesh: Mesh, model: GPT, rankings: Sequence[TokenizedRanking], name: str
) -> list[npt.NDArray[np.float32]]:
    """Score every ranking with `score_rankings`, in the configured micro-batches.

    Returns one fp32 array [K] for each ranking. Raises UserError with `name`, the name of the
    model, if a score is not finite.
    """
    scores = score_rankings(
        mesh,
        model,
        rankings,
        micro_batch_size=config.train.micro_batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        shared_prompt=config.model.shared_prompt,
    )
    broken = sum(not bool(row.isfinite().all()) for row in scores)
    if broken:
        raise UserError(
            f"{name} gives the responses of {broken} of {len(rankings)} prompts scores that are not finite: it "
            "diverged; take an earlier checkpoint, or train it again with a lower optimizer.lr"
        )
    return [row.numpy() for row in scores]
