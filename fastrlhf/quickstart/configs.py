"""The quickstart's settings: how much of everything, and the configuration of each training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.config import Config

# Run -> the run whose model it starts from.
STARTS = {"sft": "pretrain", "rm": "sft", "ppo": "sft", "ppo_ptx": "sft"}


@dataclass(frozen=True)
class Scale:
    """How much of everything: chosen so that two CPU cores finish in under 8 minutes."""

    vocab_size: int = 4096
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    context: int = 128
    window: int = 96
    """Tokens in a pretraining window."""
    new_tokens: int = 32
    """Longest response, in tokens."""
    pretrain_steps: int = 400
    sft_steps: int = 350
    ranking_prompts: int = 2400
    rm_epochs: float = 1.0
    ppo_steps: int = 40
    ppo_batch: int = 64
    eval_prompts: int = 256
    eval_windows: int = 512
    labelers: int = 5


def data_path(out: Path, name: str) -> Path:
    """The file of a data split."""
    return out / "data" / f"{name}.jsonl"


def stage_config(run: str, out: Path, scale: Scale, parallel: dict[str, int], seed: int) -> Config:
    """The configuration of run "pretrain", "sft", "rm", "ppo" or "ppo_ptx", under the folder `out`."""
    files, sections = _runs(out, scale)[run]
    shared: dict[str, Any] = {
        "model": {
            "family": "gpt",
            "num_layers": scale.layers,
            "hidden_size": scale.hidden,
            "num_heads": scale.heads,
            "max_positions": scale.context,
            "dtype": "fp32",
            "load": str(out / STARTS[run]) if run in STARTS else None,
        },
        "parallel": parallel,
        "data": {
            "tokenizer": str(out / "tokenizer"),
            "cache": str(out / "cache"),
            "max_prompt_tokens": scale.context - scale.new_tokens,
            "max_response_tokens": scale.new_tokens,
            "sequence_length": scale.window,
            **{key: str(data_path(out, name)) for key, name in files.items()},
            **sections.pop("data", {}),
        },
        "generation": {"max_new_tokens": scale.new_tokens},
        "output_dir": str(out / run),
    }
    sections["train"]["seed"] = seed
    return Config.model_validate({**shared, **sections})


def _runs(out: Path, scale: Scale) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Run -> (data key -> split, the sections that are its own)."""
    ppo = {
        "train": {
            "steps": scale.ppo_steps,
            "global_batch_size": scale.ppo_batch,
            "micro_batch_size": scale.ppo_batch // 4,
        },
        "optimizer": {"lr": 3e-4},
        "schedule": {"decay": "constant", "warmup_steps": 2},
    }
    options = {
        "reward_model": str(out / "rm"),
        "batch_size": scale.ppo_batch,
        "minibatch_size": scale.ppo_batch // 4,
        "ptx_per_episode": 1,
        "value_lr": 5e-4,
        "kl_coef": 0.05,
        "ema_decay": 0.9,
    }
    return {
        "pretrain": (
            {"train": "pretrain"},
            {
                "train": {"steps": scale.pretrain_steps, "global_batch_size": 32, "micro_batch_size": 32},
                "optimizer": {"lr": 2e-3, "weight_decay": 0.01},
                "schedule": {"warmup_steps": 20},
            },
        ),
        "sft": (
            {"train": "sft", "pretrain": "pretrain"},
            {
                # Pretraining text mixed in, as for InstructGPT's starting point of RL.
                "data": {"pretrain_fraction": 0.2},
                "train": {"steps": scale.sft_steps, "global_batch_size": 32, "micro_batch_size": 32},
                "optimizer": {"lr": 1e-3},
            },
        ),
        "rm": (
            {"train": "rankings_train", "valid": "rankings_valid", "demonstrations": "ppo"},
            {
                "train": {"epochs": scale.rm_epochs, "global_batch_size": 16, "micro_batch_size": 8},
                "optimizer": {"lr": 5e-4},
            },
        ),
        "ppo": ({"prompts": "ppo"}, {**ppo, "ppo": {**options, "gamma_ptx": 0.0}}),
        "ppo_ptx": ({"prompts": "ppo", "pretrain": "pretrain"}, {**ppo, "ppo": {**options, "gamma_ptx": 1.0}}),
    }
