"""Short PPO runs of two ranks that are killed many times; test_faults.py reads their files.

python run_faults.py FOLDER, with the debug configurations' data in FOLDER/data

Everything is imported once, and the ranks of each attempt are forked from here, before any thread
or process group exists: an attempt takes about a second, with torchrun six.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ranks import fork, meet

from fastrlhf.algorithms.ppo import PPO
from fastrlhf.checkpoint.model_folder import save_model
from fastrlhf.config import Config, ModelConfig
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.evaluation import report  # noqa: F401
from fastrlhf.models.gpt import build_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import train

LAYOUTS = {"dp2": {}, "tp2": {"tensor": 2}}
KILLS, STEPS, RANKS = 15, 20, 2
MODEL: dict[str, Any] = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "ffn_size": 32,
    "max_positions": 64,
    "init_std": 0.15,
    "dtype": "bf16",
}


def make_config(folder: Path, layout: str, out: str, **train: Any) -> Config:
    """Return the configuration of a run with the output folder FOLDER/OUT."""
    data = folder / "data"
    return Config.model_validate(
        {
            "model": MODEL,
            "parallel": {**LAYOUTS[layout], "timeout_s": 1200},
            "data": {
                "tokenizer": str(data / "tokenizer"),
                "prompts": str(data / "prompts.jsonl"),
                "pretrain": str(data / "text.jsonl"),
                "cache": str(folder / "cache"),
                "sequence_length": 16,
                "max_prompt_tokens": 32,
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 2},
            "train": {"steps": STEPS, "micro_batch_size": 1, "seed": 5, **train},
            "ppo": {
                "reward_model": str(folder / "rm"),
                "batch_size": 4,
                "minibatch_size": 2,
                "gamma_ptx": 1.0,
                "ptx_per_episode": 1,
                "kl_coef": 0.1,
                "adaptive_kl_target": 1.0,
                "adaptive_kl_horizon": 50,
                "value_lr": 1e-3,
            },
            "generation": {"max_new_tokens": 4, "slots": 2},
            # One layout writes in the background, the other between steps.
            "checkpoint": {"interval": 1, "asynchronous": layout == "dp2"},
            "log": {"progress": False, "tensorboard": False, "samples": 4},
            "output_dir": str(folder / out),
        }
    )


def prepare(folder: Path) -> None:
    """Save a random reward model to FOLDER/rm."""
    config = make_config(folder, "dp2", "prepare")
    mesh = meshes.initialize(config.parallel, seed=0)
    vocab_size = len(load_tokenizer(folder / "data" / "tokenizer"))
    model = build_model(ModelConfig(**MODEL), mesh, vocab_size, head="scalar", seed=7)
    save_model(folder / "rm", model, tokenizer="")


def start(config: Config, log: Path, before: Callable[[], None] = lambda: None) -> list[int]:
    """Fork the ranks of one attempt, which call `before` and train; return their process ids."""

    def work(rank: int) -> None:
        meet(listening, rank, RANKS)
        before()
        train.train("ppo", config)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        return [fork(partial(work, rank), {}, log) for rank in range(RANKS)]


def wait(ranks: list[int]) -> list[int]:
    """Wait for the ranks to exit; return their statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def until(happened: Callable[[], bool], ranks: list[int], limit: float = 1200.0) -> bool:
    """Wait for an event; return False if the first rank exits first, or after `limit` s."""
    end = time.monotonic() + limit
    while not happened():
        # Without reaping, because `wait` collects the statuses.
        gone = os.waitid(os.P_PID, ranks[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if gone is not None or time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


class Progress:
    """Observes the files of an attempt: steps recorded, and whether it is writing a checkpoint."""

    def __init__(self, out: Path) -> None:
        self.metrics, self.checkpoints = out / "metrics.jsonl", out / "checkpoints"
        self.begun = time.time_ns()
        self.seen = self._written()
        # A resumed run first drops the lines that it will write again.
        self.steps = -1 if self.seen else 0

    def _written(self) -> int:
        return self.metrics.stat().st_mtime_ns if self.metrics.is_file() else 0

    def has_recorded(self, steps: int) -> bool:
        """Return whether `steps` steps are recorded; call at least once per step."""
        if (written := self._written()) != self.seen:
            self.seen = written
            self.steps += self.metrics.stat().st_size > 0
        return self.steps >= steps

    def is_writing(self) -> bool:
        """Return whether a checkpoint is being written."""
        try:
            return any(
                path.stat().st_mtime_ns > self.begun
                for path in self.checkpoints.glob("step_*.partial")
            )
        except FileNotFoundError:
            return False


def run_killed(
    folder: Path, layout: str, iteration_s: float, start_s: float
) -> list[dict[str, Any]]:
    """Kill a random rank at random moments of one run, then let it end; return all attempts."""
    rng = random.Random(layout)
    config = make_config(folder, layout, f"{layout}.killed")
    out = Path(config.output_dir)
    attempts = []
    for number in range(KILLS):
        # Not after the run's last step.
        ending = latest(out) > f"step_{STEPS - 5:08d}"
        kind = "start" if ending else ("writing", "step", "writing", "step", "start")[number % 5]
        steps, victim, later = rng.randint(1, 2), rng.randrange(RANKS), rng.uniform(0.0, 0.05)
        delay = rng.uniform(0.0, {"start": start_s, "step": iteration_s, "writing": 0.02}[kind])
        progress = Progress(out)
        ranks = start(config, folder / f"{layout}.log")
        if kind != "start":
            until(lambda progress=progress, steps=steps: progress.has_recorded(steps), ranks)
        if kind == "writing":
            until(progress.is_writing, ranks)
        time.sleep(delay)
        os.kill(ranks[victim], signal.SIGKILL)
        writing = progress.is_writing()
        time.sleep(later)  # the other rank may continue for a moment, as on another machine
        os.kill(ranks[1 - victim], signal.SIGKILL)
        statuses = wait(ranks)
        attempts.append(
            {"kind": kind, "writing": writing, "statuses": statuses, "latest": latest(out)}
        )
    attempts.append(
        {
            "kind": "last",
            "statuses": wait(start(config, folder / f"{layout}.log")),
            "latest": latest(out),
        }
    )
    return attempts


def latest(out: Path) -> str:
    """Return the name of the latest checkpoint, or an empty string."""
    pointer = out / "checkpoints" / "latest"
    return pointer.read_text() if pointer.is_file() else ""


def terminate_in_step_2() -> None:
    """Make rank 1 send itself SIGTERM in its second step.

    Sent from another process, it could arrive in a later step.
    """
    learn = PPO.learn

    def terminated(self: PPO, *arguments: Any) -> Any:
        if self.iteration == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *arguments)

    PPO.learn = terminated  # type: ignore[method-assign]


def run_preempted(folder: Path) -> list[dict[str, Any]]:
    """Run until SIGTERM, then until a time limit, then to the end; return all attempts."""
    attempts = []
    config = make_config(folder, "dp2", "dp2.preempted")
    statuses = wait(start(config, folder / "preempted.log", before=terminate_in_step_2))
    attempts.append({"statuses": statuses, "latest": latest(Path(config.output_dir))})
    for limit in (0.01, None):
        config = make_config(folder, "dp2", "dp2.preempted", max_seconds=limit)
        statuses = wait(start(config, folder / "preempted.log"))
        attempts.append({"statuses": statuses, "latest": latest(Path(config.output_dir))})
    return attempts


def main(folder: Path) -> None:
    """Run all attempts of all layouts and write FOLDER/results.json."""
    results: dict[str, Any] = {}
    assert wait([fork(lambda: prepare(folder), {}, folder / "prepare.log")]) == [0]
    # transformers and megatron import many modules at the first use: here once, not after each
    # fork.
    load_tokenizer(folder / "data" / "tokenizer")
    importlib.import_module("megatron.core.transformer.moe.experts")
    for layout in LAYOUTS:
        config = make_config(folder, layout, layout)
        begin = time.monotonic()
        progress = Progress(Path(config.output_dir))
        ranks = start(config, folder / f"{layout}.log")
        until(lambda progress=progress: progress.has_recorded(1), ranks)
        first = time.monotonic()
        assert wait(ranks) == [0, 0], f"see {layout}.log"
        iteration_s = (time.monotonic() - first) / (STEPS - 1)
        results[layout] = run_killed(folder, layout, iteration_s, first - begin)
        results[f"{layout}.seconds"] = [iteration_s, first - begin, time.monotonic() - begin]
    results["preempted"] = run_preempted(folder)
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
