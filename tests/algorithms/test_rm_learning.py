"""The reward model fits its rankings, generalizes a rule, and finds none in random ranks."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrlhf.algorithms.rm import RewardModelling, evaluate_ranking, ranking_loss
from fastrlhf.config import ModelConfig, OptimizerConfig, ScheduleConfig
from fastrlhf.data.batches import TokenizedRanking, pack_rankings
from fastrlhf.evaluation.reward import evaluate as evaluate_pairs
from fastrlhf.evaluation.reward import ranked_pairs
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.training.optimizer import Learner

VOCAB, K, GOOD = 40, 4, 7
MODEL: dict[str, Any] = {
    "family": "gpt",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "max_positions": 24,
}


def rankings(count: int, rng: random.Random, *, shuffled: bool) -> list[TokenizedRanking]:
    """Return rankings of random tokens: more GOOD tokens are better, or ranks are random.

    `shuffled` chooses random ranks.
    """
    groups = []
    for _ in range(count):
        counts = rng.sample(range(K + 1), K)
        responses = [
            rng.sample([GOOD] * n + [rng.randrange(GOOD + 1, VOCAB) for _ in range(6 - n)], 6)
            for n in counts
        ]
        ranks = rng.sample(range(K), K) if shuffled else [-n for n in counts]
        groups.append(
            TokenizedRanking(
                [rng.randrange(1, GOOD) for _ in range(rng.randint(1, 12))], responses, ranks
            )
        )
    return groups


def train(mesh: Mesh, groups: list[TokenizedRanking], steps: int, batch: int) -> GPT:
    model = build_model(
        ModelConfig(**MODEL, dtype="fp32"), mesh, VOCAB, head="scalar", seed=1
    ).train()
    learner = Learner(
        mesh, model, OptimizerConfig(lr=3e-3), ScheduleConfig(decay="constant"), total_steps=steps
    )
    algorithm = RewardModelling(mesh, learner)
    for step in range(steps):
        start = step * batch % len(groups)
        algorithm.step([pack_rankings(groups[start : start + batch], shared_prompt=True)])
    return model


def evaluate(mesh: Mesh, model: GPT, groups: list[TokenizedRanking]) -> dict[str, float]:
    return evaluate_ranking(mesh, model, [[pack_rankings(groups, shared_prompt=True)]])


def test_overfits_eight_ranked_prompts(mesh: Mesh) -> None:
    """Ranks follow no rule, so each response must be learnt separately."""
    groups = rankings(8, random.Random(0), shuffled=True)
    results = evaluate(mesh, train(mesh, groups, steps=60, batch=8), groups)
    assert results["accuracy"] == 1.0 and results["pairs"] == 8 * 6
    assert results["loss"] < 0.1


@pytest.mark.parametrize("shuffled", [False, True])
def test_held_out_accuracy_is_chance_for_shuffled_ranks_alone(mesh: Mesh, shuffled: bool) -> None:
    """A leak of the ranks into the input (order, length, position) would help random ranks too."""
    rng = random.Random(1)
    groups, held_out = rankings(96, rng, shuffled=shuffled), rankings(300, rng, shuffled=shuffled)
    accuracy = evaluate(mesh, train(mesh, groups, steps=50, batch=24), held_out)["accuracy"]
    if not shuffled:
        assert accuracy > 0.9
    else:
        # The share of a random permutation's K = 4 pairs that are in order has standard deviation
        # sqrt(K (K - 1) (2 K + 5) / 72) / 6 = 0.245; over 300 prompts the mean's is 0.014.
        assert abs(accuracy - 0.5) < 3 * 0.0142


def test_equal_scores_count_one_half_in_training_and_in_eval_rm() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 2.0, 2.0, 5.0])
    rankings = [
        TokenizedRanking([1], [[2], [3], [4]], [1, 2, 3]),  # a tie, right, right
        TokenizedRanking([5], [[2], [3], [4]], [1, 1, 2]),  # two pairs, both wrong
    ]
    ranks = torch.tensor([rank for ranking in rankings for rank in ranking.ranks])
    batch: Any = SimpleNamespace(
        last_index=slice(None), ranks=ranks, prompt_offsets=torch.tensor([0, 3, 6])
    )
    model: Any = SimpleNamespace(score=lambda hidden: scores)
    training = ranking_loss(model, scores, batch)
    judged = evaluate_pairs(ranked_pairs(rankings, [scores[:3].numpy(), scores[3:].numpy()]))
    assert training.pairs == judged["pairs"] == 5
    assert training.accuracy.item() == pytest.approx(2.5 / 5)
    assert judged["accuracy"]["rate"] == pytest.approx(2.5 / 5)
    assert judged["accuracy"]["ties"] == 1
