"""One PPO-ptx iteration equals golden_ppo.py's, which is written from the equations: one process and every layout."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import golden_layouts
import golden_ppo as golden
import pytest
import tiny_ppo
import torch

from fastrlhf.models.gpt import global_names
from fastrlhf.parallel import mesh as meshes

LAYOUTS = [*golden_layouts.PAIRS, *golden_layouts.WHOLE]


def whole_state(stage: Any) -> golden.State:
    return {name: weights.detach().double().clone() for name, weights in global_names(stage)}


@pytest.fixture(scope="module")
def run(tiny: Path, four_ranks: Callable[..., None]) -> dict[str, Any]:
    """The same iteration by the golden implementation, by one process and by four."""
    folder, chosen = tiny, golden_layouts.settings(tiny, {})
    ppo, _ = golden_layouts.build(folder, {})
    states = {name: whole_state(learner.model) for name, learner in ppo.learners().items()}
    states |= {
        "reference": whole_state(ppo.reference),
        "reward": whole_state(ppo.rewards.models[0][1]),
    }
    optimizer, section = chosen.optimizer, chosen.ppo
    c = {
        "heads": 4,
        "vocab": ppo.policy.model.vocab_size,
        "temperature": chosen.generation.temperature,
        "lr": optimizer.lr,
    }
    c |= {
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
        "clip_grad": optimizer.clip_grad,
    }
    c |= section.model_dump()
    episodes = made_episodes(states["policy"], c)
    windows = [[window for batch in next(ppo._windows) for window in cut(batch)] for _ in range(2)]
    ppo.pretraining.load_state_dict({**ppo.pretraining.state_dict(), "epoch": 0, "cursor": 0})
    minibatches = [rows.tolist() for rows in ppo.minibatches(golden_layouts.B)]
    expected = golden.iteration(states, episodes, minibatches, windows, c)
    one = golden_layouts.iteration(ppo, episodes)
    apart = golden_layouts.differences(one, expected, ppo.mesh)
    stored = {"episodes": [asdict(e) for e in episodes], "expected": expected}
    torch.save(stored, folder / "golden.pt")
    meshes.finalize()
    four_ranks(golden_layouts.__file__, str(folder))
    ranks = {
        n: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{n}.?.json"))]
        for n in LAYOUTS
    }
    return {
        "expected": expected,
        "ranks": {"1,1,1": [{"metrics": one["metrics"], "apart": apart}], **ranks},
    }


def cut(batch: Any) -> list[list[int]]:
    """The windows of a packed batch, each with its last label."""
    ends = batch.cu_seqlens.tolist()
    return [
        [*batch.tokens[s:e].tolist(), int(batch.labels[e - 1])] for s, e in itertools.pairwise(ends)
    ]


def made_episodes(policy: golden.State, c: dict[str, Any]) -> list[golden.Episode]:
    """Random responses whose given log-probs are off the policy's, so that ratios reach both sides of the clip."""
    generator = torch.Generator().manual_seed(1)
    episodes = []
    for prompt, answer in tiny_ppo.episodes(golden_layouts.B, c["vocab"]):
        episode = golden.Episode(prompt, answer.tokens, [], answer.stopped)
        now = golden.response_logprobs(policy, episode, c)
        episode.logprobs = (
            now + 0.3 * torch.randn(now.shape, generator=generator, dtype=torch.float64)
        ).tolist()
        episodes.append(episode)
    return episodes


@pytest.mark.parametrize("layout", ["1,1,1", *LAYOUTS])
def test_losses_are_those_of_the_equations(run: dict[str, Any], layout: str) -> None:
    updates = run["expected"]["updates"]
    for rank in run["ranks"][layout]:
        for name in ("policy_loss", "ptx_loss", "value_loss"):
            mean = sum(update["losses"][name] for update in updates) / len(updates)
            assert rank["metrics"][name] == pytest.approx(mean, abs=1e-5), name


@pytest.mark.parametrize("layout", ["1,1,1", *LAYOUTS])
def test_gradient_norms_are_those_of_the_equations(run: dict[str, Any], layout: str) -> None:
    """Of each part by itself, and of their sum: the two parts point in different directions."""
    updates = run["expected"]["updates"]
    for rank in run["ranks"][layout]:
        metrics = rank["metrics"]
        ppo, ptx = updates[0]["parts"]
        assert metrics["ppo_grad_norm"] == pytest.approx(ppo, rel=1e-5)
        assert metrics["ptx_grad_norm"] == pytest.approx(ptx, rel=1e-5)
        for model, name in (("policy", "grad_norm"), ("value", "value_grad_norm")):
            mean = sum(update["norms"][model] for update in updates) / len(updates)
            assert metrics[name] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("layout", ["1,1,1", *LAYOUTS])
def test_gradients_are_those_of_the_equations(run: dict[str, Any], layout: str) -> None:
    if layout == "2,1,2":
        # The distributed optimizer's buffers hold the whole sum only in a rank's own shard: its norms and its weights
        # are compared by the other tests.
        return
    for rank in run["ranks"][layout]:
        found = {name: apart for name, apart in rank["apart"].items() if ".grads." in name}
        assert len(found) == 4
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("layout", ["1,1,1", *LAYOUTS])
def test_updated_weights_are_those_of_the_equations(run: dict[str, Any], layout: str) -> None:
    for rank in run["ranks"][layout]:
        found = {name: apart for name, apart in rank["apart"].items() if name.endswith(".weights")}
        assert set(found) == {"policy.weights", "value.weights", "ema.weights"}
        assert max(found.values()) < 1e-5, found


def test_the_iteration_exercises_every_term(run: dict[str, Any]) -> None:
    """Both clips cut something, and the weights move by far more than the tolerance."""
    metrics = run["ranks"]["1,1,1"][0]["metrics"]
    assert 0.05 < metrics["clip_fraction"] < 0.6
    assert 0.01 < metrics["value_clip_fraction"] < 0.9
    updates = run["expected"]["updates"]
    assert all(
        norm > 1.0 for update in updates for norm in update["norms"].values()
    )  # the gradients are clipped
    assert metrics["updates"] == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_ratio_is_one_after_an_update(run: dict[str, Any], layout: str) -> None:
    assert all(rank["ratio_deviation"] < 1e-5 for rank in run["ranks"][layout])


def test_four_ranks_draw_by_data_rank(run: dict[str, Any]) -> None:
    """Data-parallel ranks differ, those of a tensor-parallel group agree: in noise, and in responses to one prompt."""
    by_data: dict[int, list[Any]] = {}
    for rank in run["ranks"]["2,1,2"]:
        by_data.setdefault(rank["draws"]["data_rank"], []).append(rank["draws"])
    assert set(by_data) == {0, 1}
    for name in ("noise", "sampled"):
        for group in by_data.values():
            assert len(group) == 2
            assert group[0][name] == group[1][name]
        assert by_data[0][0][name] != by_data[1][0][name]
    sampled = [tuple(tokens) for group in by_data.values() for tokens in group[0]["sampled"]]
    assert len(set(sampled)) == len(sampled) == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_stop_an_iteration_together(run: dict[str, Any], layout: str) -> None:
    """Whatever each has measured: one that goes on alone would wait for the others for ever."""
    assert [rank["too_far"] for rank in run["ranks"][layout]] == [False] * len(run["ranks"][layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_function_is_called_once_in_a_model_parallel_group(
    run: dict[str, Any], layout: str
) -> None:
    scores = [rank["scores"] for rank in run["ranks"][layout]]
    assert all(other == scores[0] for other in scores)
    assert len(set(scores[0])) == int(layout.split(",")[2][0])  # the data-parallel size
