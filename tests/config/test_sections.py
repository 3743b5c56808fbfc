"""Defaults that depend on other fields, and checks that span fields."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from fastrlhf.config import Config, ModelConfig, check_batch
from fastrlhf.errors import UserError

GPT = {"family": "gpt", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_positions": 128}
LLAMA = {**GPT, "family": "llama", "ffn_size": 172}


def test_gpt_fills_its_own_architecture():
    model = ModelConfig(**GPT)
    assert (model.position, model.norm, model.activation) == ("learned", "layernorm", "gelu_tanh")
    assert (model.bias, model.qkv_bias, model.tie_embeddings) == (True, True, True)
    assert (model.ffn_size, model.head_dim, model.num_kv_heads) == (256, 16, 4)


def test_llama_fills_its_own_architecture():
    model = ModelConfig(**LLAMA)
    assert (model.position, model.norm, model.activation) == ("rope", "rmsnorm", "swiglu")
    assert (model.bias, model.qkv_bias, model.tie_embeddings) == (False, False, False)


def test_what_is_set_wins_over_the_family():
    model = ModelConfig(
        **{**LLAMA, "tie_embeddings": True, "qkv_bias": True, "num_kv_heads": 2, "head_dim": 32}
    )
    assert (model.tie_embeddings, model.bias, model.qkv_bias) == (True, False, True)
    assert (model.num_kv_heads, model.head_dim) == (2, 32)


def test_null_asks_for_the_default():
    unset = dict.fromkeys(["num_kv_heads", "head_dim", "ffn_size", "position", "bias", "qkv_bias"])
    assert ModelConfig(**{**GPT, **unset}) == ModelConfig(**GPT)


def test_only_documented_model_fields_may_be_none():
    model = ModelConfig(**GPT)
    unset = {name for name in ModelConfig.model_fields if getattr(model, name) is None}
    optional = {"rope_factor", "sliding_window", "recompute_layers"}
    assert unset == {"vocab_size", "load", "hf"} | optional


def test_value_model_is_the_reward_model_unless_set(make):
    assert make("ppo.reward_model=r").ppo.value_model == "r"
    assert make("ppo.reward_model=r", "ppo.value_model=v").ppo.value_model == "v"


def test_values_cannot_change(make):
    config = make()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 5


def test_every_field_is_documented():
    def undocumented(model: type[BaseModel]) -> list[str]:
        names = [
            f"{model.__name__}.{name}"
            for name, field in model.model_fields.items()
            if not field.description
        ]
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undocumented(field.annotation)
        return names

    assert undocumented(Config) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["parallel.tensor=3"],
            "parallel.tensor 3 does not divide model.num_heads 4; use a divisor of 4",
        ),
        (
            ["parallel.tensor=4", "model.num_kv_heads=2"],
            "parallel.tensor 4 does not divide model.num_kv_heads 2; use a divisor of 2",
        ),
        (
            ["parallel.tensor=2", "model.ffn_size=255"],
            "parallel.tensor 2 does not divide model.ffn_size 255",
        ),
        (
            ["parallel.pipeline=3"],
            "parallel.pipeline 3 does not divide model.num_layers 4; use a divisor of 4",
        ),
        (["parallel.context=2"], "parallel.context 2 is not supported yet; use 1"),
        (
            ["model.hidden_size=65"],
            "model.hidden_size 65 is not a multiple of num_heads 4; set head_dim",
        ),
        (["model.num_kv_heads=3"], "model.num_kv_heads 3 does not divide num_heads 4"),
        (["model.family=llama"], "model.ffn_size is required for family llama"),
        (["model.ffn_size=-1"], "model.ffn_size is -1, expected above 0"),
        (
            ["model.attention=flash", "model.dtype=fp32"],
            "model.attention flash needs dtype bf16 or fp16",
        ),
        (["model.recompute_layers=2"], "model.recompute_layers is for recompute full, not none"),
        (
            ["model.load=a", "model.hf=b"],
            (
                "model.hf and load are both set; a model starts from one of them: set the other to"
                " null"
            ),
        ),
        (
            ["train.steps=1", "train.epochs=1"],
            "train.epochs and steps are both set; a run has one length: set the other to null",
        ),
        (
            ["train.global_batch_size=10", "train.micro_batch_size=4"],
            "train.global_batch_size 10 is not a multiple of micro_batch_size 4",
        ),
        (
            ["ppo.batch_size=10", "ppo.minibatch_size=4"],
            "ppo.minibatch_size 4 does not divide batch_size 10",
        ),
        (
            ["generation.max_new_tokens=4", "generation.min_new_tokens=5"],
            "generation.min_new_tokens 5 is above",
        ),
    ],
)
def test_conflicts_say_what_and_how_to_fix(make, overrides, expected):
    with pytest.raises(UserError) as raised:
        make(*overrides)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.sequence=true"],  # no effect with tensor 1, and harmless
        ["parallel.tensor=4", "parallel.pipeline=4", "parallel.sequence=true"],
        ["model.hidden_size=65", "model.head_dim=16"],
        ["model.num_kv_heads=1"],
        ["train.micro_batch_size=8", "ppo.batch_size=64"],
    ],
)
def test_allowed(make, overrides):
    make(*overrides)


def test_batch_divides_exactly(make):
    config = make(
        "train.global_batch_size=48",
        "train.micro_batch_size=4",
        "ppo.batch_size=32",
        "ppo.minibatch_size=8",
    )
    assert check_batch(config, 1) == 12
    assert check_batch(config, 3) == 4
    assert check_batch(config, 2, "ppo.batch_size") == 4
    assert check_batch(config, 2, "ppo.minibatch_size") == 1


def test_batch_that_does_not_divide_names_every_number(make):
    config = make("train.global_batch_size=48", "train.micro_batch_size=4", "ppo.minibatch_size=8")
    with pytest.raises(UserError) as raised:
        check_batch(config, 5)
    assert (
        str(raised.value)
        == "train.global_batch_size 48 is not a multiple of train.micro_batch_size 4 x"
        " data-parallel size 5 = 20; use a multiple of 20, or change the micro-batch or the"
        " number of processes"
    )
    with pytest.raises(UserError, match=r"^ppo.minibatch_size 8 is not a multiple of .* = 12; "):
        check_batch(config, 3, "ppo.minibatch_size")


def test_pretraining_text_is_a_list_or_a_blend(make):
    assert make("data.pretrain=a").data.pretrain == ["a"]
    blend = make("data.pretrain={corpus/a: 1, b.jsonl: 2.5}")
    assert blend.data.pretrain == {"corpus/a": 1.0, "b.jsonl": 2.5}
    with pytest.raises(
        UserError, match=r"data\.pretrain\.b is 0, expected a number greater than 0"
    ):
        make("data.pretrain={a: 1, b: 0}")
    with pytest.raises(UserError, match=r"data\.pretrain is 3, expected a list"):
        make("data.pretrain=3")


def test_a_token_budget_needs_no_divisor(make):
    config = make(
        "train.global_batch_size=7",
        "train.micro_batch_size=4",
        "train.max_tokens_per_micro_batch=512",
    )
    assert check_batch(config, 3) == 1
    with pytest.raises(
        UserError, match=r"train.global_batch_size 7 is below the data-parallel size 8; every rank"
    ):
        check_batch(config, 8)
