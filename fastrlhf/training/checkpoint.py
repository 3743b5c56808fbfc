"""Checkpoints on megatron-core's dist_checkpointing: sharded weights and optimizer state that load under any layout.

A checkpoint is a folder `checkpoints/step_XXXXXXXX/`:
    <model>/            weights (policy, reward, value, ema ...), and `model.json`: its shape, vocabulary, head and
    statistics <model>.optimizer/  optimizer, loss scale and learning-rate schedule random/             generator states
    of every rank, for a resume under the same layout
    state.json          step, data cursors, controllers: what is not a tensor
    config.yaml         the run's configuration
It is written under a temporary name and renamed when complete; `checkpoints/latest` names the newest one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file

from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.training.optimizer import torch_adams

_MODELS = ("ema", "policy", "reward")


@dataclass(frozen=True)
class SavedModel:
    """`model.json`: what a folder of weights holds."""

    path: Path
    model: ModelConfig
    vocab_size: int
    head: str
    tokenizer: str
    statistics: dict[str, float] = field(default_factory=dict)
    """Of reward models: mean and std of scores on demonstrations, and the bias that makes the mean 0."""


def describe_model(path: str | Path) -> SavedModel:
    """Finds the weights at `path`: a model folder, a checkpoint folder, or a run's output folder (its latest
    checkpoint).

    In a checkpoint, the averaged policy ("ema") is preferred to the raw one. Raises `UserError` if there is none.
    """
    root = Path(path)
    candidates = [root]
    latest = root / "checkpoints" / "latest"
    if latest.is_file():
        candidates.append(root / "checkpoints" / latest.read_text().strip())
    for folder in candidates:
        for model in (folder, *(folder / name for name in _MODELS)):
            if (model / "model.json").is_file():
                saved = json.loads((model / "model.json").read_text())
                return SavedModel(path=model, **{**saved, "model": ModelConfig(**saved["model"])})
    raise UserError(
        f"{path}: no model here; expected a run's output folder, a checkpoint step_XXXXXXXX or a model folder"
    )


def _reshardable() -> dict[str, Any]:
    """Optimizer state in a form that loads under any tensor, pipeline and data-parallel size.

    A new dict each time: megatron adds its process groups to it, which belong to one mesh.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def save_model(path: Path, stage: Any, *, tokenizer: str, statistics: dict[str, float] | None = None) -> None:
    """Writes the weights of `stage` (all ranks call) and `model.json` to the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(stage.sharded_state_dict(metadata=_reshardable()), str(path))
    if dist.get_rank() == 0:
        description = {
            "model": stage.model_config.model_dump(exclude={"load", "hf"}),
            "vocab_size": stage.vocab_size,
            "head": stage.head_kind,
            "tokenizer": tokenizer,
            "statistics": statistics or {},
        }
        (path / "model.json").write_text(json.dumps(description, indent=2) + "\n")
    dist.barrier()


def load_model(saved: SavedModel, stage: Any) -> None:
    """Loads the weights into `stage`, whatever layout they were saved under.

    A scalar-head stage loaded from an LM keeps its own (fresh) head: the unembedding is dropped (InstructGPT, section
    3.5).
    """
    wanted = stage.sharded_state_dict(metadata=_reshardable())
    if stage.head_kind == "scalar" and saved.head == "lm":
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("score.")}
    elif stage.head_kind != saved.head:
        raise UserError(
            f"{saved.path}: holds a model with a {saved.head} head, not the {stage.head_kind} head needed here"
        )
    loaded = dist_checkpointing.load(wanted, str(saved.path), validate_access_integrity=False)
    missing, unexpected = stage.load_state_dict(loaded, strict=False)
    unexplained = [name for name in missing if not name.startswith("score.") and not name.endswith("_extra_state")]
    assert not unexplained and not unexpected, (unexplained, unexpected)


@dataclass
class Checkpointer:
    """Writes and reads a run's checkpoints."""

    mesh: Mesh
    folder: Path
    keep_last: int
    config_text: str
    tokenizer: str

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        pointer = self.folder / "latest"
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def save(self, step: int, algorithm: Any, state: dict[str, Any]) -> Path:
        """Saves `algorithm.models()`, `algorithm.learners()` and the JSON-able `state`; all ranks call."""
        final = self.path(step)
        partial = final.with_name(final.name + ".partial")
        if self.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        for name, stage in algorithm.models().items():
            save_model(partial / name, stage, tokenizer=self.tokenizer, statistics=algorithm.statistics())
        for name, learner in algorithm.learners().items():
            _save_optimizer(partial / f"{name}.optimizer", learner)
        _save_generators(partial / "random", self.mesh)
        dist.barrier()  # every rank's files are there before the folder gets its final name
        if self.mesh.rank == 0:
            (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            (partial / "config.yaml").write_text(self.config_text)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            pointer = self.folder / "latest.partial"
            pointer.write_text(final.name)
            os.replace(pointer, self.folder / "latest")
            self._retire()
        dist.barrier()
        return final

    def load(self, path: Path, algorithm: Any) -> dict[str, Any]:
        """Restores models, optimizers and generators; returns the saved `state`."""
        for name, stage in algorithm.models().items():
            load_model(describe_model(path / name), stage)
        for name, learner in algorithm.learners().items():
            _load_optimizer(path / f"{name}.optimizer", learner)
        _load_generators(path / "random", self.mesh)
        return json.loads((path / "state.json").read_text())

    def _retire(self) -> None:
        steps = sorted(p for p in self.folder.glob("step_*") if p.is_dir() and p.suffix != ".partial")
        for old in steps[: -self.keep_last]:
            shutil.rmtree(old)


def _optimizer_state(learner: Any, is_loading: bool) -> dict[str, Any]:
    model = learner.stage.sharded_state_dict(metadata=_reshardable())
    return {"optimizer": learner.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_reshardable())}


