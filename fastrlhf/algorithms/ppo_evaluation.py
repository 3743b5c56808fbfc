"""Evaluation of PPO's policy on held-out prompts, during training.

One response to each prompt is sampled from the current weights of the policy (not from their moving
average), at the temperature of the rollouts, and scored as an episode is. The noise of a response
depends on the run's seed and the number of its prompt alone: every evaluation of a run uses the
same noise, none of it is the rollouts', and the parallel layout changes no response. An evaluation
changes no state of the run, so training and a resumed run are the same with and without it.

Out of scope: comparing policies, and intervals over several responses to a prompt (`fastrlhf eval`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fastrlhf.algorithms.rollouts import gather
from fastrlhf.config import Config
from fastrlhf.data.batches import TokenizedPrompt
from fastrlhf.parallel.mesh import hashed_seed

if TYPE_CHECKING:
    from fastrlhf.algorithms.ppo import PPO

Tensor = torch.Tensor


class HeldOutPrompts:
    """The prompts of an evaluation: the first train.eval_batches batches of ppo.batch_size."""

    def __init__(self, prompts: Sequence[TokenizedPrompt], config: Config) -> None:
        self.batch_size = config.ppo.batch_size
        batches = config.train.eval_batches
        self.prompts = prompts if batches is None else prompts[: batches * self.batch_size]
        self.seed = hashed_seed(config.train.seed, "held-out prompts")

    def __len__(self) -> int:
        return len(self.prompts)


def evaluate_policy(ppo: PPO, held_out: HeldOutPrompts) -> dict[str, float]:
    """Return the metrics of the policy on `held_out`, the same on every rank.

    - score: mean score, as in training (`ppo.no_stop_penalty` included, the KL not).
    - kl: k1 estimate of KL(policy || reference), nats per response; kl_per_token: its sum over all
      responses divided by their tokens.
    - response_length: tokens, the stop token included.
    - stopped: share of the responses that end with a stop token.
    - score_stderr, kl_stderr, response_length_stderr: standard errors of these means over prompts,
      from two prompts up.
    - prompts: their number.
    """
    rows = [
        _evaluate_batch(ppo, held_out, first)
        for first in range(0, len(held_out), held_out.batch_size)
    ]
    columns = torch.cat(rows)
    score, kl, length, stopped = columns.unbind(1)
    metrics = {
        "score": score.mean().item(),
        "kl": kl.mean().item(),
        "kl_per_token": (kl.sum() / length.sum()).item(),
        "response_length": length.mean().item(),
        "stopped": stopped.mean().item(),
    }
    prompts = columns.shape[0]
    if prompts > 1:
        for name, values in (("score", score), ("kl", kl), ("response_length", length)):
            metrics[f"{name}_stderr"] = values.std().item() / math.sqrt(prompts)
    return {**metrics, "prompts": float(prompts)}


def _evaluate_batch(ppo: PPO, held_out: HeldOutPrompts, first: int) -> Tensor:
    """Return float64 [prompts, 4]: score, KL, length and whether it stopped, of each response."""
    mesh = ppo.mesh
    numbers = list(range(first, min(first + held_out.batch_size, len(held_out))))
    # Ranks take equal numbers of prompts; the last prompt is repeated to fill them, and not counted.
    per_rank = -(-len(numbers) // mesh.data_size)
    padded = numbers + numbers[-1:] * (per_rank * mesh.data_size - len(numbers))
    own = padded[mesh.data_rank * per_rank :][:per_rank]
    prompts = [held_out.prompts[number] for number in own]
    sampling = replace(ppo.sampling, seed=held_out.seed)
    episodes = ppo.respond([prompt.tokens for prompt in prompts], own, sampling)
    sampled = gather(mesh, episodes, ppo.rewards.records_of(prompts))
    rollouts = ppo.scorer.score(sampled, with_values=False)
    kl = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).double().sum(1)
    scores = ppo.apply_no_stop_penalty(rollouts)
    columns = [scores, kl, rollouts.response_lengths, rollouts.stopped]
    return torch.stack([column.double() for column in columns], 1)[: len(numbers)]
