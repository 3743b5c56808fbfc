"""A run's checkpoints: written whole or not at all, verified when they are read, and loaded under any layout.

A checkpoint is a folder `checkpoints/step_XXXXXXXX/`:
    <model>/            weights (policy, value, ema, reward), `model.json`: shape, vocabulary, head and statistics
    <model>.optimizer/  Adam's moments and fp32 masters
    random/             generator states of every rank, for a resume under the same layout
    state.json          step, data cursors, controllers, update counts, loss scales, metrics, versions
    config.yaml         the run's configuration
    files.json          size and hash of every file, in each folder too
`checkpoints/latest` names the newest one, `checkpoints/best` the best one if `checkpoint.keep_best` asks for it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist
import yaml

import fastrlhf
from fastrlhf.checkpoint.folder_writer import (
    PARTIAL,
    REMOVED,
    Contents,
    Writing,
    complete,
    describe,
    raise_on_all_ranks,
    remove,
)
from fastrlhf.checkpoint.integrity import replace_text, verify
from fastrlhf.checkpoint.model_folder import (
    SavedModel,
    describe_model,
    fill_weights,
    model_contents,
    shard_reader,
)
from fastrlhf.checkpoint.shards import SavedStage, ShardFile, owned, parts_of, snapshot
from fastrlhf.checkpoint.state import SavedLearner, generator_states, restore_generators
from fastrlhf.config import CheckpointConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
_UNUSED = ".unused"
_PATIENCE_S = 10.0
"""A run that breaks off waits this long for the other ranks' part of a checkpoint: they write at the same time.

On a busy machine they may need longer. Then the next start completes the checkpoint (`prepare`), so nothing is lost; a
longer wait would meet torchrun's SIGKILL, which comes 30 s after its SIGTERM.
"""


class Checkpointable(Protocol):
    """What a checkpoint is made of: an algorithm's models, its learners, and the statistics of a reward model."""

    def models(self) -> Mapping[str, SavedStage]: ...
    def learners(self) -> Mapping[str, SavedLearner]: ...
    def statistics(self) -> dict[str, float]: ...


