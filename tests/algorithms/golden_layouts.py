"""The trainer's side of the golden iteration, under any layout; test_ppo_golden.py holds it to golden_ppo.py.

torchrun --nproc-per-node 4 golden_layouts.py FOLDER reads FOLDER/golden.pt and writes FOLDER/<layout>.<rank>.json.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import golden_ppo as golden
import tiny_ppo
import torch

from fastrlhf.algorithms.rollouts import gather
from fastrlhf.generation.engine import Generated
from fastrlhf.models.gpt import global_names
from fastrlhf.parallel import mesh as meshes

B = 16
SETTINGS: dict[str, Any] = {
    "generation": {"max_new_tokens": 10, "slots": 8, "temperature": 0.8},
    "ppo": {"ema_decay": 0.9, "value_clip": 0.05},
}
# name -> (ranks, configuration); two worlds of two ranks run side by side.
PAIRS = {"2,1,1": {"parallel": {"tensor": 2}}, "1,2,1": {"parallel": {"pipeline": 2}}}
WHOLE = {
    "2,1,2": {"parallel": {"tensor": 2}},
    "2,2,1": {"parallel": {"tensor": 2, "pipeline": 2}},
    "2,1,2-sequence": {
        "parallel": {"tensor": 2, "sequence": True},
        "optimizer": {"distributed": False},
    },
    # Shares of unequal numbers of episodes and micro-batches; the gradient buffers hold whole sums.
    "2,1,2-budget": {
        "parallel": {"tensor": 2},
        "optimizer": {"distributed": False},
        "train": {"max_tokens_per_micro_batch": 45},
    },
}


def settings(folder: Path, extra: dict[str, Any]) -> Any:
    return tiny_ppo.config(folder, **SETTINGS, **extra)


def build(folder: Path, extra: dict[str, Any]) -> Any:
    """The PPO object, with a reference and a reward model that are not the policy's and the value function's twins."""
    chosen = settings(folder, extra)
    ppo, prompts = tiny_ppo.build(tiny_ppo.mesh_of(chosen), chosen)
    with torch.no_grad():
        for stage, factor in ((ppo.reference, 1.1), (ppo.rewards.models[0][1], 0.9)):
            for weights in stage.parameters():
                weights.mul_(factor)
    return ppo, prompts


def iteration(ppo: Any, episodes: list[golden.Episode]) -> dict[str, Any]:
    """Scores and learns from given episodes; returns metrics, gradients before each step and weights after it."""
    per_rank = B // ppo.mesh.data_size
    own = episodes[ppo.mesh.data_rank * per_rank :][:per_rank]
    made = [(e.prompt, Generated(i, e.response, e.logprobs, e.stopped)) for i, e in enumerate(own)]
    grads: dict[str, list[Any]] = {"policy": [], "value": []}
    for name, learner in ppo.learners().items():
        _record(learner, grads[name])
    metrics = ppo.learn(ppo.score(gather(ppo.mesh, made)))
    after = {name: dict(global_names(stage)) for name, stage in ppo.models().items()}
    return {"metrics": metrics, "grads": grads, "after": after}


def _record(learner: Any, into: list[Any]) -> None:
    step = learner.step

    def recorded() -> Any:
        into.append({name: p.main_grad.clone() for name, p in global_names(learner.model)})
        return step()

    learner.step = recorded


def differences(
    got: dict[str, Any], expected: dict[str, Any], mesh: meshes.Mesh
) -> dict[str, float]:
    """Largest differences: weights absolute, gradients relative to the largest entry of their model."""
    found: dict[str, float] = {}
    for model, weights in got["after"].items():
        apart = [_apart(p, p, expected["after"][model][name], mesh) for name, p in weights.items()]
        found[f"{model}.weights"] = max(apart)
    for model, updates in got["grads"].items():
        for i, (grads, update) in enumerate(zip(updates, expected["updates"], strict=True)):
            wanted = update["grads"][model]
            scale = max(g.abs().max().item() for g in wanted.values())
            named = got["after"][model]
            apart = [
                _apart(named[name], g, wanted[name], mesh) / scale for name, g in grads.items()
            ]
            found[f"{model}.grads.{i}"] = max(apart)
    return found


def _apart(parameter: Any, mine: torch.Tensor, whole: torch.Tensor, mesh: meshes.Mesh) -> float:
    """Largest difference of this rank's shard; vocabularies are padded with zeros to the shards' size."""
    dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else 0
    if getattr(parameter, "tensor_model_parallel", False):
        size = mine.shape[dim] * mesh.tensor_size
        if size > whole.shape[dim]:
            whole = torch.cat([whole, whole.new_zeros(size - whole.shape[dim], *whole.shape[1:])])
        whole = whole.narrow(dim, mesh.tensor_rank * mine.shape[dim], mine.shape[dim])
    return (mine.detach().double() - whole).abs().max().item()


def check(
    folder: Path, name: str, extra: dict[str, Any], stored: dict[str, Any], rank: int
) -> None:
    ppo, prompts = build(folder, extra)
    draws = {
        "noise": torch.rand(4).tolist(),
        "data_rank": ppo.mesh.data_rank,
        "tensor_rank": ppo.mesh.tensor_rank,
    }
    draws["sampled"] = [answer.tokens for _, answer in ppo.sample([[5, 6, 7]] * 4)]
    got = iteration(ppo, [golden.Episode(**e) for e in stored["episodes"]])
    result = {
        "metrics": got["metrics"],
        "apart": differences(got, stored["expected"], ppo.mesh),
        "draws": draws,
    }
    result["ratio_deviation"] = ppo.step(prompts)[
        "ratio_deviation"
    ]  # its own rollouts, on the updated weights
    ppo.config = ppo.config.model_copy(update={"target_kl": 0.5})
    result["too_far"] = ppo._too_far(
        0.4 + 0.2 * ppo.mesh.rank
    )  # as if the ranks had measured something else
    # A reward function that no two ranks agree on: who called it?
    ppo.rewards.models, ppo.rewards.function = (
        (),
        lambda prompts, responses: [float(os.getpid())] * len(responses),
    )
    result["scores"] = ppo.score(gather(ppo.mesh, ppo.sample([[5, 6, 7]] * 4))).scores.tolist()
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    meshes.finalize()


def main(folder: Path) -> None:
    stored = torch.load(folder / "golden.pt")
    rank = int(os.environ["RANK"])
    pair = rank // 2
    whole = {"RANK": str(rank), "WORLD_SIZE": "4"}
    os.environ |= {"RANK": str(rank % 2), "WORLD_SIZE": "2"}
    meshes._joined = itertools.count(
        100 * (pair + 1)
    )  # worlds that share torchrun's store need names of their own
    name = list(PAIRS)[pair]
    check(folder, name, PAIRS[name], stored, rank)
    os.environ |= whole
    meshes._rendezvous.cache_clear()
    meshes._joined = itertools.count(1000)
    for name, extra in WHOLE.items():
        check(folder, name, extra, stored, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
