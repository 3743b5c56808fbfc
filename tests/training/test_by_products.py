"""Logs and reports never stop a run, and only folders with a checkpoint's exact name are touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.checkpoint import model_folder
from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.checkpoint.model_folder import describe_model, load_model
from fastrlhf.config import LogConfig
from fastrlhf.errors import UserError
from fastrlhf.evaluation.report import read_metrics, try_run_report, write_run_report
from fastrlhf.training.metrics import MetricsLog, SampleLog

GOOD = b'{"step": 1, "time": 0.5, "loss": 3.0}'
BROKEN = [
    b"\0" * 64,
    b'{"step": 2, "loss": \xff}',
    b"Segmentation fault",
    b'{"loss": 1.0}',
    b'{"step": null, "loss": 1.0}',
    b'{"step": "2"}',
    b'{"step": true}',
    b'{"step": NaN}',
    b"[1, 2]",
    b"3",
    b"[" * 100_000,
    b'{"step": 2, "loss": 1.0',
]


def log_of(folder: Path, start_step: int = 1, **options: Any) -> MetricsLog:
    settings = LogConfig(**{"tensorboard": False, "progress": False, **options})
    return MetricsLog(
        folder, settings, title="sft", total_steps=9, start_step=start_step, is_main=True
    )


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# ---- lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_set_aside_and_the_run_resumes(
    broken: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [GOOD, broken, GOOD.replace(b"1,", b"2,"), GOOD.replace(b"1,", b"3,")]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert read_metrics(path)["loss"] == ([1, 2, 3], [3.0, 3.0, 3.0])
    assert "Loss" in write_run_report(tmp_path).read_text()
    assert caplog.messages[0].startswith(f"warning: broken-log-line: {path}:2: ")
    assert all("\n" not in line and len(line) < 400 for line in caplog.messages)
    with log_of(tmp_path, start_step=2) as log:
        log.record(3, {"loss": 2.0})
    assert steps_of(path) == [1, 2, 3]
    assert path.with_name("metrics.jsonl.broken").read_bytes() == broken + b"\n"


def test_several_broken_lines_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([GOOD, *BROKEN, GOOD]) + b"\n")
    assert read_metrics(path)["loss"] == ([1, 1], [3.0, 3.0])
    (line,) = caplog.messages
    assert f"{path}:2: ''" in line and f"(and {len(BROKEN) - 1} more lines)" in line


@pytest.mark.parametrize("padding", [b"\0" * 4096, b"\0" * 100 + b"\n"])
def test_padding_at_the_end_and_before_a_record(
    padding: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b"\n" + padding)
    assert read_metrics(path)["loss"] == ([1], [3.0])
    assert f"{path}:2" in caplog.text
    with log_of(tmp_path) as log:
        log.record(2, {"loss": 2.0})
    assert steps_of(path) == [1, 2] and b"\0" not in path.read_bytes()
    path.write_bytes(padding.strip() + GOOD)  # a run that appended to its padding
    assert read_metrics(path)["loss"] == ([1], [3.0])


def test_values_that_no_float_holds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1{"0" * 400}, "note": "text", "deep": [1]}}\n')
    assert read_metrics(path)["loss"] == ([1], [float("inf")])
    assert write_run_report(tmp_path).is_file()


def test_broken_samples_do_not_stop_the_report_or_the_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + b"\n")
    path = tmp_path / "samples.jsonl"
    good = {"prompt": "Why?", "response": "So.", "score": 1.0, "kl": 0.5, "stopped": True}
    bad = [b"\0\0\0", b'{"iteration": 1}', b'{"iteration": 1, "prompt": 3}', b"\xff"]
    path.write_bytes(b"\n".join([*bad, json.dumps({"iteration": 1, **good}).encode(), b""]))
    assert "So." in write_run_report(tmp_path).read_text()
    SampleLog(path)(2, [good])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 1, 1, 2]


# ---- files that cannot be written ---------------------------------------------------------------


def test_unwritable_logs_are_one_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders in place of the files: the tests may run as root, who may write everything."""
    for name in ("metrics.jsonl", "samples.jsonl", "report.html", "report.html.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "tensorboard").write_text("a file in place of the folder")
    with log_of(tmp_path, tensorboard=True, progress=True) as log:
        for step in (2, 3):
            log.record(step, {"loss": 1.0})
    samples = SampleLog(tmp_path / "samples.jsonl")
    for iteration in (1, 2):
        samples(iteration, [{"prompt": "a"}])
    assert try_run_report(tmp_path) is None
    kinds = [line.split(": ")[2].rpartition("/")[2] for line in caplog.messages]
    assert sorted(kinds) == [
        "TensorBoard",
        "metrics.jsonl",
        "report.html cannot be written",
        "samples.jsonl",
    ]


def test_weights_and_biases_that_fails_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import SimpleNamespace

    def init(**_: Any) -> Any:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with log_of(tmp_path, wandb_project="p") as log:
        log.record(2, {"loss": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [2]
    assert "log-failed: Weights & Biases: api_key not configured" in caplog.text


def test_a_line_after_a_full_disk_begins_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with log_of(tmp_path) as log:
        path.write_bytes(b'{"step": 1, "los')  # a write that the disk cut
        log.record(2, {"loss": 1.0})
    assert path.read_bytes().splitlines()[0] == b'{"step": 1, "los'
    assert read_metrics(path)["loss"] == ([2], [1.0])


# ---- names --------------------------------------------------------------------------------------


def test_the_users_folders_are_not_touched(
    checkpointer: Callable[..., Checkpointer], training: Callable[..., Any]
) -> None:
    writer, live = checkpointer(keep_last=1), training()
    writer.save(1, live, {"step": 1})
    theirs = [
        "step_00000001_good",
        "step_abc",
        "step_1",
        "step_000000001",
        "step_00000001.partial.bak",
        "step_00000001_good.partial",
        "step_abc.removed",
        "step_99999999_later",
        "probe.partial",
    ]
    for name in theirs:
        shutil.copytree(writer.path(1), writer.folder / name)
    (writer.folder / "step_00000099").write_text("a file")
    before = {
        path: path.read_bytes()
        for name in theirs
        for path in (writer.folder / name).rglob("*.json")
    }
    writer.prepare()
    for step in (2, 3):
        writer.save(step, live, {"step": step})
    assert writer.newest() == writer.path(3)
    writer.load(writer.path(3), training())
    assert {path: path.read_bytes() for path in before} == before
    assert (writer.folder / "step_00000099").read_text() == "a file"
    found = {path.name for path in writer.folder.iterdir()}
    assert found == {*theirs, "step_00000099", "step_00000003", "latest"}


# ---- readers ------------------------------------------------------------------------------------


def test_latest_is_read_again_if_its_checkpoint_is_removed_meanwhile(
    checkpointer: Callable[..., Checkpointer],
    training: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer, live = checkpointer(keep_last=1), training()
    writer.save(1, live, {"step": 1})
    read, calls = model_folder._read_description, []

    def racing(folder: Path) -> Any:
        """Remove the checkpoint between the reads of `latest` and of `model.json`."""
        if "step_00000001" in str(folder) and not calls:
            calls.append(folder)
            writer.save(2, live, {"step": 2})
        return read(folder)

    monkeypatch.setattr(model_folder, "_read_description", racing)
    saved = describe_model(writer.folder.parent)
    assert calls and saved.path == writer.path(2) / "policy"
    monkeypatch.setattr(model_folder, "_read_description", read)
    # And between the description and the weights.
    live.steps([0])
    writer.save(3, live, {"step": 3})
    other = training(seed=99).stage
    load_model(saved, other)
    pairs = zip(other.parameters(), live.stage.parameters(), strict=True)
    assert all(bool((a == b).all()) for a, b in pairs)


def test_a_checkpoint_that_was_named_itself_is_not_replaced_by_another(
    checkpointer: Callable[..., Checkpointer], training: Callable[..., Any]
) -> None:
    writer, live = checkpointer(keep_last=1), training()
    writer.save(1, live, {"step": 1})
    saved = describe_model(writer.path(1))
    writer.save(2, live, {"step": 2})
    with pytest.raises(UserError, match=r"files\.json cannot be read"):
        load_model(saved, training().stage)
    with pytest.raises(UserError, match="no model here"):
        describe_model(writer.path(1))
