"""Settings of the quickstart: its scales, and the configuration of each training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.config import Config

# Run -> the run whose model it starts from.
STARTS = {"sft": "pretrain", "rm": "sft", "ppo": "sft", "ppo_ptx": "sft"}


@dataclass(frozen=True)
class Scale:
    """Sizes, amounts of training and learning rates.

    The defaults ("full") are a tiny GPT from random weights that two CPU cores with AVX-512 train
    in under 5 minutes.
    """

    vocab_size: int = 4096
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    context: int = 128
    """Maximum tokens of prompt and response together; also the positions of the tiny GPT."""
    window: int = 96
    """Tokens in a pretraining window."""
    new_tokens: int = 32
    """Maximum tokens of a response."""
    batch: int = 32
    """Sequences in a step of pretraining and SFT."""
    pretrain_steps: int = 400
    pretrain_lr: float = 2e-3
    sft_steps: int = 350
    sft_lr: float = 1e-3
    pretrain_fraction: float = 0.2
    """Share of pretraining text mixed into SFT, as for the initial policy of InstructGPT's RL."""
    ranking_prompts: int = 2400
    rm_epochs: float = 1.0
    rm_batch: int = 16
    """Prompts per step, each with all its responses."""
    rm_micro_batch: int = 8
    rm_lr: float = 5e-4
    ppo_runs: tuple[str, ...] = ("ppo", "ppo_ptx")
    ppo_steps: int = 40
    ppo_batch: int = 64
    ppo_minibatches: int = 4
    ppo_lr: float = 3e-4
    value_lr: float = 5e-4
    kl_coef: float = 0.05
    gamma_ptx: float = 1.0
    ema_decay: float = 0.9
    eval_prompts: int = 256
    eval_windows: int = 512
    labelers: int = 5


SHORT = Scale(pretrain_steps=150, sft_steps=140, ppo_steps=18)
"""For slow processors: the same model and evaluation after about half of the work.

It keeps all rankings: with 1,800 the held-out accuracy of one seed in three fell to 0.70.
"""
SCALES = {"full": Scale(), "short": SHORT}
"""Scales of the tiny GPT; `scales.choose` selects one."""

PRETRAINED = Scale(
    context=72,
    window=48,
    new_tokens=24,
    batch=64,
    sft_steps=24,
    sft_lr=2e-4,
    pretrain_fraction=0.25,
    ranking_prompts=448,
    rm_micro_batch=16,
    rm_lr=2e-4,
    ppo_runs=("ppo_ptx",),
    ppo_steps=14,
    ppo_minibatches=2,
    ppo_lr=5e-5,
    value_lr=5e-5,
    gamma_ptx=0.2,
    ema_decay=0.8,
    eval_prompts=160,
    eval_windows=96,
)
"""For a pretrained model of a hundred million parameters: half an hour on two CPU cores.

Learning rates are a tenth of the tiny model's or less, so that the model keeps what it has learned.
"""


def model_section(scale: Scale) -> dict[str, Any]:
    """Return the `model` section of the tiny GPT."""
    return {
        "family": "gpt",
        "num_layers": scale.layers,
        "hidden_size": scale.hidden,
        "num_heads": scale.heads,
        "max_positions": scale.context,
        "dtype": "fp32",
    }


def data_path(out: Path, name: str) -> Path:
    """Return the file of a data split."""
    return out / "data" / f"{name}.jsonl"


def stage_config(
    run: str, out: Path, scale: Scale, model: dict[str, Any], parallel: dict[str, int], seed: int
) -> Config:
    """Return the configuration of a run in the folder `out`.

    `run` is "pretrain", "sft", "rm", "ppo" or "ppo_ptx".
    """
    files, sections = _runs(out, scale)[run]
    shared: dict[str, Any] = {
        "model": {**model, "load": str(out / STARTS[run]) if run in STARTS else None},
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
    """Return for each run (data key -> split, the sections that differ from other runs)."""
    batch = {"global_batch_size": scale.batch, "micro_batch_size": scale.batch}
    return {
        "pretrain": (
            {"train": "pretrain"},
            {
                "train": {"steps": scale.pretrain_steps, **batch},
                "optimizer": {"lr": scale.pretrain_lr, "weight_decay": 0.01},
                "schedule": {"warmup_steps": 20},
            },
        ),
        "sft": (
            {"train": "sft", "pretrain": "pretrain"},
            {
                "data": {"pretrain_fraction": scale.pretrain_fraction},
                "train": {"steps": scale.sft_steps, **batch},
                "optimizer": {"lr": scale.sft_lr},
            },
        ),
        "rm": (
            {"train": "rankings_train", "valid": "rankings_valid", "demonstrations": "centre"},
            {
                "train": {
                    "epochs": scale.rm_epochs,
                    "global_batch_size": scale.rm_batch,
                    "micro_batch_size": scale.rm_micro_batch,
                },
                "optimizer": {"lr": scale.rm_lr},
            },
        ),
        "ppo": ({"prompts": "ppo"}, _ppo_sections(out, scale, 0.0)),
        "ppo_ptx": (
            {"prompts": "ppo", "pretrain": "pretrain"},
            _ppo_sections(out, scale, scale.gamma_ptx),
        ),
    }


def _ppo_sections(out: Path, scale: Scale, gamma_ptx: float) -> dict[str, Any]:
    minibatch = scale.ppo_batch // scale.ppo_minibatches
    return {
        "train": {
            "steps": scale.ppo_steps,
            "global_batch_size": scale.ppo_batch,
            "micro_batch_size": minibatch,
        },
        "optimizer": {"lr": scale.ppo_lr},
        "schedule": {"decay": "constant", "warmup_steps": 2},
        "ppo": {
            "reward_model": str(out / "rm"),
            "batch_size": scale.ppo_batch,
            "minibatch_size": minibatch,
            "ptx_per_episode": 1,
            "value_lr": scale.value_lr,
            "kl_coef": scale.kl_coef,
            "ema_decay": scale.ema_decay,
            "gamma_ptx": gamma_ptx,
        },
    }
