"""A PPO-ptx iteration equals golden_ppo.py's, in one process and under every layout.

golden_ppo.py is written from the equations and shares no code with the package.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithms_support import golden_layouts, tiny_ppo
from algorithms_support import golden_ppo as golden

from fastrlhf.data.batches import PackedBatch
from fastrlhf.models.gpt import GPT, global_names
from fastrlhf.parallel import mesh as meshes

LAYOUTS = [*golden_layouts.PAIRS, *golden_layouts.FULL_WORLD]


def float64_state(model: GPT) -> golden.State:
    return {name: weights.detach().double().clone() for name, weights in global_names(model)}


@pytest.fixture(scope="module")
def run(tiny: Path, four_ranks: Callable[..., None]) -> dict[str, Any]:
    """Return the results of an iteration: of golden_ppo.py, of one process, of four ranks."""
    folder, chosen = tiny, golden_layouts.settings(tiny, {})
    ppo, _ = golden_layouts.build(folder, {})
    states = {name: float64_state(learner.model) for name, learner in ppo.learners().items()}
    states |= {
        "reference": float64_state(ppo.reference),
        "reward": float64_state(ppo.rewards.models[0][1]),
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
    episodes = random_episodes(states["policy"], c)
    windows = [
        [window for batch in next(ppo._windows) for window in windows_of(batch)] for _ in range(2)
    ]
    ppo.pretraining.load_state_dict({**ppo.pretraining.state_dict(), "epoch": 0, "cursor": 0})
    minibatches = [rows.tolist() for rows in ppo.minibatches(golden_layouts.B)]
    expected = golden.iteration(states, episodes, minibatches, windows, c)
    one = golden_layouts.iteration(ppo, episodes)
    differences = golden_layouts.differences(one, expected, ppo.mesh)
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
        "ranks": {"1,1,1": [{"metrics": one["metrics"], "differences": differences}], **ranks},
    }


def windows_of(batch: PackedBatch) -> list[list[int]]:
    """Return the windows of a packed batch, each with its last label."""
    ends = batch.cu_seqlens.tolist()
    return [
        [*batch.tokens[s:e].tolist(), int(batch.labels[e - 1])] for s, e in itertools.pairwise(ends)
    ]


def random_episodes(policy: golden.State, c: dict[str, Any]) -> list[golden.Episode]:
    """Return random episodes whose log-probs differ from the policy's.

    The ratios reach both sides of the clip.
    """
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
    """Compare the norm of each part and of their sum: the parts point in different directions."""
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
        # The distributed optimizer's buffers hold the full sum only in a rank's own shard. The
        # other tests compare its norms and weights.
        return
    for rank in run["ranks"][layout]:
        found = {name: value for name, value in rank["differences"].items() if ".grads." in name}
        assert len(found) == 4
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("layout", ["1,1,1", *LAYOUTS])
def test_updated_weights_are_those_of_the_equations(run: dict[str, Any], layout: str) -> None:
    for rank in run["ranks"][layout]:
        found = {
            name: value for name, value in rank["differences"].items() if name.endswith(".weights")
        }
        assert set(found) == {"policy.weights", "value.weights", "ema.weights"}
        assert max(found.values()) < 1e-5, found


def test_the_iteration_exercises_every_term(run: dict[str, Any]) -> None:
    """Both clips are active, and the gradients are clipped."""
    metrics = run["ranks"]["1,1,1"][0]["metrics"]
    assert 0.05 < metrics["clip_fraction"] < 0.6
    assert 0.01 < metrics["value_clip_fraction"] < 0.9
    updates = run["expected"]["updates"]
    assert all(norm > 1.0 for update in updates for norm in update["norms"].values())
    assert metrics["updates"] == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_ratio_is_one_after_an_update(run: dict[str, Any], layout: str) -> None:
    assert all(rank["ratio_deviation"] < 1e-5 for rank in run["ranks"][layout])


def test_four_ranks_draw_by_data_rank(run: dict[str, Any]) -> None:
    """Noise and responses differ between data-parallel ranks only."""
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
    """Ranks with different KLs decide the same: one that continued alone would wait forever."""
    ranks = run["ranks"][layout]
    assert [rank["exceeds_target_kl"] for rank in ranks] == [False] * len(ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_function_is_called_once_in_a_model_parallel_group(
    run: dict[str, Any], layout: str
) -> None:
    scores = [rank["scores"] for rank in run["ranks"][layout]]
    assert all(other == scores[0] for other in scores)
    assert len(set(scores[0])) == int(layout.split(",")[2][0])  # the data-parallel size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_stay_with_their_prompts(run: dict[str, Any], layout: str) -> None:
    for rank in run["ranks"][layout]:
        assert rank["matches"] == [1.0] * (4 * int(layout.split(",")[2][0]))
