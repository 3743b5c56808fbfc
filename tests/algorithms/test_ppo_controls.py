"""Rewards, early stop, memory, warnings and files of a PPO run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithms_support import tiny_ppo

from fastrlhf.algorithms import offload
from fastrlhf.algorithms.ppo import PPO
from fastrlhf.algorithms.rewards import load_reward_function
from fastrlhf.algorithms.rollouts import decode_texts, gather
from fastrlhf.checkpoint.model_folder import describe_model
from fastrlhf.config import require
from fastrlhf.data.tokenize import train_bpe
from fastrlhf.errors import UserError
from fastrlhf.run import train

Make = Callable[..., Any]
MODULE = """
def length(prompts, responses):
    return [float(len(response)) for response in responses]

def seen(prompts, responses):
    seen.calls.append((prompts, responses))
    return [0.0] * len(responses)
seen.calls = []

def short(prompts, responses):
    return [1.0]

def broken_later(prompts, responses):
    broken_later.calls += 1
    return [float("nan") if broken_later.calls > 1 else 0.0] * len(responses)
broken_later.calls = 0

def infinite(prompts, responses):
    return [float("inf")] * len(responses)

number = 3
"""


@pytest.fixture
def build(build: Make, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return `build` of conftest.py, after making the module tiny_rewards importable."""
    (tiny / "tiny_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tiny))
    return build


def scores(ppo: PPO) -> torch.Tensor:
    return ppo.score(gather(ppo.mesh, tiny_ppo.episodes(16, ppo.policy.model.vocab_size))).scores


# ---- rewards ------------------------------------------------------------------------------------


def test_reward_models_and_function_add_up(build: Make, tiny: Path) -> None:
    mesh = tiny_ppo.mesh_of(tiny_ppo.config(tiny))
    tiny_ppo.save_reward_model(tiny, mesh, "rm2", seed=8)
    first, second = str(tiny / "rm"), str(tiny / "rm2")
    one, two = (scores(build(ppo={"reward_model": path})) for path in (first, second))
    by_rule = scores(build(ppo={"reward_model": None, "reward_function": "tiny_rewards:length"}))
    assert by_rule.min() >= 1
    both = {
        "reward_model": [first, second],
        "reward_weights": [0.5, -2.0],
        "reward_function": "tiny_rewards:length",
    }
    torch.testing.assert_close(
        scores(build(ppo=both)), 0.5 * one - 2.0 * two + by_rule, atol=1e-4, rtol=0
    )
    unweighted = scores(build(ppo={"reward_model": [first, second]}))
    torch.testing.assert_close(unweighted, one + two, atol=1e-4, rtol=0)


def test_a_rule_alone_needs_no_reward_model_and_sees_plain_text(build: Make, tiny: Path) -> None:
    """The value function starts from the policy with a new head."""
    ppo = build(ppo={"reward_model": None, "reward_function": "tiny_rewards:seen"})
    body = dict(ppo.policy.model.named_parameters())
    for name, weights in ppo.value.model.named_parameters():
        assert name.startswith("score.") or torch.equal(weights, body[name]), name
    episodes = ppo.sample(ppo.first_tokens)
    eos = ppo.tokenizer.eos_token_id
    episodes[0][1].tokens[-1] = eos
    rollouts = ppo.score(gather(ppo.mesh, episodes))
    prompts, responses = load_reward_function("tiny_rewards:seen").calls.pop()
    assert prompts[0].startswith("What is ")
    assert (prompts, responses) == decode_texts(rollouts, torch.arange(16), ppo.tokenizer)
    assert ppo.tokenizer.decode([eos]) not in responses[0]
    require(
        tiny_ppo.config(tiny, ppo={"reward_model": None, "reward_function": "tiny_rewards:seen"}),
        "ppo",
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny_rewards:short", "returned 1 scores for 16 responses"),
        ("tiny_rewards:infinite", "scored inf for the"),
    ],
)
def test_a_broken_reward_function_is_named(build: Make, name: str, expected: str) -> None:
    ppo = build(ppo={"reward_model": None, "reward_function": name})
    with pytest.raises(UserError, match=f"ppo.reward_function {name} {expected}"):
        scores(ppo)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("no_such_module:f", "no module no_such_module"),
        ("tiny_rewards:nothing", "defines no function nothing"),
    ],
)
@pytest.mark.usefixtures("build")
def test_a_missing_reward_function_is_named(spec: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_reward_function(spec)


def test_not_a_function(build: Make) -> None:
    with pytest.raises(UserError, match="defines no function number"):
        build(ppo={"reward_function": "tiny_rewards:number"})


@pytest.mark.parametrize(
    ("ppo", "expected"),
    [
        ({"reward_model": None}, "ppo needs ppo.reward_model or ppo.reward_function"),
        ({"reward_model": []}, "ppo needs ppo.reward_model or ppo.reward_function"),
    ],
)
def test_without_any_reward_ppo_is_refused(tiny: Path, ppo: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        require(tiny_ppo.config(tiny, ppo=ppo), "ppo")


@pytest.mark.parametrize(
    ("ppo", "expected"),
    [
        (
            {"reward_model": ["a", "b"], "reward_weights": [1.0]},
            "has 1 entries for 2 reward models",
        ),
        ({"reward_function": "module"}, "expected module:function"),
    ],
)
def test_inconsistent_reward_settings_are_refused(
    tiny: Path, ppo: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        tiny_ppo.config(tiny, ppo=ppo)


def test_a_budget_must_hold_the_longest_episode(tiny: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.max_prompt_tokens 32 \+ .* is above train.max_tokens"
    ):
        require(tiny_ppo.config(tiny, train={"max_tokens_per_micro_batch": 41}), "ppo")


@pytest.mark.parametrize("key", ["reward_model", "value_model"])
@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        (
            "generation",
            {"max_new_tokens": 33},
            "reads 64 tokens, .* generation.max_new_tokens are 65",
        ),
        (
            "data",
            {"tokenizer": "larger"},
            r"larger has the token id 319, but ppo\.\w+ .* has 317 tokens",
        ),
    ],
)
def test_models_that_score_must_read_every_sequence_of_the_policy(
    build: Make, tiny: Path, key: str, section: str, change: dict[str, Any], expected: str
) -> None:
    """The error comes before training, not as an index out of range in a later iteration."""
    if "tokenizer" in change:
        train_bpe([(tiny / "data" / "text.jsonl").read_text()], 400, tiny / "larger")
        change = {"tokenizer": str(tiny / "larger")}
    ppo = {
        "reward_model": None,
        "value_model": None,
        "reward_function": "tiny_rewards:length",
        key: str(tiny / "rm"),
    }
    with pytest.raises(UserError, match=expected):
        build(ppo=ppo, model={"max_positions": 128}, **{section: change})


# ---- early stop and values that are not finite --------------------------------------------------


def test_target_kl_ends_an_iteration_before_the_update_that_exceeds_it(build: Make) -> None:
    """With a tiny target only the first minibatch, whose KL is 0, updates the weights."""
    settings = {"inner_epochs": 2, "minibatch_size": 4}
    ppo = build(ppo=settings)
    free = ppo.step([ppo.first_prompts])
    assert free["updates"] == 8
    assert free["approx_kl"] > 1e-4
    ppo = build(ppo={**settings, "target_kl": 1e-6})
    stopped = ppo.step([ppo.first_prompts])
    assert stopped["updates"] == 1
    assert stopped["approx_kl"] < 1e-6
    loose = build(ppo={**settings, "target_kl": 10.0})
    assert loose.step([loose.first_prompts])["updates"] == 8


@pytest.mark.parametrize("broken", ["logprobs", "values"])
def test_a_nan_loss_stops_the_run_and_updates_nothing(build: Make, broken: str) -> None:
    ppo = build()
    rollouts = ppo.score(gather(ppo.mesh, ppo.sample(ppo.first_tokens)))
    getattr(rollouts, broken)[3, 0] = math.nan
    before = [
        p.detach().clone()
        for learner in ppo.learners().values()
        for p in learner.model.parameters()
    ]
    ppo.iteration = 4
    with pytest.raises(
        UserError, match="iteration 5: policy_loss is nan; stopped before this update"
    ):
        ppo.learn(rollouts)
    after = [p for learner in ppo.learners().values() for p in learner.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.usefixtures("build")
def test_a_run_that_breaks_keeps_its_last_checkpoint(tiny: Path) -> None:
    rule = {"reward_model": None, "reward_function": "tiny_rewards:broken_later", "gamma_ptx": 0.0}
    out, saved = tiny / "breaks", {"interval": 1, "asynchronous": False}
    chosen = tiny_ppo.config(tiny, ppo=rule, checkpoint=saved).model_copy(
        update={"output_dir": str(out)}
    )
    with pytest.raises(UserError, match="broken_later scored nan for the response"):
        train.train("ppo", chosen)
    assert describe_model(out).path.parent.name == "step_00000001"
    assert [
        json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ] == [1]


def test_a_nan_gradient_of_a_finite_loss_stops_the_run(build: Make) -> None:
    ppo = build()
    rollouts = ppo.score(gather(ppo.mesh, ppo.sample(ppo.first_tokens)))
    accumulate = ppo.policy.accumulate_with_norms

    def overflow(*arguments: Any) -> Any:
        found = accumulate(*arguments)
        next(ppo.policy.model.parameters()).main_grad.fill_(math.nan)
        return found

    ppo.policy.accumulate_with_norms = overflow
    with pytest.raises(UserError, match="the gradient norm is nan; stopped"):
        ppo.learn(rollouts)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gradient_norms_do_not_depend_on_the_loss_scale(build: Make, dtype: str) -> None:
    """Norms of both parts and of their sum are fp32's, not 256 times as large."""

    def norms(**sections: dict[str, Any]) -> list[float]:
        ppo = build(**sections)
        episodes = tiny_ppo.episodes(16, ppo.policy.model.vocab_size)
        metrics = ppo.learn(ppo.score(gather(ppo.mesh, episodes)))
        assert not metrics.get("skipped")
        return [
            metrics[name]
            for name in ("ppo_grad_norm", "ptx_grad_norm", "grad_norm", "value_grad_norm")
        ]

    half = norms(model={"dtype": dtype}, optimizer={"lr": 1e-3, "initial_loss_scale": 256.0})
    assert half == pytest.approx(norms(), rel=0.1)


def test_a_resumed_run_may_add_the_pretraining_term(build: Make) -> None:
    """The checkpoint of plain PPO has no position in the text, which is read from the start."""
    plain = build(ppo={"gamma_ptx": 0.0}).state_dict()
    ppo = build()
    ppo.load_state_dict(plain | {"iteration": 3})
    assert ppo.iteration == 3
    assert ppo.step([ppo.first_prompts])["ptx_loss"] > 0


# ---- memory -------------------------------------------------------------------------------------


def test_offloaded_models_are_on_the_device_while_they_are_used(
    build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real = offload.move

    def fake(model: torch.nn.Module, device: torch.device) -> None:
        moves.append(
            (names.get(id(model), "start"), "host" if device is offload.HOST else "device")
        )
        real(model, device)

    monkeypatch.setattr(offload.Offload.__init__, "__defaults__", (fake,))
    plain, ppo = build(), build(ppo={"offload": True})
    assert [where for _, where in moves] == ["host"] * 3
    names |= {
        id(ppo.reference): "reference",
        id(ppo.rewards.models[0][1]): "reward",
        id(ppo.average.model): "average",
    }
    device = torch.device("cpu", 0)  # not the same object as the host
    ppo._on_device._device = device
    moves.clear()
    metrics = ppo.step([ppo.first_prompts])
    # The average moves after every update.
    used = ["reference", "reward", *["average"] * int(metrics["updates"])]
    assert metrics["updates"] == 2
    assert moves == [(name, where) for name in used for where in ("device", "host")]
    expected = plain.step([plain.first_prompts])
    assert metrics["loss"] == expected["loss"]
    assert metrics["grad_norm"] == expected["grad_norm"]


def test_move_keeps_the_parameters_and_their_attributes() -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.partition_dim = 0  # type: ignore[assignment]
    weights, value = model.weight, model.weight.detach().clone()
    offload.move(model, torch.device("cpu"))
    assert model.weight is weights
    assert model.weight.partition_dim == 0
    assert torch.equal(model.weight, value)


# ---- logs --------------------------------------------------------------------------------------


def test_a_run_logs_samples_metrics_and_warnings(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = tiny_ppo.config(
        tiny,
        generation={"max_new_tokens": 2},
        log={"progress": False, "tensorboard": False, "samples": 3},
        checkpoint={"save": False},
    ).model_copy(update={"output_dir": str(tiny / "logged")})
    with caplog.at_level(logging.WARNING, "fastrlhf"):
        train.train("ppo", chosen)
        train.train("ppo", chosen)  # starts over: the samples of the first run are dropped
    assert any(message.startswith("warning: no-stop: iteration 1: ") for message in caplog.messages)
    rows = [
        json.loads(line) for line in (tiny / "logged" / "samples.jsonl").read_text().splitlines()
    ]
    assert [row["iteration"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert set(rows[0]) == {"iteration", "prompt", "response", "score", "kl", "stopped"}
    assert rows[0]["prompt"].startswith("What is")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    page = (tiny / "logged" / "report.html").read_text()
    assert "Responses of iteration 1" in page
    assert "Responses of iteration 2" in page
    metrics = [
        json.loads(line) for line in (tiny / "logged" / "metrics.jsonl").read_text().splitlines()
    ][-1]
    assert {
        "reward",
        "score",
        "kl",
        "kl_k3",
        "entropy",
        "response_length",
        "no_stop",
        "clip_fraction",
    } <= set(metrics)
    assert {
        "value_clip_fraction",
        "approx_kl",
        "explained_variance",
        "ratio_deviation",
        "ptx_loss",
    } <= set(metrics)
    assert {
        "grad_norm",
        "ppo_grad_norm",
        "ptx_grad_norm",
        "value_grad_norm",
        "kl_coef",
        "updates",
    } <= set(metrics)
    phases = ("rollout", "scoring", "update")
    assert sum(metrics[f"share_{name}"] for name in phases) == pytest.approx(1.0)
    lengths = metrics["response_length"] * 16
    assert metrics["rollout_tokens_per_second"] == pytest.approx(
        lengths / metrics["seconds_rollout"]
    )
    trained_tokens = metrics["train_tokens_per_second"] * metrics["seconds_update"]
    assert trained_tokens > lengths + 16 * 24  # with the tokens of the windows
