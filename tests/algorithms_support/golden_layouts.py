"""The PPO iteration of golden_ppo.py as the trainer runs it, under any layout.

test_ppo_golden.py compares the two. As a script on four ranks, `golden_layouts.py FOLDER` reads
FOLDER/golden.pt and writes FOLDER/<layout>.<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from algorithms_support import golden_ppo as golden
from algorithms_support import tiny_ppo

from fastrlhf.algorithms.ppo import PPO
from fastrlhf.algorithms.protocols import Learner
from fastrlhf.algorithms.rollouts import gather
from fastrlhf.config import Config
from fastrlhf.data.batches import TokenizedPrompt
from fastrlhf.generation.engine import Generated
from fastrlhf.models.gpt import global_names
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel import rendezvous

B = 16
SETTINGS: dict[str, Any] = {
    "generation": {"max_new_tokens": 10, "slots": 8, "temperature": 0.8},
    "ppo": {"ema_decay": 0.9, "value_clip": 0.05},
}
# Name -> sections of the configuration. The layouts of two ranks run at the same time.
PAIRS = {"2,1,1": {"parallel": {"tensor": 2}}, "1,2,1": {"parallel": {"pipeline": 2}}}
FULL_WORLD = {
    "2,1,2": {"parallel": {"tensor": 2}},
    "2,2,1": {"parallel": {"tensor": 2, "pipeline": 2}},
    "2,1,2-sequence": {
        "parallel": {"tensor": 2, "sequence": True},
        "optimizer": {"distributed": False},
    },
    # Ranks have different numbers of episodes and micro-batches; the gradient buffers hold full
    # sums.
    "2,1,2-budget": {
        "parallel": {"tensor": 2},
        "optimizer": {"distributed": False},
        "train": {"max_tokens_per_micro_batch": 45},
    },
}


def settings(folder: Path, extra: dict[str, Any]) -> Config:
    """Return the configuration of the golden run, with `extra` sections."""
    return tiny_ppo.config(folder, **SETTINGS, **extra)


def build(folder: Path, extra: dict[str, Any]) -> tuple[PPO, list[list[TokenizedPrompt]]]:
    """Return the PPO object and the prompts of its first iteration.

    The reference and the reward model are scaled, so that they differ from the policy and the
    value function.
    """
    chosen = settings(folder, extra)
    ppo, prompts = tiny_ppo.build(tiny_ppo.mesh_of(chosen), chosen)
    with torch.no_grad():
        for model, factor in ((ppo.reference, 1.1), (ppo.rewards.models[0][1], 0.9)):
            for weights in model.parameters():
                weights.mul_(factor)
    return ppo, prompts


def iteration(ppo: PPO, episodes: list[golden.Episode]) -> dict[str, Any]:
    """Score and learn from given episodes.

    Returns the metrics, the gradients before each step, and the weights after the iteration.
    """
    per_rank = B // ppo.mesh.data_size
    own = episodes[ppo.mesh.data_rank * per_rank :][:per_rank]
    made = [(e.prompt, Generated(i, e.response, e.logprobs, e.stopped)) for i, e in enumerate(own)]
    grads: dict[str, list[Any]] = {"policy": [], "value": []}
    for name, learner in ppo.learners().items():
        _record(learner, grads[name])
    metrics = ppo.learn(ppo.score(gather(ppo.mesh, made)))
    after = {name: dict(global_names(model)) for name, model in ppo.models().items()}
    return {"metrics": metrics, "grads": grads, "after": after}


def _record(learner: Learner, into: list[dict[str, torch.Tensor]]) -> None:
    """Make `learner.step` append the gradients to `into` first."""
    step = learner.step

    def recorded() -> dict[str, float]:
        into.append({name: p.main_grad.clone() for name, p in global_names(learner.model)})
        return step()

    learner.step = recorded  # type: ignore[method-assign]


def differences(
    got: dict[str, Any], expected: dict[str, Any], mesh: meshes.Mesh
) -> dict[str, float]:
    """Return the largest differences: absolute for weights, relative to the maximum for gradients.

    The maximum is that of the absolute gradients of a model.
    """
    found: dict[str, float] = {}
    for model, weights in got["after"].items():
        found[f"{model}.weights"] = max(
            _difference(p, p, expected["after"][model][name], mesh) for name, p in weights.items()
        )
    for model, updates in got["grads"].items():
        for i, (grads, update) in enumerate(zip(updates, expected["updates"], strict=True)):
            golden_grads, parameters = update["grads"][model], got["after"][model]
            scale = max(g.abs().max().item() for g in golden_grads.values())
            found[f"{model}.grads.{i}"] = max(
                _difference(parameters[name], g, golden_grads[name], mesh) / scale
                for name, g in grads.items()
            )
    return found


def _difference(
    parameter: Any, shard: torch.Tensor, full: torch.Tensor, mesh: meshes.Mesh
) -> float:
    """Return the largest absolute difference between this rank's shard and its part of `full`.

    Vocabularies are padded with zeros to a multiple of the shards' size.
    """
    if getattr(parameter, "tensor_model_parallel", False):
        dim = parameter.partition_dim
        size = shard.shape[dim] * mesh.tensor_size
        if size > full.shape[dim]:
            full = torch.cat([full, full.new_zeros(size - full.shape[dim], *full.shape[1:])])
        full = full.narrow(dim, mesh.tensor_rank * shard.shape[dim], shard.shape[dim])
    return (shard.detach().double() - full).abs().max().item()


def check(
    folder: Path, name: str, extra: dict[str, Any], stored: dict[str, Any], rank: int
) -> None:
    """Run the golden iteration and the other measurements on a layout; write its JSON file."""
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
        "differences": differences(got, stored["expected"], ppo.mesh),
        "draws": draws,
    }
    # Rollouts of the trainer itself, on the updated weights.
    result["ratio_deviation"] = ppo.step(prompts)["ratio_deviation"]
    ppo.config = ppo.config.model_copy(update={"target_kl": 0.5})
    # As if the ranks had measured different KLs.
    result["exceeds_target_kl"] = ppo._exceeds_target_kl(0.4 + 0.2 * ppo.mesh.rank)
    # The scores of a reward function that returns the process id show which rank called it.
    ppo.rewards.models, ppo.rewards.function = (
        (),
        lambda prompts, responses: [float(os.getpid())] * len(responses),
    )
    result["scores"] = ppo.score(gather(ppo.mesh, ppo.sample([[5, 6, 7]] * 4))).scores.tolist()
    result["matches"] = matches(ppo)
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    meshes.finalize()


def matches(ppo: PPO) -> list[float]:
    """Return the scores of four prompts a rank by a function that compares prompt and record."""
    first = 20 + 4 * ppo.mesh.data_rank
    own = [TokenizedPrompt([5, 6, token], {"answer": token}) for token in range(first, first + 4)]
    texts = {token: ppo.tokenizer.decode([5, 6, token]) for token in range(20, 40)}

    def reward(prompts: list[str], responses: list[str], records: list[Any]) -> list[float]:
        pairs = zip(prompts, records, strict=True)
        return [float(prompt == texts[record["answer"]]) for prompt, record in pairs]

    ppo.rewards.function = reward
    episodes = ppo.sample([prompt.tokens for prompt in own])
    rollouts = ppo.score(gather(ppo.mesh, episodes, ppo.rewards.records_of(own)))
    return rollouts.scores.tolist()


def main(folder: Path) -> None:
    """Check the layouts of two ranks, then those of four."""
    stored = torch.load(folder / "golden.pt")
    rank = int(os.environ["RANK"])
    pair = rank // 2
    full_world = {"RANK": str(rank), "WORLD_SIZE": "4"}
    os.environ |= {"RANK": str(rank % 2), "WORLD_SIZE": "2"}
    # Worlds that share a store need different names in it.
    connect = rendezvous._torchrun_store

    def connect_pair(timeout_s: float) -> tuple[dist.Store, int, int]:
        store, rank_of_pair, ranks = connect(timeout_s)
        return dist.PrefixStore(f"pair{pair}", store), rank_of_pair, ranks

    rendezvous._torchrun_store = connect_pair
    name = list(PAIRS)[pair]
    check(folder, name, PAIRS[name], stored, rank)
    os.environ |= full_world
    rendezvous._torchrun_store = connect
    rendezvous.leave()
    for name, extra in FULL_WORLD.items():
        check(folder, name, extra, stored, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
