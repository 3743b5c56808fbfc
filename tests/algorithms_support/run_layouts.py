"""Runs of SFT, RM and PPO-ptx: a few steps under each layout, and longer ones that learn.

test_layouts.py, test_rm_layouts.py, test_learning.py and test_full_logits.py read their metrics.
`one_process(WORKSPACE)` comes first; as a script on four ranks, `run_layouts.py WORKSPACE`
continues.
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
    # On two cores a collective of four ranks takes milliseconds: few, large micro-batches.
    "4x1": ["parallel.tensor=4", "train.micro_batch_size=8"],
    "1x4": ["parallel.pipeline=4"],
    "2x1-sequence-dp2": ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_size=4"],
}
SHORT = {
    "sft": [],
    # The gradient of the head's bias is 0 up to rounding, which Adam scales to full steps if eps is
    # smaller.
    "rm": ["optimizer.eps=1e-3"],
    "ppo": ["generation.max_new_tokens=8", "train.eval_interval=1"],
}
# SFT with a token budget: data-parallel ranks get different numbers of micro-batches. "unpacked"
# has the same global batches.
MIXED = [
    "train.steps=3",
    "train.global_batch_size=15",
    "data.pretrain_fraction=0.3",
    "data.sequence_length=24",
]
BUDGET = [*MIXED, "train.max_tokens_per_micro_batch=50"]
PACKED = {"dp4-packed": BUDGET, "1x2-dp2-packed": ["parallel.pipeline=2", *BUDGET]}
# The same rows; pretraining tokens have the weight that makes 0.3 their share of the loss.
WEIGHTED = "data.pretrain_fraction_of=loss"
# In one process: the same global batch in micro-batches of other sizes.
MICRO_BATCHES = {"serial": 4, "micro-1": 1, "micro-8": 8}
# The reward model alone: shared or repeated prompts, micro-batches by number or by tokens, all
# layouts.
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
PADDED = 640
"""Rows of a vocabulary that is padded to about twice the tokenizer's size."""
EVALUATED = {"separate", "dp4", "1x2-dp2-budget"}


def data_overrides(workspace: Path) -> dict[str, list[str]]:
    """Return the overrides that move the paths of the debug configurations into the workspace."""
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
            f"data.valid={data / 'held_out.jsonl'}",
            f"data.pretrain={data / 'text.jsonl'}",
            f"model.load={loaded / 'sft'}",
            f"ppo.reward_model={loaded / 'rm'}",
        ],
    }


def run(workspace: Path, command: str, name: str, extra: list[str]) -> None:
    """Run a training command into workspace/name/command, and write its statistics.json."""
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
    meshes.finalize()  # the groups of each layout keep threads, in the end a thousand per rank


def run_short(
    workspace: Path, name: str, extra: list[str], commands: Iterable[str] = STEPS
) -> None:
    """Run a few steps of each of `commands` without checkpoints."""
    for command in commands:
        length = [f"train.steps={STEPS[command]}", "checkpoint.save=false"]
        run(workspace, command, name, [*length, *SHORT[command], *extra])


def prepare(workspace: Path) -> None:
    """Make the data and the models that the other runs start from."""
    from configs.debug import make_data  # the root of the repository is on pytest's path

    make_data.main(workspace / "data")
    # 5 held-out prompts: two data-parallel ranks cannot share them evenly.
    short = (("valid", "rankings", 41), ("few", "demonstrations", 21), ("held_out", "prompts", 5))
    for name, source, count in short:
        lines = (workspace / "data" / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (workspace / "data" / f"{name}.jsonl").write_text("".join(lines[:count]))
    for command in ("pretrain", "sft", "rm"):
        run(workspace, command, "start", ["train.steps=10"])
    run(workspace, "pretrain", "start-padded", ["train.steps=2", f"model.vocab_size={PADDED}"])


def learn(workspace: Path) -> None:
    """Run SFT, a reward model, and PPO from the one with the other, long enough to learn."""
    run(workspace, "sft", "learn", ["train.steps=60", "optimizer.lr=3e-3"])
    run(workspace, "rm", "learn", ["train.steps=30"])
    models = [
        f"model.load={workspace / 'learn' / 'sft'}",
        f"ppo.reward_model={workspace / 'learn' / 'rm'}",
    ]
    size = ["train.steps=16", "ppo.batch_size=32", "ppo.minibatch_size=16", "checkpoint.save=false"]
    # The reward model's score with almost no KL term, so PPO should find higher scores.
    rates = [
        "optimizer.lr=1e-3",
        "ppo.value_lr=1e-3",
        "ppo.kl_coef=0.01",
        "ppo.no_stop_penalty=null",
    ]
    run(workspace, "ppo", "learn", [*models, *size, *rates])


def run_padded(workspace: Path, name: str, extra: list[str]) -> None:
    """Run PPO with a policy whose vocabulary has rows that are no token; the scorers have none."""
    start = workspace / "start-padded" / "pretrain"
    padded = [f"model.load={start}", f"model.vocab_size={PADDED}"]
    run_short(workspace, name, [*padded, *extra], commands=("ppo",))


def run_mixed(workspace: Path, name: str, extra: list[str]) -> None:
    """Run SFT on demonstrations and pretraining windows, whose lengths differ."""
    text = f"data.pretrain={workspace / 'data' / 'text.jsonl'}"
    run(workspace, "sft", name, [text, "checkpoint.save=false", *extra])


def run_reward_layouts(workspace: Path, layouts: dict[str, list[str]]) -> None:
    """Run a few steps of the reward model under each of `layouts`."""
    for name, layout in layouts.items():
        run_short(workspace, name, layout, commands=("rm",))
        if name in EVALUATED:
            evaluate_reward(workspace, name, layout)


def evaluate_reward(workspace: Path, name: str, layout: list[str]) -> None:
    """Run `fastrlhf eval rm` on the reward model that all others start from, with 41 prompts."""
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


def run_full_logits(workspace: Path) -> None:
    """Run SFT and PPO with the linear ops replaced by plain torch on materialised logits."""
    from bench.head_memory import materialising  # the repository's root is on pytest's path

    with materialising():
        run_short(workspace, "full-logits", [], commands=("sft", "ppo"))


def one_process(workspace: Path) -> None:
    """Run what the other runs start from or are compared with, and what needs only one process."""
    prepare(workspace)
    learn(workspace)
    for name, size in MICRO_BATCHES.items():
        run_short(workspace, name, [f"train.micro_batch_size={size}"])
    run_mixed(workspace, "unpacked", [*MIXED, "train.micro_batch_size=5"])
    run_mixed(workspace, "packed", BUDGET)
    run_mixed(workspace, "weighted", [*MIXED, WEIGHTED, "train.micro_batch_size=5"])
    run_padded(workspace, "padded", [])
    run_reward_layouts(workspace, REWARD_SERIAL)
    run_full_logits(workspace)


def four_ranks(workspace: Path) -> None:
    """Run all layouts of four ranks."""
    for name, layout in LAYOUTS.items():
        run_short(workspace, name, layout)
    for name, layout in PACKED.items():
        run_mixed(workspace, name, layout)
    run_mixed(workspace, "2x1-dp2-weighted", ["parallel.tensor=2", WEIGHTED, *BUDGET])
    run_padded(workspace, "2x2-padded", LAYOUTS["2x2"])
    run_reward_layouts(workspace, REWARD_PARALLEL)


if __name__ == "__main__":
    four_ranks(Path(sys.argv[1]))