@dataclass
class Checkpointer:
    """Writes and reads a run's checkpoints; all ranks call every method.

    As a context manager: an exception that leaves the block completes the checkpoint that is being written.
    """

    mesh: Mesh
    folder: Path
    config: CheckpointConfig
    config_text: str
    tokenizer: str
    _writing: Writing | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, _type: type | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if error is not None:
            self._rescue()

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    # ---- writing ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes the folder, or says at once that it cannot be written; completes or removes what an interrupted
        run left.
        """
        with raise_on_all_ranks("checkpoint.save is on, but the folder cannot be written"):
            if self.mesh.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(f"step_*{PARTIAL}"):
                    if (whole := complete(left)) is not None:
                        replace_text(self.folder / "latest", whole.name)
                    else:
                        shutil.rmtree(left)
                for left in self.folder.glob(f"step_*{REMOVED}"):
                    shutil.rmtree(left)
                probe = self.folder / f"probe{PARTIAL}"
                probe.write_text("")
                probe.unlink()

    def save(
        self,
        step: int,
        algorithm: Checkpointable,
        state: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> Path:
        """Saves `algorithm.models()`, `algorithm.learners()` and the JSON-able `state`.

        Returns as soon as everything is copied to host memory if `checkpoint.asynchronous` says so; the checkpoint is
        there after the next `poll` that finds it written, or `finish`. `metrics` are those that keep_best compares.
        """
        self.finish()
        contents = self._contents(algorithm, {**state, "metrics": metrics or {}})
        self._writing = Writing(self.path(step), contents, in_background=self.config.asynchronous)
        if not self.config.asynchronous:
            self.finish()
        return self.path(step)

    def poll(self) -> None:
        """Completes the checkpoint that is being written if every rank has written its files."""
        if self._writing is not None and self._writing.is_done(self.mesh.device):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if any, and makes it the latest."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.finish()
        with raise_on_all_ranks(f"cannot write {self.folder}"):
            if self.mesh.rank == 0:
                replace_text(self.folder / "latest", writing.path.name)
                self._retire(writing.path)

    def _rescue(self) -> None:
        """Completes the checkpoint that is being written, without collectives: the other ranks may be anywhere."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            if writing.finish_alone(_PATIENCE_S):
                replace_text(self.folder / "latest", writing.path.name)
                self._retire(writing.path)
        except OSError as error:  # must not hide what broke the run; the next start tries again
            logger.warning("cannot complete %s: %s", writing.path, describe(error))

    def _contents(self, algorithm: Checkpointable, state: dict[str, Any]) -> Contents:
        copy = self.config.asynchronous
        contents: Contents = {}
        for name, stage in algorithm.models().items():
            model = model_contents(
                stage, tokenizer=self.tokenizer, statistics=algorithm.statistics(), copy=copy
            )
            contents |= {f"{name}/{file}": content for file, content in model.items()}
        own = f"rank_{self.mesh.rank:05d}.safetensors"
        for name, learner in algorithm.learners().items():
            parts = parts_of(learner.model, learner.optimizer_values())
            mine = owned(parts, self.mesh, sharded_over_data=learner.is_sharded_over_data)
            contents[f"{name}.optimizer/{own}"] = snapshot(mine, copy=copy)
        contents[f"random/{own}"] = ShardFile(generator_states(self.mesh), {})
        if self.mesh.rank == 0:
            learners = {
                name: learner.state_dict() for name, learner in algorithm.learners().items()
            }
            whole = {
                **state,
                "learners": learners,
                "layout": _layout(self.mesh),
                "versions": _versions(),
            }
            contents["state.json"] = json.dumps(whole, indent=2) + "\n"
            contents["config.yaml"] = self.config_text
        return contents

    def _retire(self, newest: Path) -> None:
        """Removes the checkpoints that no rule keeps, after the newest is there; names the best."""
        steps = sorted(path for path in self.folder.glob("step_*") if path.suffix == "")
        kept = set(steps[-self.config.keep_last :]) | {newest}
        if self.config.keep_every:
            kept |= {path for path in steps if int(path.name[5:]) % self.config.keep_every == 0}
        if self.config.keep_best is not None and (best := self._best(steps)) is not None:
            kept.add(best)
            replace_text(self.folder / "best", best.name)
        for path in set(steps) - kept:
            remove(path)

    def _best(self, steps: list[Path]) -> Path | None:
        assert self.config.keep_best is not None
        direction, metric = self.config.keep_best.split()
        values = {path: json.loads((path / "state.json").read_text())["metrics"] for path in steps}
        if metric not in values[steps[-1]]:
            logger.warning(
                "checkpoint.keep_best: %s has no metric %s; it has %s",
                *(steps[-1].name, metric, ", ".join(values[steps[-1]])),
            )
        # Of equals the earlier; NaN is never best.
        known = {
            path: row[metric]
            for path, row in values.items()
            if row.get(metric, float("nan")) == row.get(metric)
        }
        return (min if direction == "lowest" else max)(
            known, key=lambda path: known[path], default=None
        )

    # ---- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None if there is none at all; what is wrong with newer ones is printed.

        Starts at `latest`; if that is missing or names nothing, at the highest step. Raises `UserError` if there are
        checkpoints but none is whole.
        """
        told: list[list[Path]] = [self._candidates() if self.mesh.rank == 0 else []]
        dist.broadcast_object_list(told, src=0)
        candidates = told[0]
        first = ""
        for path in candidates:
            problems = verify(path)
            if not problems:
                return path
            first = first or problems[0]
            if self.mesh.rank == 0:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                logger.warning(
                    "%s%s; trying the checkpoint before %s", problems[0], more, path.name
                )
        if candidates:
            raise UserError(
                f"none of the {len(candidates)} checkpoints in {self.folder} is whole: {first}; restore one, or start "
                "over with checkpoint.resume=never"
            )
        return None

    def _candidates(self) -> list[Path]:
        """Newest first."""
        steps = sorted(
            (path for path in self.folder.glob("step_*") if path.suffix == ""), reverse=True
        )
        pointer = self.folder / "latest"
        try:
            latest = self.folder / pointer.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            latest = self.folder
        if latest in steps:
            return steps[steps.index(latest) :]
        if steps:
            logger.warning("%s names no checkpoint; taking the newest", pointer)
        return steps

    def load(self, path: Path, algorithm: Checkpointable) -> dict[str, Any]:
        """Restores models, optimizers and generators from a verified checkpoint; returns the saved `state`.

        Checkpoints newer than `path` (damaged, or of a run that went another way) are set aside: they would be taken
        for the newest later.
        """
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, stage in algorithm.models().items():
            if not (path / name).is_dir():
                raise UserError(
                    f"{path}: has no {name}, so it is of another command's run; give another output_dir"
                )
            saved = describe_model(path / name)
            _check_dtype(saved, stage)
            fill_weights(saved, stage)
        for name, learner in algorithm.learners().items():
            reader = shard_reader(path / f"{name}.optimizer")
            for part in parts_of(learner.model, learner.optimizer_values()):
                reader.fill(part)
            learner.load_state_dict(state["learners"][name])
        if state["layout"] == _layout(self.mesh):
            restore_generators(
                path / "random" / f"rank_{self.mesh.rank:05d}.safetensors", self.mesh
            )
        if self.mesh.rank == 0:
            for line in _differences(path, state, self.config_text):
                logger.info("resuming with %s", line)
        with raise_on_all_ranks(f"cannot write {self.folder}"):
            if self.mesh.rank == 0:
                for newer in (
                    other
                    for other in self.folder.glob("step_*")
                    if not other.suffix and other > path
                ):
                    set_aside(newer)
        return state

    def set_all_aside(self) -> None:
        """Renames the folder of an earlier run's checkpoints, for a run that does not resume them."""
        with raise_on_all_ranks(f"cannot write {self.folder}"):
            if self.mesh.rank == 0 and self.folder.is_dir() and any(self.folder.iterdir()):
                set_aside(self.folder)


