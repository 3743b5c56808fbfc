"""Checkpoints: their content, when they appear, which are kept, and failures of the disk."""

from __future__ import annotations

import json
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrlhf.checkpoint import folder_writer
from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.checkpoint.model_folder import describe_model
from fastrlhf.errors import UserError
from fastrlhf.training.loop import resume

Make = Callable[..., Any]


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*") if not path.suffix)


def same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.stage.parameters(), other.stage.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class TestState:
    def test_every_generator(self, checkpointer: Make, training: Make) -> None:
        def draw() -> list[Any]:
            return [
                torch.rand(2).tolist(),
                np.random.rand(2).tolist(),
                random.random(),
                random.gauss(0, 1),
            ]

        writer = checkpointer()
        random.gauss(0, 1)  # leaves half a pair behind
        np.random.randn()
        writer.save(1, training(), {"step": 1})
        drawn = [draw(), np.random.randn()]
        writer.load(writer.path(1), training())
        assert [draw(), np.random.randn()] == drawn

    @pytest.mark.parametrize(
        ("saved", "loaded"), [(True, True), (False, False), (True, False), (False, True)]
    )
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_masters_moments_and_loss_scale_under_either_optimizer(
        self, dtype: str, saved: bool, loaded: bool, checkpointer: Make, training: Make
    ) -> None:
        """fp16 starts at a scale that overflows, so both scale and number of updates change."""
        writer = checkpointer()
        first = training(dtype, distributed=saved, initial_loss_scale=2.0**36)
        before = first.steps([0] * 12)
        writer.save(12, first, {"step": 12})
        expected = first.steps([1, 2, 3])
        second = training(dtype, distributed=loaded)
        state = writer.load(writer.path(12), second)
        after = second.steps([1, 2, 3])
        if saved == loaded:
            assert after == expected
        for row, reference in zip(after, expected, strict=True):
            # The two forms of optimizer sum the gradient norm in different orders.
            assert row == pytest.approx(reference, rel=1e-5)
        if dtype == "fp16":
            assert sum(row["skipped"] for row in before) > 2
            assert state["learners"]["policy"]["updates"] == 12 - sum(
                row["skipped"] for row in before
            )

    @pytest.mark.parametrize("distributed", [True, False])
    def test_half_precision_model_with_an_fp32_head(
        self, distributed: bool, checkpointer: Make, training: Make
    ) -> None:
        """megatron's map from parameters to optimizer state is wrong for models of two dtypes."""
        writer, first = checkpointer(), training("bf16", head="scalar", distributed=distributed)
        first.steps([0, 1])
        writer.save(2, first, {"step": 2})
        second = training("bf16", head="scalar", distributed=distributed)
        writer.load(writer.path(2), second)
        assert second.steps([2, 3]) == first.steps([2, 3])
        assert same_weights(first, second)

    def test_another_dtype_shape_or_head_is_refused(
        self, checkpointer: Make, training: Make, script: Any, mesh: Any
    ) -> None:
        from fastrlhf.config import ModelConfig

        writer = checkpointer()
        writer.save(1, training(), {"step": 1})
        with pytest.raises(
            UserError, match=r"was trained in fp32, not bf16; a run keeps its model\.dtype"
        ):
            writer.load(writer.path(1), training("bf16"))
        wide = ModelConfig(**{**script.MODELS["tied"], "hidden_size": 64}, dtype="fp32")
        with pytest.raises(
            UserError, match=r"word_embeddings\.weight is \[128, 32\] there, but \[128, 64\]"
        ):
            writer.load(writer.path(1), script.Training(mesh, wide))
        script.VOCAB, vocabulary = 102, script.VOCAB
        with pytest.raises(UserError, match=r"has a vocabulary of 101, not 102; use its tokenizer"):
            writer.load(writer.path(1), training())
        script.VOCAB = vocabulary
        deep = ModelConfig(**{**script.MODELS["tied"], "num_layers": 4}, dtype="fp32")
        with pytest.raises(UserError, match="give the model section the shape that was saved"):
            writer.load(writer.path(1), script.Training(mesh, deep))
        other = ModelConfig(**script.MODELS["untied"], dtype="fp32")
        with pytest.raises(UserError, match=r"\[|holds no weight of"):
            writer.load(writer.path(1), script.Training(mesh, other))

    def test_changed_settings_are_logged(
        self, checkpointer: Make, training: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", logger="fastrlhf")
        checkpointer("optimizer:\n  lr: 0.1\n  eps: 1.0\n").save(1, training(), {"step": 1})
        later = checkpointer("optimizer:\n  lr: 0.2\n  eps: 1.0\n")
        later.load(later.path(1), training())
        assert [line for line in caplog.messages if "resuming with" in line] == [
            "resuming with optimizer.lr 0.2 (was 0.1)"
        ]


class TestAsynchronous:
    """Checkpoints of the background hold the state at the call and appear when complete."""

    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """Return an event that writes to the disk wait for."""
        opened, save_file = threading.Event(), folder_writer.save_file

        def slow(*arguments: Any, **options: Any) -> None:
            assert opened.wait(600)
            save_file(*arguments, **options)

        monkeypatch.setattr(folder_writer, "save_file", slow)
        return opened

    def test_the_state_at_the_call_is_written(
        self, gate: threading.Event, checkpointer: Make, training: Make
    ) -> None:
        writer, live, twin = checkpointer(asynchronous=True), training(seed=5), training(seed=5)
        live.steps([0])
        twin.steps([0])
        random_state = torch.get_rng_state()
        writer.save(1, live, {"step": 1})
        live.steps([1, 2])
        writer.poll()
        assert not writer.path(1).exists() and not (writer.folder / "latest").exists()
        gate.set()
        writer.finish()
        assert writer.newest() == writer.path(1)
        loaded = training(seed=77)
        writer.load(writer.path(1), loaded)
        assert same_weights(loaded, twin) and not same_weights(loaded, live)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert loaded.steps([1, 2]) == twin.steps([1, 2])

    def test_the_next_save_waits_for_the_one_before(
        self, gate: threading.Event, checkpointer: Make, training: Make
    ) -> None:
        writer, live = checkpointer(asynchronous=True), training()
        writer.save(1, live, {"step": 1})
        threading.Timer(0.2, gate.set).start()
        writer.save(2, live, {"step": 2})
        assert (writer.folder / "latest").read_text() == "step_00000001"
        writer.finish()
        assert (writer.folder / "latest").read_text() == "step_00000002"
        writer.finish()  # nothing to do

    @pytest.mark.parametrize("error", [RuntimeError("a step fails"), KeyboardInterrupt()])
    def test_an_exception_leaves_the_checkpoint_complete(
        self, error: BaseException, gate: threading.Event, checkpointer: Make, training: Make
    ) -> None:
        writer = checkpointer(asynchronous=True)
        with pytest.raises(type(error)), writer:
            writer.save(1, training(), {"step": 1})
            threading.Timer(0.2, gate.set).start()
            raise error
        assert (writer.folder / "latest").read_text() == "step_00000001"
        assert checkpointer().newest() == writer.path(1)

    def test_a_checkpoint_that_only_lacks_its_name_is_completed_at_the_next_start(
        self, gate: threading.Event, checkpointer: Make, training: Make
    ) -> None:
        gate.set()
        killed, live = checkpointer(asynchronous=True), training()
        killed.save(1, live, {"step": 1})
        killed.finish()
        killed.save(2, live, {"step": 2})
        assert killed._writing is not None
        killed._writing._written.result()
        writer = checkpointer()
        writer.prepare()
        assert writer.newest() == writer.path(2)
        assert not list(writer.folder.rglob("written_*"))
        # As if another rank had not finished.
        killed._writing = None
        killed.save(3, live, {"step": 3})
        killed._writing._written.result()
        (partial,) = writer.folder.glob("*.partial")
        (note,) = partial.glob("written_*")
        note.rename(note.with_name("written_00000_of_00002.json"))
        writer.prepare()
        assert writer.newest() == writer.path(2) and steps_in(writer.folder) == [1, 2]

    def test_files_have_the_mode_of_the_umask(self, checkpointer: Make, training: Make) -> None:
        writer = checkpointer()
        before = os.umask(0o027)
        try:
            writer.save(1, training(), {"step": 1})
        finally:
            os.umask(before)
        files = [path for path in writer.path(1).rglob("*") if path.is_file()]
        assert any(path.suffix == ".safetensors" for path in files)
        assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Limit the size of files to `limit` bytes in a block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFailures:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_full_disk(self, asynchronous: bool, checkpointer: Make, training: Make) -> None:
        writer, live = checkpointer(asynchronous=asynchronous), training()
        writer.save(1, live, {"step": 1})
        writer.finish()
        before = sorted(writer.folder.rglob("*"))
        with (
            pytest.raises(
                UserError,
                match=r"cannot write .*step_00000002: rank 0 on host [^:]+: .*File too large.* earlier checkp",
            ),
            full_disk(4096),
        ):
            writer.save(2, live, {"step": 2})
            writer.finish()
        assert sorted(writer.folder.rglob("*")) == before and writer.newest() == writer.path(1)
        writer.save(3, live, {"step": 3})  # with room again, saving works
        writer.finish()
        assert writer.newest() == writer.path(3)

    def test_unwritable_folder(self, checkpointer: Make, training: Make, tmp_path: Path) -> None:
        writer = checkpointer()
        (tmp_path / "checkpoints").write_text("a file in place of the folder")
        with pytest.raises(
            UserError, match=r"the folder cannot be written: .*checkpoints: File exists"
        ):
            writer.prepare()
        with pytest.raises(UserError, match=r"cannot write .*step_00000001: .*Not a directory"):
            writer.save(1, training(), {"step": 1})

    def test_partial_folders_of_a_killed_run_are_removed(
        self, checkpointer: Make, training: Make
    ) -> None:
        writer = checkpointer()
        writer.save(1, training(), {"step": 1})
        for left in ("step_00000002.partial", "step_00000000.removed"):
            (writer.folder / left).mkdir()
            (writer.folder / left / "file").write_text("")
        assert writer.newest() == writer.path(1)
        writer.prepare()
        assert {path.name for path in writer.folder.iterdir()} == {"step_00000001", "latest"}


class TestKeeping:
    def save(self, writer: Checkpointer, live: Any, losses: list[float | None]) -> None:
        for step, loss in enumerate(losses, 1):
            writer.save(
                step,
                live,
                {"step": step},
                {"valid_loss": loss} if loss is not None else {"loss": 1.0},
            )

    def test_last_and_every(self, checkpointer: Make, training: Make) -> None:
        writer = checkpointer(keep_last=2, keep_every=3)
        self.save(writer, training(), [None] * 8)
        assert steps_in(writer.folder) == [3, 6, 7, 8]

    @pytest.mark.parametrize(
        ("rule", "best"), [("lowest valid_loss", 2), ("highest valid_loss", 4)]
    )
    def test_best(
        self,
        rule: str,
        best: int,
        checkpointer: Make,
        training: Make,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        writer = checkpointer(keep_last=1, keep_best=rule)
        self.save(writer, training(), [2.0, 1.0, None, 3.0, float("nan"), 2.5])
        assert steps_in(writer.folder) == [best, 6]
        assert describe_model(writer.folder / "best").path == writer.path(best) / "policy"
        assert "step_00000003 has no metric valid_loss; it has loss" in caplog.text

    def test_a_step_saved_again_replaces_itself(self, checkpointer: Make, training: Make) -> None:
        writer = checkpointer()
        for note in ("first", "second"):
            writer.save(1, training(), {"step": 1, "note": note})
        assert json.loads((writer.path(1) / "state.json").read_text())["note"] == "second"
        assert {path.name for path in writer.folder.iterdir()} == {"step_00000001", "latest"}


def test_resume_never_renames_old_checkpoints_but_not_after_a_restart(
    checkpointer: Make, training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    writer, live = checkpointer(resume="never"), training()
    config: Any = SimpleNamespace(checkpoint=writer.config)
    algorithm: Any = SimpleNamespace(
        models=live.models,
        learners=live.learners,
        load_state_dict=lambda state: None,
        statistics=dict,
    )
    state = {"step": 1, "data": {}, "algorithm": {}}
    writer.save(1, live, state)
    assert resume(config, algorithm, algorithm, writer) == 0
    assert steps_in(writer.folder) == [] and steps_in(
        writer.folder.with_name("checkpoints.unused1")
    ) == [1]
    writer.save(1, live, state)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resume(config, algorithm, algorithm, writer) == 1


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    from fastrlhf.config import LogConfig
    from fastrlhf.training.metrics import MetricsLog

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    options = LogConfig(tensorboard=False, progress=False)
    with MetricsLog(tmp_path, options, title="", total_steps=3, start_step=1, is_main=True) as log:
        log.record(2, {"loss": 2.5})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [3.0, 2.5]