def _save_optimizer(path: Path, learner: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _optimizer_state(learner, is_loading=False) | {"scheduler": learner.scheduler.state_dict()}
    dist_checkpointing.save(state, str(path))


def _load_optimizer(path: Path, learner: Any) -> None:
    loaded = dist_checkpointing.load(_optimizer_state(learner, is_loading=True), str(path))
    _restore(learner.optimizer, loaded["optimizer"])
    # megatron adds the saved steps to those already made.
    learner.scheduler.num_steps = 0
    learner.scheduler.load_state_dict(loaded["scheduler"])


def _restore(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, fp32 master weights included.

    megatron's distributed optimizer looks for every tensor of Adam's state among the saved moments, but torch keeps
    its step counts there too; and it gives all parameters one step tensor, which each of them would then advance. So
    the steps are set aside while the moments are loaded, and each parameter gets its own.
    """
    moments = state.pop("param_state", None)
    optimizer.load_state_dict(state)
    if moments is None:
        return
    steps = [(values, values.pop("step")) for adam in torch_adams(optimizer) for values in adam.state.values()]
    (part,) = optimizer.chained_optimizers
    part.load_parameter_state_from_fully_reshardable(moments)
    for values, step in steps:
        values["step"] = step.clone()


def _save_generators(folder: Path, mesh: Mesh) -> None:
    states = {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    states["cpu"] = torch.get_rng_state()
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: state.clone() for name, state in states.items()}, folder / f"rank_{mesh.rank:05d}.safetensors")


def _load_generators(folder: Path, mesh: Mesh) -> None:
    """Restores this rank's generators if the checkpoint was written by as many ranks; another layout keeps its
    seeds.
    """
    if len(list(folder.glob("rank_*.safetensors"))) != mesh.world_size:
        return
    states = load_file(folder / f"rank_{mesh.rank:05d}.safetensors")
    torch.set_rng_state(states["cpu"])
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    get_cuda_rng_tracker().set_states({n[len(prefix) :]: s for n, s in states.items() if n.startswith(prefix)})