def set_aside(path: Path) -> None:
    """Renames what an earlier run left, and says so: nothing is overwritten."""
    number = 1
    while (unused := path.with_name(f"{path.name}{_UNUSED}{number}")).exists():
        number += 1
    os.replace(path, unused)
    logger.warning("%s is now %s", path, unused.name)


def _check_dtype(saved: SavedModel, stage: SavedStage) -> None:
    if saved.model.dtype != stage.model_config.dtype:
        raise UserError(
            f"{saved.path}: was trained in {saved.model.dtype}, not {stage.model_config.dtype}; a run keeps its "
            f"model.dtype: set it to {saved.model.dtype}, or start a new output_dir with model.load"
        )


def _layout(mesh: Mesh) -> list[int]:
    return [mesh.tensor_size, mesh.pipeline_size, mesh.data_size]


def _versions() -> dict[str, str]:
    packages = ("torch", "megatron-core", "safetensors")
    return {
        "fastrlhf": fastrlhf.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _differences(path: Path, state: dict[str, Any], config_text: str) -> list[str]:
    """What is not as it was when the checkpoint was written, one line each."""
    before, now = (
        _flat(yaml.safe_load((path / "config.yaml").read_text())),
        _flat(yaml.safe_load(config_text)),
    )
    lines = [
        f"{key} {now.get(key)} (was {before.get(key)})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    versions = _versions()
    lines += [
        f"{name} {versions[name]} (was {old})"
        for name, old in state["versions"].items()
        if versions[name] != old
    ]
    return lines


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree} if prefix else {}
    return {
        key: value
        for name, child in tree.items()
        for key, value in _flat(child, f"{prefix}.{name}".strip(".")).items()
    }
