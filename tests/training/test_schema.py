"""state.json, model.json and files.json: every wrong content is one line with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastrlhf.checkpoint.checkpointer import Checkpointer, read_state
from fastrlhf.checkpoint.folder_writer import commit_if_complete
from fastrlhf.checkpoint.integrity import DamagedManifestError, read_manifest, write_manifest
from fastrlhf.checkpoint.model_folder import describe_model, shard_reader
from fastrlhf.errors import UserError
from fastrlhf.training.loop import resume

STATE: dict[str, Any] = {
    "step": 3,
    "data": {"samples": 8, "seed": 1, "shuffle": True, "order": "x", "epoch": 0, "cursor": 2},
    "algorithm": {"iteration": 3, "kl_coefficient": 0.02, "pretraining": None},
    "metrics": {"loss": 1.0, "no": None},
    "learners": {"policy": {"updates": 3, "loss_scale": None}},
    "layout": [1, 1, 1],
    "versions": {"fastrlhf": "0.1", "torch": "2.0"},
}
REMOVED = object()


@pytest.fixture
def written(
    checkpointer: Callable[..., Checkpointer], training: Callable[..., Any]
) -> Checkpointer:
    """Return a checkpointer with the checkpoint of step 3."""
    writer = checkpointer()
    writer.save(3, training(), {"step": 3, "data": {}, "algorithm": {}})
    return writer


def changed(content: dict[str, Any], keys: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(content))
    *outer, last = keys.split(".")
    place = copy
    for key in outer:
        place = place[key]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    return copy


# ---- state.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        ("step", 3.5, "step: Input should be a valid integer, got 3.5"),
        ("step", -1, "step: Input should be greater than or equal to 0, got -1"),
        ("step", "3", "step: Input should be a valid integer"),
        ("step", True, "step: Input should be a valid integer"),
        ("step", None, "step: "),
        ("step", 10**30, "step: "),
        ("step", REMOVED, "step: Field required"),
        ("learners", REMOVED, "learners: Field required"),
        ("layout", REMOVED, "layout: Field required"),
        ("versions", REMOVED, "versions: Field required"),
        ("learners", [], "learners: Input should be a valid dictionary"),
        ("learners.policy", None, "learners.policy: "),
        (
            "learners.policy.updates",
            1.5,
            "learners.policy.updates: Input should be a valid integer",
        ),
        ("learners.policy.updates", -2, "learners.policy.updates: "),
        ("learners.policy.loss_scale", 3, "learners.policy.loss_scale: "),
        ("learners.policy.loss_scale", {"scale": "a"}, "learners.policy.loss_scale.scale: "),
        ("learners.policy.loss_scale", {"scale": -1.0}, "learners.policy.loss_scale.scale: "),
        ("layout", [1, 0, 1], "layout.1: "),
        ("layout", "111", "layout: "),
        ("versions", {"torch": 2}, "versions.torch: Input should be a valid string"),
        ("metrics", {"loss": "low"}, "metrics.loss: "),
        ("data", [1], "data: "),
        ("data.cursor", -5, "data.cursor: "),
        ("data.epoch", 0.5, "data.epoch: "),
        ("algorithm.iteration", "3", "algorithm.iteration: "),
        ("algorithm.kl_coefficient", float("nan"), "algorithm.kl_coefficient: "),
        ("algorithm.pretraining", {"epoch": -1}, "algorithm.pretraining.epoch: "),
        ("algorithm.statistics", {"demonstration_std": None}, "algorithm.statistics"),
        ("version", 2, "it has version 2, and this fastrlhf reads 1; update fastrlhf"),
        ("version", 0, "version: "),
        ("version", "1", "version: "),
    ],
)
def test_a_wrong_state_is_one_line(keys: str, value: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(changed(STATE, keys, value)))
    with pytest.raises(UserError) as no:
        read_state(tmp_path)
    assert str(no.value).startswith(f"{path}: not the state of a run ({expected}")
    assert "\n" not in str(no.value) and len(str(no.value)) < 400


TEXTS = [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b"\0\0", b'{"step": 1']


@pytest.mark.parametrize("text", TEXTS)
def test_a_state_that_is_no_object_is_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(text)
    with pytest.raises(UserError, match=r"state\.json: not the state of a run \(.+\)$"):
        read_state(tmp_path)


def test_a_state_without_a_version_is_today_s(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for content in (STATE, {**STATE, "version": 1}, {**STATE, "note": "kept"}):
        path.write_text(json.dumps(content))
        assert read_state(tmp_path) == content


def test_files_are_written_with_their_version(written: Checkpointer) -> None:
    state = json.loads((written.path(3) / "state.json").read_text())
    model = json.loads((written.path(3) / "policy" / "model.json").read_text())
    assert (state["version"], model["version"]) == (1, 2)


def test_a_version_of_an_unknown_package_is_logged(
    written: Checkpointer, training: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastrlhf")
    path = written.path(3) / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(changed(content, "versions.apex", "0.1")))
    assert written.load(written.path(3), training())["step"] == 3
    assert f"resuming with apex not recorded (was 0.1 in {path})" in caplog.messages


@pytest.mark.parametrize("error", [KeyError("samples"), TypeError("int"), AttributeError("x")])
def test_another_commands_state_is_one_line(
    error: Exception, written: Checkpointer, training: Callable[..., Any]
) -> None:
    live = training()

    def refuse(state: object) -> None:
        raise error

    algorithm: Any = SimpleNamespace(
        models=live.models, learners=live.learners, load_state_dict=refuse, statistics=dict
    )
    config: Any = SimpleNamespace(checkpoint=written.config)
    with pytest.raises(UserError, match=r"state\.json: not the state of this command's run"):
        resume(config, algorithm, algorithm, written)


# ---- model.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("vocab_size", 3.5),
        ("vocab_size", 0),
        ("vocab_size", "101"),
        ("vocab_size", REMOVED),
        ("head", "both"),
        ("head", REMOVED),
        ("tokenizer", None),
        ("statistics", {"mean": "x"}),
        ("statistics", []),
        ("model", []),
        ("model", REMOVED),
        ("model.num_layers", -1),
        ("model.num_layers", "two"),
        ("model.unknown", 1),
        ("unknown", 1),
        ("un\0known\x1b[31m", 1),
        ("path", "/tmp"),
        ("version", 7),
    ],
)
def test_a_wrong_description_is_one_line(keys: str, value: Any, written: Checkpointer) -> None:
    path = written.path(3) / "policy" / "model.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(changed(content, keys, value)))
    with pytest.raises(UserError) as no:
        describe_model(written.path(3))
    assert str(no.value).startswith(f"{path}: not the description of a model (")
    assert str(no.value).isprintable() and "errors.pydantic.dev" not in str(no.value)


@pytest.mark.parametrize("text", TEXTS)
def test_a_description_that_is_no_object_is_one_line(text: bytes, written: Checkpointer) -> None:
    (written.path(3) / "policy" / "model.json").write_bytes(text)
    with pytest.raises(UserError, match=r"model\.json: not the description of a model \(.+\)$"):
        describe_model(written.path(3))


def test_a_description_without_version_and_statistics_is_today_s(written: Checkpointer) -> None:
    path = written.path(3) / "policy" / "model.json"
    expected = describe_model(written.path(3))
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: content[k] for k in ("model", "vocab_size", "head", "tokenizer")})
    )
    assert describe_model(written.path(3)) == expected


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../other", "a/../../b", "..", "", ".", "C:/x", "a\0b"]
)
def test_names_stay_inside_the_folder(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, {name: {"bytes": 1, "blake2b": "00"}})
    with pytest.raises(DamagedManifestError, match=r"files\.json is damaged: it names .* outside"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match=r"files\.json is damaged: it names .* outside"):
        shard_reader(tmp_path)


@pytest.mark.parametrize("entry", [None, 3, {}, {"bytes": "1", "blake2b": "0"}, {"bytes": 1}])
def test_entries_have_their_types(entry: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path, {"a": entry})
    with pytest.raises(DamagedManifestError, match=r"files\.json is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("note", ['{"../../x/y": {}}', "{", "3", "null", '{"/a/b": {}}'])
def test_a_damaged_note_completes_no_folder(note: str, tmp_path: Path) -> None:
    partial = tmp_path / "run" / "step_00000001.partial"
    partial.mkdir(parents=True)
    (partial / "written_00000_of_00001.json").write_text(note)
    assert commit_if_complete(partial) is None
    assert [path.name for path in tmp_path.rglob("files.json")] == []


@pytest.mark.parametrize(
    "target", ["../elsewhere", "/absolute", "a/b", "..", "x" * 70_000, "a\0b", "\x1b[31m"]
)
def test_latest_names_a_folder_next_to_it(target: str, written: Checkpointer) -> None:
    (written.folder / "latest").write_text(target)
    with pytest.raises(UserError, match="no model here") as no:
        describe_model(written.folder.parent)
    assert len(str(no.value)) < 400


def test_a_folder_without_shards_is_named(written: Checkpointer) -> None:
    """A manifest that lists no shard file is intact, but the folder has no weights."""
    folder = written.path(3) / "policy"
    saved = describe_model(folder)
    write_manifest(folder, {})
    assert shard_reader(saved.path).folder == str(folder)
