"""The batches of a run, and the operations of all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastrlhf.config import Config
from fastrlhf.data.files import raw_rows
from fastrlhf.plan.layout import Layout
from fastrlhf.plan.roles import Role
from fastrlhf.plan.timing import Shape

RESPONSES = 9
"""Responses to a prompt of rankings: the most that the paper's labelers ranked (section 3.4)."""


@dataclass(frozen=True)
class Batch:
    """The micro-batches of an update on one data-parallel rank."""

    tokens: int
    """Of one micro-batch."""
    length: int
    """Of its sequences."""
    count: int


def update_batch(config: Config, command: str, layout: Layout, response: float) -> Batch:
    """Return the micro-batches of one update, rows at full length.

    PPO's responses have `response` tokens.
    """
    train = config.train
    row, length = _row(config, command, response)
    samples = config.ppo.minibatch_size if command == "ppo" else train.global_batch_size
    per_rank = math.ceil(samples / layout.data)
    if train.max_tokens_per_micro_batch is not None:
        tokens = train.max_tokens_per_micro_batch
        return Batch(tokens, length, math.ceil(per_rank * row / tokens))
    rows = min(train.micro_batch_size, per_rank)
    return Batch(rows * row, length, math.ceil(per_rank / rows))


def _row(config: Config, command: str, response: float) -> tuple[int, int]:
    """Return the tokens of a sample and of its longest sequence."""
    data, most = config.data, config.model.max_positions
    prompt = data.max_prompt_tokens
    if command == "ppo":
        length = min(int(prompt + response), most)
        return length, length
    if command == "pretrain":
        return data.sequence_length, data.sequence_length
    length = min(prompt + data.max_response_tokens, most)
    if command != "rm":
        return length, length
    own = length - prompt if config.model.shared_prompt else length
    return length + (RESPONSES - 1) * own, length


def shape_of(role: Role) -> Shape:
    """Return the sizes that decide a model's time; a scalar head has no columns."""
    return Shape.of(role.model, role.vocab_size if role.head == "lm" else 0)


def parameters(role: Role) -> int:
    """Return the weights of a model's matrices."""
    return shape_of(role).weights


def total_steps(config: Config, command: str, samples: int | None) -> tuple[int, list[str]]:
    """Return the steps of the run, and what was assumed.

    0 if the length is given in epochs and the number of records is unknown.
    """
    train = config.train
    if train.steps is not None or command == "ppo":
        return train.steps or 0, []
    paths = [Path(path) for path in config.data.train or []]
    if samples is None and paths and all(path.is_file() for path in paths):
        samples = sum(1 for path in paths for _ in raw_rows(path))
    if samples is None or train.epochs is None:
        return 0, ["the cost is unknown: data.train does not exist; pass --samples N"]
    return math.ceil(train.epochs * samples / train.global_batch_size), []


def work(config: Config, command: str, models: Sequence[Role], steps: int) -> tuple[float, float]:
    """Return the operations and the trained tokens of the whole run.

    6 N operations for each trained token and 2 N for each token that a model only reads or
    samples, rows at full length (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    sizes = {role.name: parameters(role) for role in models}
    response = config.generation.max_new_tokens
    if command != "ppo":
        row, _ = _row(config, command, response)
        tokens = float(steps * config.train.global_batch_size * row)
        return 6 * sizes["model"] * tokens, tokens
    ppo = config.ppo
    episodes = steps * ppo.batch_size
    sampled = episodes * _row(config, command, response)[0]
    trained = sampled * ppo.inner_epochs
    windows = episodes * ppo.inner_epochs * ppo.ptx_per_episode if ppo.gamma_ptx > 0 else 0
    pretrained = windows * config.data.sequence_length
    reading = sizes["policy"] + sizes["reference"] + sizes["value"] + sizes.get("reward", 0)
    operations = 6 * sizes["policy"] * (trained + pretrained) + 6 * sizes["value"] * trained
    return operations + 2 * reading * sampled, float(trained + pretrained)
