"""Run a training command: check the configuration, build the job, train, write the report.

from fastrlhf.config import load_config
from fastrlhf.run.train import train

train("sft", load_config("configs/debug/sft.yaml", ["train.steps=10"]))
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from fastrlhf.algorithms.rewards import raise_on_any_rank
from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.checkpoint.folder_writer import raise_on_all_ranks
from fastrlhf.config import (
    Config,
    TrainingCommand,
    check_batch,
    dump_config,
    require,
    training_command,
)
from fastrlhf.data.tokenize import tokenizer_files
from fastrlhf.errors import UserError
from fastrlhf.evaluation.report import try_run_report
from fastrlhf.models.loading import find_model, is_hugging_face
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.run.builder import RunBuilder
from fastrlhf.run.jobs import AlgorithmT, JobBuilder, TrainingJob, job_builder
from fastrlhf.run.start import start as start_ranks
from fastrlhf.training import loop
from fastrlhf.training.metrics import MetricsLog
from fastrlhf.training.wandb_login import has_login


def train(command: str, config: Config) -> bool:
    """Run the training command `command` ("pretrain", "sft", "rm" or "ppo") as `config` says.

    Everything is written under `config.output_dir`; a run that is there already is resumed. Returns
    False if it was stopped (see `train_job`): nothing that needs its result may follow. Raises
    UserError.
    """
    row = training_command(command)
    return train_job(row, config, job_builder(row)) is not None


def train_job(
    command: TrainingCommand, config: Config, build: JobBuilder[AlgorithmT]
) -> TrainingJob[AlgorithmT] | None:
    """Train the job that `build` returns, with the checks, lock and report of `train`.

    Returns None if the run was stopped by SIGTERM or train.max_seconds; a SIGTERM during the last
    step stops what would follow. Raises KeyboardInterrupt if Ctrl-C stopped it, after saving.
    """
    start = time.monotonic()
    require(config, command.name)
    mesh = start_ranks(command.name, config)
    watchdog = Watchdog(config.parallel)
    with watchdog, _locked_folder(Path(config.output_dir), mesh):
        with phase("start-up"):
            for key in command.batch_keys:
                check_batch(config, mesh.data_size, key)
            _check_packages(config)
            _check_wandb(config, mesh)
            _check_memory(config, mesh)
            _check_model_paths(command, config)
            run = RunBuilder(config, mesh)
            run.check_models(ppo="ppo" in command.sections)
            job = build(run)
        finished = _loop(command, run, job, start, watchdog)
    dist.barrier()
    return job if finished else None


@contextlib.contextmanager
def _locked_folder(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Make the folder and hold its lock inside the block.

    The lock keeps two runs in one folder from deleting each other's checkpoints; the system
    releases it if the process is killed.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    with raise_on_all_ranks(f"output_dir {folder} cannot be written"):
        if mesh.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise OSError(
                    f"another run is writing it (it holds {lock.lock_file}); give another folder"
                ) from None
    try:
        yield
    finally:
        lock.release()


def _check_packages(config: Config) -> None:
    """Raise UserError if a setting needs an optional package that is not installed."""
    needs = {
        "wandb": ("log.wandb_project", config.log.wandb_project is not None, "null"),
        "flash_attn": ("model.attention=flash", config.model.attention == "flash", "sdpa or auto"),
    }
    for package, (setting, is_set, other) in needs.items():
        if is_set and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise UserError(
                f"{setting} needs the package {name}, which is not installed: pip install it, or"
                f" set {other}"
            )


def _check_wandb(config: Config, mesh: Mesh) -> None:
    """Raise UserError on all ranks if rank 0 has no key for Weights & Biases."""
    if config.log.wandb_project is not None:
        problem = ""
        if mesh.rank == 0 and not has_login():
            problem = (
                "log.wandb_project needs a key for Weights & Biases: run wandb login, set"
                " WANDB_API_KEY or WANDB_MODE=offline, or set log.wandb_project=null"
            )
        raise_on_any_rank(mesh, problem)


def _check_memory(config: Config, mesh: Mesh) -> None:
    """Raise UserError if a rank's share of the weights alone is larger than its memory."""
    if mesh.device.type == "cuda":
        total = torch.cuda.get_device_properties(mesh.device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    width = 4 if config.model.dtype == "fp32" else 2
    need = config.model.num_weights * width // (mesh.tensor_size * mesh.pipeline_size)
    if need > total:
        raise UserError(
            f"model: its {config.model.num_weights:.1e} weights take {need / 1e9:.0f} GB on each"
            f" rank, and {mesh.device} has {total / 1e9:.0f} GB; make model.hidden_size or"
            " model.num_layers smaller, or raise parallel.tensor or parallel.pipeline"
        )


def _check_model_paths(command: TrainingCommand, config: Config) -> None:
    """Check that every model path exists before tokenizing, which can take an hour."""
    load = config.model.load
    if load is not None and is_hugging_face(load):
        raise UserError(
            f"model.load {load} is a Hugging Face model; give it as model.hf, and set"
            " model.load=null"
        )
    paths = [load, config.model.hf]
    if "ppo" in command.sections:
        paths += [*config.ppo.reward_models, config.ppo.value_model, config.ppo.reference_model]
    for path in paths:
        if path is not None:
            find_model(path)


def _checkpointer(run: RunBuilder) -> Checkpointer:
    config, start = run.config, run.config.model.load or run.config.model.hf
    return Checkpointer(
        run.mesh,
        Path(config.output_dir) / "checkpoints",
        config.checkpoint,
        dump_config(config),
        config.data.tokenizer,
        tokenizer_files=tokenizer_files(run.tokenizer) if run.mesh.rank == 0 else {},
        generation=find_model(start).generation if start is not None else {},
    )


def _loop(
    command: TrainingCommand,
    run: RunBuilder,
    job: TrainingJob[AlgorithmT],
    start: float,
    watchdog: Watchdog,
) -> bool:
    """Train from the newest checkpoint; return whether it was not stopped."""
    config, mesh, checkpointer = run.config, run.mesh, _checkpointer(run)
    out = Path(config.output_dir)
    done = loop.resume(config, job.algorithm, job.batches, checkpointer)
    # Not before the checkpoint is known to be this run's: another run's configuration would be
    # overwritten.
    with raise_on_all_ranks(f"output_dir {out} cannot be written"):
        if mesh.rank == 0:
            (out / "config.yaml").write_text(dump_config(config))
    if done >= job.total_steps:
        if mesh.rank == 0:
            fix = "raise train.steps (or train.epochs), or give another output_dir"
            print(f"{out} is finished (step {done} of {job.total_steps}): {fix}", file=sys.stderr)
            try_run_report(out)
        return True
    if mesh.rank == 0 and done:
        print(f"resuming {out} after step {done} of {job.total_steps}", file=sys.stderr)
    log = MetricsLog(
        out,
        config.log,
        title=command.name,
        total_steps=job.total_steps,
        start_step=done,
        is_main=mesh.rank == 0,
    )
    with log:
        stopped = loop.run(
            config,
            job.algorithm,
            job.batches,
            checkpointer,
            log,
            total_steps=job.total_steps,
            done=done,
            deadline=(
                start + config.train.max_seconds if config.train.max_seconds is not None else None
            ),
            started=watchdog.end_start_up,
            evaluate=job.evaluate,
            finish=job.finish,
        )
    if mesh.rank == 0:
        finished = stopped is None or stopped.finished
        if stopped is not None and not finished:
            print(stopped.line, file=sys.stderr)
        page = try_run_report(out)
        if finished:
            print(f"{page or out}: {command.name} finished after step {job.total_steps}")
    if stopped is not None and stopped.interrupted:
        raise KeyboardInterrupt
    return stopped is None
