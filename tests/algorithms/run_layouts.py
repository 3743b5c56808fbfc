"""Trains SFT, RM and PPO-ptx: a few steps under several layouts for test_layouts.py, more for test_learning.py.

`one_process(WORKSPACE)` comes first; torchrun --nproc-per-node 4 run_layouts.py WORKSPACE goes on from it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from fastrlhf.commands import eval_reward
from fastrlhf.config import load_config, training_command
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import jobs, train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "debug"
STEPS = {"sft": 3, "rm": 3, "ppo": 2}
LAYOUTS = {
    "2x2": ["parallel.tensor=2", "parallel.pipeline=2"],
    # Every collective of four ranks on two cores costs milliseconds: few, large micro-batches.
    "4x1": ["parallel.tensor=4", "train.micro_batch_size=8"],
    "1x4": ["parallel.pipeline=4"],
    "2x1-sequence-dp2": ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_size=4"],
}
SHORT = {
    "sft": [],
    # The gradient of the head's bias is 0 but for rounding, which Adam blows up to steps when eps is below it.
    "rm": ["optimizer.eps=1e-3"],
    "ppo": ["generation.max_new_tokens=8"],
}
# SFT with micro-batches cut by tokens: data-parallel ranks get different numbers of them. "unpacked": the same batches.
MIXED = [
    "train.steps=3",
    "train.global_batch_size=15",
    "data.pretrain_fraction=0.3",
    "data.sequence_length=24",
]
BUDGET = [*MIXED, "train.max_tokens_per_micro_batch=50"]
PACKED = {"dp4-packed": BUDGET, "1x2-dp2-packed": ["parallel.pipeline=2", *BUDGET]}
# Serially, the same global batch in other micro-batches.
MICRO_BATCHES = {"serial": 4, "micro-1": 1, "micro-8": 8}
# The reward model alone: prompts once or with every response, micro-batches by number or by tokens, every layout.
GROUPS = "train.max_tokens_per_micro_batch=160"
REWARD_SERIAL = {
    "separate": ["model.shared_prompt=false"],
    "budget": [GROUPS],
    "separate-budget": ["model.shared_prompt=false", GROUPS],
}
REWARD_PARALLEL = {
    "dp4": [],
    "2x1-dp2-budget": ["parallel.tensor=2", GROUPS],
    "1x2-dp2-budget": ["parallel.pipeline=2", GROUPS],
    "2x2-sequence-budget": [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
        GROUPS,
    ],
}
JUDGED = {"separate", "dp4", "1x2-dp2-budget"}


def data_overrides(workspace: Path) -> dict[str, list[str]]:
    """The debug configurations' paths, moved into the workspace."""
    data, loaded = workspace / "data", workspace / "start"
    common = [f"data.tokenizer={data / 'tokenizer'}", "log.progress=false", "log.tensorboard=false"]
    return {
        "pretrain": [*common, f"data.train={data / 'text.jsonl'}"],
        "sft": [
            *common,
            f"data.train={data / 'demonstrations.jsonl'}",
            f"model.load={loaded / 'pretrain'}",
        ],
        "rm": [
            *common,
            f"data.train={data / 'rankings.jsonl'}",
            f"data.demonstrations={data / 'few.jsonl'}",
            f"model.load={loaded / 'sft'}",
        ],
        "ppo": [
            *common,
            f"data.prompts={data / 'prompts.jsonl'}",
            f"data.pretrain={data / 'text.jsonl'}",
            f"model.load={loaded / 'sft'}",
            f"ppo.reward_model={loaded / 'rm'}",
        ],
    }


def run(workspace: Path, command: str, name: str, extra: list[str]) -> None:
    paths = data_overrides(workspace)[command]
    output = f"output_dir={workspace / name / command}"
    config = load_config(CONFIGS / f"{command}.yaml", [*paths, output, *extra])
    row = training_command(command)
    job = train.train_job(row, config, jobs.job_builder(row))
    assert job is not None
    if os.environ.get("RANK", "0") == "0":
        (workspace / name / command / "statistics.json").write_text(
            json.dumps(job.algorithm.statistics())
        )
    meshes.finalize()  # every layout's groups keep threads, a thousand a rank in the end


