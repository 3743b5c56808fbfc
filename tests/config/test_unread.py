"""Settings that a command does not read are named, and names of other trainers are understood."""

from __future__ import annotations

import pytest

from fastrlhf.config import COMMANDS, Config, dump_config, load_config, unread_settings
from fastrlhf.config.suggestions import ALIASES, unknown_key
from fastrlhf.config.yaml_file import known_keys
from fastrlhf.errors import UserError


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("sft", [], []),
        ("ppo", [], ["data.train"]),
        (
            "ppo",
            ["data.train=null", "data.valid=v", "train.eval_interval=1", "train.eval_batches=2"],
            [],
        ),
        ("ppo", ["data.train=null", "model.residual_dropout=0.2"], ["model.residual_dropout"]),
        ("ppo", ["data.train=null", "ppo.value_model=v", "log.samples=9"], []),
        ("sft", ["ppo.clip=0.1", "ppo.gamma=0.9", "generation.slots=1"], ["generation", "ppo"]),
        ("sft", ["ppo.value_model=v"], ["ppo"]),
        ("sft", ["ppo.reward_model=r"], ["ppo"]),
        ("sft", ["data.prompts=p", "log.samples=9"], ["data.prompts", "log.samples"]),
        ("sft", ["data.valid=v", "train.eval_batches=2", "train.eval_interval=1"], []),
        ("rm", ["data.demonstrations=d", "model.shared_prompt=false"], []),
        ("rm", ["data.pretrain=t", "data.cache=c"], ["data.cache", "data.pretrain"]),
        ("pretrain", ["data.pretrain=t", "data.loss_on=all"], ["data.loss_on"]),
        (
            "sample",
            ["train.steps=5", "optimizer.beta1=0.5"],
            ["data.train", "optimizer", "train.steps"],
        ),
        ("eval rm", ["data.valid=v", "sample.k=3", "data.train=null"], ["sample"]),
        ("eval select", ["data.train=null", "eval.tie_margin=1"], ["eval.tie_margin"]),
        ("eval winrate", ["data.train=null", "eval.tie_margin=1", "train.micro_batch_size=2"], []),
    ],
)
def test_what_is_set_and_not_read(make, command, overrides, expected):
    assert unread_settings(make(*overrides), command) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_a_complete_configuration_names_the_same(make, command, tmp_path):
    """A run's config.yaml gives every key; those at their default are not news."""
    config = make("ppo.reward_model=r", "data.valid=v", "train.steps=3")
    (tmp_path / "full.yaml").write_text(dump_config(config))
    full = load_config(tmp_path / "full.yaml")
    assert unread_settings(full, command) == unread_settings(config, command)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.batch_size", "train.global_batch_size or ppo.batch_size?"),
        ("train.train_batch_size", "train.global_batch_size or ppo.batch_size?"),
        ("learning_rate", "optimizer.lr or ppo.value_lr?"),
        ("optimizer.learning_rate", "optimizer.lr or ppo.value_lr?"),
        ("ppo.learning_rate", "ppo.value_lr or optimizer.lr?"),
        ("train.gradient_accumulation_steps", "train.global_batch_size or ppo.batch_size? (steps"),
        ("parallel.tp", "parallel.tensor?"),
        ("tp", "parallel.tensor?"),
        ("model.tensor_model_parallel_size", "parallel.tensor?"),
        ("pipeline-model-parallel-size", "parallel.pipeline?"),
        ("train.per_device_train_batch_size", "train.micro_batch_size?"),
        ("train.max_steps", "train.steps?"),
        ("num_train_epochs", "train.epochs?"),
        ("ppo.beta", "ppo.kl_coef?"),
        ("ppo.kl_penalty", "ppo.kl_coef?"),
        ("data.seq_length", "data.sequence_length or model.max_positions?"),
        ("model.seq_length", "model.max_positions or data.sequence_length?"),
        ("schedule.warmup_ratio", "schedule.warmup_steps? (in steps, not as a share)"),
        ("train.SAVE_STEPS", "checkpoint.interval?"),
        ("optimizer.warmup_steps", "schedule.warmup_steps?"),
        ("ppo.lr", "optimizer.lr?"),
        ("train.sed", "train.seed?"),
    ],
)
def test_the_names_of_other_trainers_lead_to_ours(make, name, expected):
    with pytest.raises(UserError) as raised:
        make(f"{name}=1")
    assert f"unknown key {name}; did you mean {expected}" in str(raised.value)


def test_names_without_a_key_say_what_sets_them(make):
    with pytest.raises(UserError, match=r"parallel\.dp; data parallelism is the number of proc"):
        make("parallel.dp=2")
    with pytest.raises(UserError, match="LoRA and quantization are not supported"):
        make("model.lora_alpha=16")


def test_aliases_are_valid_and_shadow_no_key():
    keys = known_keys(Config)
    assert {key for targets in ALIASES.values() for key in targets} <= set(keys)
    # ppo.batch_size is ours; elsewhere the name is other trainers'.
    assert ALIASES.keys() & {key.rpartition(".")[2] for key in keys} == {"batch_size"}


def test_other_models_have_no_aliases_of_a_run():
    """`data prepare` has its own settings."""
    assert "did you mean" not in unknown_key("learning_rate", ["seed", "prefix"])
