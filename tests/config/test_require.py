"""Requirements of each command on a configuration that is valid in itself."""

from __future__ import annotations

import pytest

from fastrlhf.config import require
from fastrlhf.errors import UserError

LENGTH = ["train.steps=5", "train.global_batch_size=4"]
PPO = ["train.steps=5", "data.prompts=p.jsonl", "data.pretrain=t.jsonl", "ppo.reward_model=rm"]


@pytest.mark.parametrize("command", ["pretrain", "sft", "rm"])
def test_supervised_commands_are_satisfied(make, command):
    require(make(*LENGTH), command)


def test_ppo_and_sample_are_satisfied(make):
    require(make(*PPO), "ppo")
    require(make("data.prompts=p"), "sample")
    require(make(), "doctor")


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("sft", [*LENGTH, "data.train=null"], "sft needs data.train: the demonstrations"),
        ("rm", [*LENGTH, "data.train=[]"], "rm needs data.train: the rankings or pairs"),
        ("pretrain", [*LENGTH, "data.train=null"], "pretrain needs data.train: the text"),
        (
            "sft",
            ["train.global_batch_size=4"],
            "sft needs a length: set train.steps or train.epochs",
        ),
        ("sft", ["train.epochs=1"], "sft needs train.global_batch_size"),
        (
            "sft",
            [*LENGTH, "data.pretrain_fraction=0.1"],
            "data.pretrain_fraction above 0 needs data.pretrain",
        ),
        (
            "sft",
            [*LENGTH, "model.max_positions=64"],
            "data.max_prompt_tokens 1024 + data.max_response_tokens 1024 is",
        ),
        (
            "pretrain",
            [*LENGTH, "model.max_positions=64"],
            "data.sequence_length 2048 is above model.max_positions 64",
        ),
        ("ppo", PPO[1:], "ppo needs train.steps"),
        ("ppo", [*PPO[1:], "train.epochs=1"], "ppo needs train.steps"),
        ("ppo", [*PPO, "data.prompts=null"], "ppo needs data.prompts"),
        ("ppo", [*PPO, "ppo.reward_model=null"], "ppo needs ppo.reward_model"),
        ("ppo", [*PPO, "data.pretrain=null"], "ppo.gamma_ptx above 0 needs data.pretrain"),
        ("ppo", [*PPO, "generation.temperature=0"], "ppo needs generation.temperature above 0"),
        (
            "ppo",
            [*PPO, "generation.top_k=5"],
            "ppo needs generation.top_k=0 and generation.top_p=1.0",
        ),
        (
            "ppo",
            [*PPO, "generation.top_p=0.9"],
            "ppo needs generation.top_k=0 and generation.top_p=1.0",
        ),
        (
            "ppo",
            [*PPO, "generation.max_new_tokens=1025"],
            "data.max_prompt_tokens 1024 + generation.max_new_tokens",
        ),
        (
            "ppo",
            [*PPO, "data.sequence_length=4096"],
            "data.sequence_length 4096 is above model.max_positions 2048",
        ),
        ("sample", [], "sample needs data.prompts"),
    ],
)
def test_what_is_missing_is_named_in_one_line(make, command, overrides, expected):
    with pytest.raises(UserError) as raised:
        require(make(*overrides), command)
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


def test_plain_ppo_needs_no_pretraining_text(make):
    require(make(*PPO, "data.pretrain=null", "ppo.gamma_ptx=0", "data.sequence_length=4096"), "ppo")
