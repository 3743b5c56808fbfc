"""Checkpoints of a run: written atomically, verified before loading, valid for any layout.

A checkpoint is a folder `checkpoints/step_XXXXXXXX/`:
    <model>/            weights (policy, value, ema, reward), and `model.json`: shape, vocabulary,
                        head, tokenizer and statistics
    <model>.optimizer/  Adam's moments and fp32 masters
    tokenizer/          the tokenizer's files; each checkpoint has its own copy, so that it can be
                        moved alone
    random/             generator states of every rank, for a resume under the same layout
    state.json          step, data cursors, controllers, update counts, loss scales, metrics,
                        versions
    config.yaml         the run's configuration
    files.json          size and hash of every file, in each folder too
`checkpoints/latest` names the newest one, `checkpoints/best` the best one with
`checkpoint.keep_best`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypedDict, cast

import torch.distributed as dist

from fastrlhf.checkpoint.differences import differences, package_versions
from fastrlhf.checkpoint.folder_writer import (
    Contents,
    FolderWriter,
    commit_if_complete,
    describe_error,
    raise_on_all_ranks,
    remove_atomically,
)
from fastrlhf.checkpoint.integrity import replace_text, verify
from fastrlhf.checkpoint.model_folder import (
    SavedModel,
    describe_model,
    fill_weights,
    model_contents,
    shard_reader,
    tokenizer_contents,
)
from fastrlhf.checkpoint.names import PARTIAL, REMOVED, step_folders, step_name, step_of
from fastrlhf.checkpoint.schema import STATE_VERSION, StateFile, read_file
from fastrlhf.checkpoint.shards import SavedStage, ShardFile, owned, parts_of, snapshot
from fastrlhf.checkpoint.soundness import check_weights_finite
from fastrlhf.checkpoint.state import (
    LearnerState,
    SavedLearner,
    generator_states,
    restore_generators,
)
from fastrlhf.config import CheckpointConfig
from fastrlhf.errors import UserError
from fastrlhf.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
_UNUSED = ".unused"
_NOTES_TIMEOUT_S = 10.0
"""How long a run that breaks off waits for the other ranks' files, which they write meanwhile.

