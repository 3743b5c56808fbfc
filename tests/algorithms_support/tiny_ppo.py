"""A PPO run that is small enough for a test: data, a random reward model, and the PPO object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastrlhf.algorithms.ppo import PPO
from fastrlhf.checkpoint.model_folder import save_model
from fastrlhf.config import Config, ModelConfig
from fastrlhf.data.batches import TokenizedPrompt
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.generation.engine import Generated
from fastrlhf.models.gpt import build_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.run import builder, jobs

# Large initial weights, so that no term of an equation is too small to matter.
MODEL: dict[str, Any] = {
    "family": "gpt",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
    "init_std": 0.15,
    "dtype": "fp32",
}


def make_data(folder: Path) -> None:
    """Write the data and the tokenizer of the debug configurations to folder/data."""
    from configs.debug import make_data as debug  # the root of the repository is on pytest's path

    debug.main(folder / "data")


def save_reward_model(
    folder: Path, mesh: Mesh, name: str = "rm", seed: int = 7, **model: Any
) -> None:
    """Save a random reward model to folder/name; `model` are fields of its configuration."""
    vocab_size = len(load_tokenizer(folder / "data" / "tokenizer"))
    reward = build_model(ModelConfig(**MODEL, **model), mesh, vocab_size, head="scalar", seed=seed)
    save_model(folder / name, reward, tokenizer=str(folder / "data" / "tokenizer"))


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    """Return a configuration: 16 episodes an iteration in minibatches of 8, with ptx.

    `sections` are merged into it.
    """
    data = folder / "data"
    base: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "parallel": {},
        "data": {
            "tokenizer": str(data / "tokenizer"),
            "prompts": str(data / "prompts.jsonl"),
            "pretrain": str(data / "text.jsonl"),
            "cache": str(folder / "cache"),
            "sequence_length": 24,
            "max_prompt_tokens": 32,
            "max_response_tokens": 16,
        },
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "schedule": {"decay": "constant"},
        "train": {"steps": 2, "micro_batch_size": 4, "seed": 11},
        "ppo": {
            "reward_model": str(folder / "rm"),
            "batch_size": 16,
            "minibatch_size": 8,
            "gamma_ptx": 2.0,
            "ptx_per_episode": 1,
            "kl_coef": 0.1,
            "value_lr": 1e-3,
        },
        "generation": {"max_new_tokens": 10, "slots": 8},
        "log": {"progress": False, "tensorboard": False},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return Config.model_validate({**base, "output_dir": str(folder / "out")})


def build(mesh: Mesh, chosen: Config) -> tuple[PPO, list[list[TokenizedPrompt]]]:
    """Return the PPO object of a run and this rank's prompts of the first iteration."""
    job = jobs.ppo_job(builder.RunBuilder(chosen, mesh))
    return job.algorithm, next(iter(job.batches))


def mesh_of(chosen: Config) -> Mesh:
    """Initialize the mesh of a configuration."""
    return meshes.initialize(chosen.parallel, chosen.train.seed)


def episodes(count: int, vocab_size: int, seed: int = 0) -> list[tuple[list[int], Generated]]:
    """Return random episodes of different lengths, every third without a stop token."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    pairs = []
    for i in range(count):
        prompt = torch.randint(1, vocab_size, (number(3, 12),), generator=generator).tolist()
        response = torch.randint(1, vocab_size, (number(2, 11),), generator=generator).tolist()
        logprobs = (torch.rand(len(response), generator=generator) - 6.0).tolist()
        pairs.append((prompt, Generated(i, response, logprobs, i % 3 > 0)))
    return pairs
