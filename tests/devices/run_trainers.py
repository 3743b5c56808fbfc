"""Runs of every trainer on the simulated GPU, for test_devices.py.

torchrun --nproc-per-node 2 run_trainers.py WORKSPACE
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import stand_in

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "debug"
BF16 = "model.dtype=bf16"
# (name, command, overrides), in order: later runs start from models that earlier ones saved.
TENSOR = ["parallel.tensor=2", "parallel.sequence=true", BF16]
RUNS = (
    # Data-parallel: the distributed optimizer, with communication overlapped with the backward.
    ("pretrain", "pretrain", [BF16]),
    ("sft", "sft", [*TENSOR, "model.recompute=full"]),
    ("sft-micro-1", "sft", [*TENSOR, "train.micro_batch_size=1"]),
    ("rm", "rm", ["parallel.pipeline=2", "model.dtype=fp16", "model.residual_dropout=0.1"]),
    ("ppo", "ppo", [BF16, "ppo.offload=true", "train.max_tokens_per_micro_batch=256"]),
    ("ppo-tensor", "ppo", ["parallel.tensor=2"]),
)


def overrides(workspace: Path, command: str) -> list[str]:
    """Return overrides that move the debug configurations' paths into the workspace."""
    data = workspace / "data"
    sources = {
        "pretrain": [f"data.train={data / 'text.jsonl'}"],
        "sft": [
            f"data.train={data / 'demonstrations.jsonl'}",
            f"model.load={workspace / 'pretrain'}",
        ],
        "rm": [
            f"data.train={data / 'rankings.jsonl'}",
            f"data.demonstrations={data / 'demonstrations.jsonl'}",
            f"model.load={workspace / 'sft'}",
        ],
        "ppo": [
            f"data.prompts={data / 'prompts.jsonl'}",
            f"data.pretrain={data / 'text.jsonl'}",
            f"model.load={workspace / 'sft'}",
            f"ppo.reward_model={workspace / 'rm'}",
        ],
    }
    small = [
        "train.steps=2",
        "log.progress=false",
        "log.tensorboard=false",
        f"data.tokenizer={data / 'tokenizer'}",
    ]
    return [*small, *sources[command]]


def main(workspace: Path) -> None:
    stand_in.start()
    from fastrlhf.config import load_config
    from fastrlhf.parallel import mesh as meshes
    from fastrlhf.run import train

    first = os.environ["RANK"] == "0"
    if first:
        runpy.run_path(str(CONFIGS / "make_data.py"))["main"](workspace / "data")
    for name, command, extra in RUNS:
        stand_in.WAITS.clear()
        options = [*overrides(workspace, command), f"output_dir={workspace / name}", *extra]
        config = load_config(CONFIGS / f"{command}.yaml", options)
        train.train(command, config)  # type: ignore[arg-type]
        meshes.finalize()
        if first:
            (workspace / f"{name}.waits.json").write_text(json.dumps(stand_in.WAITS, indent=1))


if __name__ == "__main__":
    from fastrlhf.parallel.exit import clean_exit

    with clean_exit():
        main(Path(sys.argv[1]))