On a busy machine they may need longer. Then the next start completes the checkpoint (`prepare`), so
nothing is lost. torchrun sends SIGKILL 30 s after its SIGTERM.
"""


class Checkpointable(Protocol):
    """Models, learners and statistics that a checkpoint holds; algorithms implement it."""

    def models(self) -> Mapping[str, SavedStage]:
        """Return the models by name."""
        ...

    def learners(self) -> Mapping[str, SavedLearner]:
        """Return the learners, whose optimizer state is saved, by the name of their model."""
        ...

    def statistics(self) -> dict[str, float]:
        """Return the statistics of a reward model."""
        ...


class RunState(TypedDict, total=False):
    """Content of `state.json`. A caller of `save` gives step, data and algorithm."""

    version: int
    step: int
    data: Mapping[str, object]
    """Position in the data."""
    algorithm: Mapping[str, object]
    metrics: Mapping[str, float]
    learners: Mapping[str, LearnerState]
    layout: list[int]
    versions: dict[str, str]


@dataclass
class Checkpointer:
    """Writes and reads a run's checkpoints; every method is a collective.

    As a context manager, it completes the checkpoint that is being written if an exception leaves
    the block.
    """

    mesh: Mesh
    folder: Path
    config: CheckpointConfig
    config_text: str
    tokenizer: str
    """Path of the tokenizer."""
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    """Its files, name -> text: `data.tokenize.tokenizer_files`."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """`SavedModel.generation` of the model that training starts from."""
    _writing: FolderWriter | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, _type: type | None, error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if error is not None:
            self._finish_after_error()

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / step_name(step)

    # ---- writing --------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder, and complete or remove what an interrupted run left in it.

        Raises UserError if the folder cannot be written.
        """
        with raise_on_all_ranks("checkpoint.save is on, but the folder cannot be written"):
            if self.mesh.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in step_folders(self.folder, PARTIAL):
                    if (finished := commit_if_complete(left)) is not None:
                        replace_text(self.folder / "latest", finished.name)
                    else:
                        shutil.rmtree(left)
                for left in step_folders(self.folder, REMOVED):
                    shutil.rmtree(left)
                with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".probe_"):
                    pass

    def save(
        self,
        step: int,
        algorithm: Checkpointable,
        state: RunState,
        metrics: dict[str, float] | None = None,
    ) -> Path:
        """Save the models and learners of `algorithm` and `state`; return the checkpoint's folder.

        With `checkpoint.asynchronous`, returns once everything is copied to host memory. The folder
        then exists after `finish`, or after a `poll` that finds it written. `keep_best` compares
        `metrics`. Raises DivergedError on every rank if a weight is not finite.
        """
        self.finish()
        check_weights_finite(f"step {step}", algorithm.models(), self.mesh.device)
        contents = self._contents(algorithm, {**state, "metrics": metrics or {}})
        self._writing = FolderWriter(
            self.path(step), contents, in_background=self.config.asynchronous
        )
        if not self.config.asynchronous:
            self.finish()
        return self.path(step)

    def poll(self) -> None:
        """Complete the checkpoint that is being written if every rank has written its files."""
        if self._writing is not None and self._writing.is_done(self.mesh.device):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the latest."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.finish()
        with raise_on_all_ranks(f"cannot write {self.folder}"):
            if self.mesh.rank == 0:
                replace_text(self.folder / "latest", writing.path.name)
                self._retire(writing.path)

    def _finish_after_error(self) -> None:
        """Complete the checkpoint that is being written while other ranks may be anywhere."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            if writing.finish_without_collectives(_NOTES_TIMEOUT_S):
                replace_text(self.folder / "latest", writing.path.name)
                self._retire(writing.path)
        except OSError as error:  # must not hide the error of the run; the next start tries again
            logger.warning("cannot complete %s: %s", writing.path, describe_error(error))

    def _contents(self, algorithm: Checkpointable, state: RunState) -> Contents:
        """Return this rank's files of a checkpoint."""
        copy = self.config.asynchronous
        contents = tokenizer_contents(self.tokenizer_files)
        for name, stage in algorithm.models().items():
            model = model_contents(
                stage,
                tokenizer=self.tokenizer,
                statistics=algorithm.statistics(),
                generation=self.generation,
                copy=copy,
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
            complete: RunState = {
                "version": STATE_VERSION,
                **state,
                "learners": learners,
                "layout": _layout(self.mesh),
                "versions": package_versions(),
            }
            contents["state.json"] = json.dumps(complete, indent=2) + "\n"
            contents["config.yaml"] = self.config_text
        return contents

    def _retire(self, newest: Path) -> None:
        """Remove the checkpoints that no rule keeps, and update `best`; the newest is complete."""
        steps = self.checkpoints()
        kept = set(steps[-self.config.keep_last :]) | {newest}
        if self.config.keep_every:
            kept |= {path for path in steps if step_of(path) % self.config.keep_every == 0}
        if self.config.keep_best is not None and (best := self._best(steps)) is not None:
            kept.add(best)
            replace_text(self.folder / "best", best.name)
        for path in set(steps) - kept:
            remove_atomically(path)

    def _best(self, steps: list[Path]) -> Path | None:
        """Return the best of `steps` by `keep_best`, or None if none has its metric."""
        assert self.config.keep_best is not None
        direction, metric = self.config.keep_best.split()
        values = {path: saved_metrics(path) for path in steps}
        if metric not in values[steps[-1]]:
            logger.warning(
                "checkpoint.keep_best: %s has no metric %s; it has %s",
                *(steps[-1].name, metric, ", ".join(values[steps[-1]])),
            )
        # The earlier of equals; NaN is never the best.
        known = {
            path: row[metric]
            for path, row in values.items()
            if row.get(metric, float("nan")) == row.get(metric)
        }
        return (min if direction == "lowest" else max)(
            known, key=lambda path: known[path], default=None
        )

    # ---- reading --------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Return the folders of all checkpoints in order of their steps; not a collective."""
        return step_folders(self.folder)

    def saved_losses(self, done: int) -> Iterator[tuple[int, float]]:
        """Yield (step, loss) of the checkpoints up to the step `done`; not a collective."""
        for path in self.checkpoints():
            loss = saved_metrics(path).get("loss")
            if step_of(path) <= done and isinstance(loss, (int, float)):
                yield step_of(path), float(loss)

    def point_to(self, path: Path) -> None:
        """Make the checkpoint `path` the latest one; rank 0 calls it."""
        replace_text(self.folder / "latest", path.name)

    def newest(self) -> Path | None:
        """Return the newest intact checkpoint, or None if there are no checkpoints.

        The search starts at `latest`, or at the highest step if that is missing or names no
        checkpoint. Damaged ones are logged. Raises UserError if there are checkpoints but none is
        intact.
        """
        broadcast: list[list[Path]] = [self._candidates() if self.mesh.rank == 0 else []]
        dist.broadcast_object_list(broadcast, src=0)
        candidates = broadcast[0]
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
                f"none of the {len(candidates)} checkpoints in {self.folder} is intact: {first}; restore one, or "
                "start over with checkpoint.resume=never"
            )
        return None

    def _candidates(self) -> list[Path]:
        """Return the folders of checkpoints from `latest` on, newest first."""
        steps = self.checkpoints()[::-1]
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

    def load(self, path: Path, algorithm: Checkpointable) -> RunState:
        """Restore models, optimizers and generators from a verified checkpoint; return its state.

        Checkpoints newer than `path` are damaged or of another run: they are renamed, so that they
        are not taken for the newest later.
        """
        state = read_state(path)
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
            if name not in state["learners"]:
                raise UserError(f"{path / 'state.json'}: has no learner {name}")
            learner.load_state_dict(state["learners"][name])
        if state["layout"] == _layout(self.mesh):
            restore_generators(
                path / "random" / f"rank_{self.mesh.rank:05d}.safetensors", self.mesh
            )
        if self.mesh.rank == 0:
            for line in differences(path, state["versions"], self.config_text):
                logger.info("resuming with %s", line)
        with raise_on_all_ranks(f"cannot write {self.folder}"):
            if self.mesh.rank == 0:
                for other in self.checkpoints():
                    if other > path:
                        rename_unused(other)
        return state

    def rename_all_unused(self) -> None:
        """Rename the folder of an earlier run's checkpoints, if this run does not resume them."""
        with raise_on_all_ranks(f"cannot write {self.folder}"):
            if self.mesh.rank == 0 and self.folder.is_dir() and any(self.folder.iterdir()):
                rename_unused(self.folder)


def read_state(path: Path) -> RunState:
    """Return the state of the checkpoint `path`.

    Raises UserError with the file's name if it is not a state.
    """
    try:
        state = read_file(path / "state.json", StateFile)
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'state.json'}: not the state of a run ({error})") from None
    return cast("RunState", state.model_dump(exclude_unset=True))


def saved_metrics(path: Path) -> dict[str, float]:
    """Return the metrics of a checkpoint, none if its state cannot be read."""
    try:
        metrics = json.loads((path / "state.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def rename_unused(path: Path) -> None:
    """Rename a file or folder of an earlier run to PATH.unusedN and log it; overwrite nothing."""
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
    """Return the sizes on which the file of a rank's generators depends."""
    return [mesh.tensor_size, mesh.pipeline_size, mesh.data_size]