def trained(workspace: Path, name: str, extra: list[str], commands: Iterable[str] = STEPS) -> None:
    for command in commands:
        length = [f"train.steps={STEPS[command]}", "checkpoint.save=false"]
        run(workspace, command, name, [*length, *SHORT[command], *extra])


def prepare(workspace: Path) -> None:
    """Data, and the short runs that the others start from."""
    sys.path.insert(0, str(CONFIGS))
    import make_data

    make_data.main(workspace / "data")
    for name, source, count in (("valid", "rankings", 41), ("few", "demonstrations", 21)):
        lines = (workspace / "data" / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (workspace / "data" / f"{name}.jsonl").write_text("".join(lines[:count]))
    for command in ("pretrain", "sft", "rm"):
        run(workspace, command, "start", ["train.steps=10"])


def learn(workspace: Path) -> None:
    """Long enough to see learning: SFT, then a reward model, then PPO from the one against the other."""
    run(workspace, "sft", "learn", ["train.steps=60", "optimizer.lr=3e-3"])
    run(workspace, "rm", "learn", ["train.steps=30"])
    models = [
        f"model.load={workspace / 'learn' / 'sft'}",
        f"ppo.reward_model={workspace / 'learn' / 'rm'}",
    ]
    size = ["train.steps=16", "ppo.batch_size=32", "ppo.minibatch_size=16", "checkpoint.save=false"]
    # The reward model's score alone, so that what PPO should find is known: higher scores.
    rates = [
        "optimizer.lr=1e-3",
        "ppo.value_lr=1e-3",
        "ppo.kl_coef=0.01",
        "ppo.no_stop_penalty=null",
    ]
    run(workspace, "ppo", "learn", [*models, *size, *rates])


def mixed(workspace: Path, name: str, extra: list[str]) -> None:
    """SFT on demonstrations and pretraining windows, so that lengths differ."""
    text = f"data.pretrain={workspace / 'data' / 'text.jsonl'}"
    run(workspace, "sft", name, [text, "checkpoint.save=false", *extra])


def reward_layouts(workspace: Path, layouts: dict[str, list[str]]) -> None:
    for name, layout in layouts.items():
        trained(workspace, name, layout, commands=("rm",))
        if name in JUDGED:
            judge(workspace, name, layout)


def judge(workspace: Path, name: str, layout: list[str]) -> None:
    """`fastrlhf eval rm` of the reward model that the others start from, on 41 prompts."""
    valid = workspace / "data" / "valid.jsonl"
    overrides = [
        f"data.valid={valid}",
        f"model.load={workspace / 'start' / 'rm'}",
        f"output_dir={workspace / name}",
    ]
    eval_reward.evaluate(
        load_config(CONFIGS / "rm.yaml", [*data_overrides(workspace)["rm"], *overrides, *layout])
    )
    meshes.finalize()


def whole_logits(workspace: Path) -> None:
    """SFT and PPO with the linear ops replaced by plain torch on whole logits."""
    sys.path.insert(0, str(ROOT))
    from bench.head_memory import materialising

    with materialising():
        trained(workspace, "whole-logits", [], commands=("sft", "ppo"))


def one_process(workspace: Path) -> None:
    """What all others start from, what they are compared with, and what needs one process alone."""
    prepare(workspace)
    learn(workspace)
    for name, size in MICRO_BATCHES.items():
        trained(workspace, name, [f"train.micro_batch_size={size}"])
    mixed(workspace, "unpacked", [*MIXED, "train.micro_batch_size=5"])
    mixed(workspace, "packed", BUDGET)
    reward_layouts(workspace, REWARD_SERIAL)
    whole_logits(workspace)


def four_ranks(workspace: Path) -> None:
    for name, layout in LAYOUTS.items():
        trained(workspace, name, layout)
    for name, layout in PACKED.items():
        mixed(workspace, name, layout)
    reward_layouts(workspace, REWARD_PARALLEL)


if __name__ == "__main__":
    four_ranks(Path(sys.argv[1]))
