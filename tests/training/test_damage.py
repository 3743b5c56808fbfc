"""A damaged checkpoint is reported with file and fault, and the previous one is used.

No file of a checkpoint is ever unpickled.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.checkpoint.model_folder import describe_model, load_model
from fastrlhf.errors import UserError

FILES = {
    "config.yaml",
    "files.json",
    "policy.optimizer/files.json",
    "policy.optimizer/rank_00000.safetensors",
    "policy/files.json",
    "policy/model.json",
    "policy/rank_00000.safetensors",
    "random/files.json",
    "random/rank_00000.safetensors",
    "state.json",
}


@pytest.fixture(scope="module")
def saved(mesh: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints of steps 1 and 2."""
    from fastrlhf.config import CheckpointConfig, ModelConfig

    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    writer = Checkpointer(
        mesh, folder, CheckpointConfig(asynchronous=False), config_text="a: 1\n", tokenizer=""
    )
    training = script.Training(mesh, ModelConfig(**script.MODELS["tied"], dtype="fp32"))
    for step in (1, 2):
        training.steps([step])
        writer.save(step, training, {"step": step})
    return folder


@pytest.fixture
def reader(saved: Path, checkpointer: Callable[..., Checkpointer]) -> Checkpointer:
    """Return a checkpointer on a copy of the folder."""
    reader = checkpointer()
    shutil.copytree(saved, reader.folder)
    return reader


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_these_are_all_files(saved: Path) -> None:
    assert {
        str(path.relative_to(saved / "step_00000002")) for path in files_of(saved / "step_00000002")
    } == FILES


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_to_any_file_is_reported_and_the_previous_one_is_used(
    name: str,
    damage: Callable[[Path], None],
    reader: Checkpointer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(reader.path(2) / name)
    assert reader.newest() == reader.path(1)
    fault = {
        "truncate": r"bytes instead of|is damaged",
        "flip": "is damaged",
        "unlink": "is missing|cannot be read",
    }
    (line,) = caplog.messages
    assert (
        str(reader.path(2) / name) in line and "trying the checkpoint before step_00000002" in line
    )
    assert any(word in line for word in fault[damage.__name__].split("|"))


def test_every_byte_of_the_manifest_is_checked(reader: Checkpointer) -> None:
    path = reader.path(2) / "files.json"
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert reader.newest() == reader.path(1), place
    path.write_bytes(content)
    assert reader.newest() == reader.path(2)


def test_none_is_intact(reader: Checkpointer) -> None:
    for step in (1, 2):
        flip(reader.path(step) / "policy" / "rank_00000.safetensors")
    with pytest.raises(
        UserError, match=r"none of the 2 checkpoints in .* is intact: .*step_00000002.*is damaged"
    ):
        reader.newest()


@pytest.mark.parametrize("text", [None, "", "step_00000009", "\xff"])
def test_a_pointer_to_nothing(
    text: str | None, reader: Checkpointer, caplog: pytest.LogCaptureFixture
) -> None:
    (reader.folder / "latest").unlink()
    if text is not None:
        (reader.folder / "latest").write_text(text, encoding="latin-1")
    assert reader.newest() == reader.path(2)
    assert "names no checkpoint; taking the newest" in caplog.text


def test_a_pointer_to_an_older_one_is_followed_and_the_newer_is_renamed(
    reader: Checkpointer, training: Callable[..., Any]
) -> None:
    (reader.folder / "latest").write_text("step_00000001")
    newest = reader.newest()
    assert newest == reader.path(1)
    assert reader.load(newest, training())["step"] == 1
    assert (
        not reader.path(2).exists()
        and (reader.folder / "step_00000002.unused1" / "state.json").is_file()
    )
    (reader.folder / "latest").unlink()
    assert reader.newest() == reader.path(1)


def test_models_to_start_from_are_verified_too(
    reader: Checkpointer, training: Callable[..., Any]
) -> None:
    path = reader.path(2) / "policy" / "rank_00000.safetensors"
    flip(path)
    with pytest.raises(UserError, match=rf"{path} is damaged.*take another checkpoint"):
        load_model(describe_model(reader.folder.parent), training().stage)
    (reader.path(2) / "policy" / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.json: not the description of a model"):
        describe_model(reader.path(2))


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return open, (str(self.mark), "w")


def test_pickles_planted_in_a_checkpoint_are_not_run(
    reader: Checkpointer,
    training: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pickles replace every file, with matching hashes, and have the names of other formats."""
    from fastrlhf.checkpoint.integrity import hash_and_sync, write_manifest

    mark = tmp_path / "executed"
    with pytest.raises(TypeError):  # the bomb works
        pickle.loads(pickle.dumps(Bomb(mark))) + 1
    mark.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    bombs = {"plain": pickle.dumps(Bomb(mark))}
    torch.save(Bomb(mark), tmp_path / "bomb.pt")
    bombs["torch"] = (tmp_path / "bomb.pt").read_bytes()
    for content in bombs.values():
        for name in sorted(FILES - {name for name in FILES if name.endswith("files.json")}):
            folder = shutil.copytree(reader.path(1), tmp_path / "planted")
            for extra in (
                "common.pt",
                ".metadata",
                "__0_0.distcp",
                "rank_00009.safetensors",
                "pytorch_model.bin",
            ):
                (folder / "policy" / extra).write_bytes(content)
            (folder / name).write_bytes(content)
            for part in (folder / "policy", folder / "policy.optimizer", folder / "random", folder):
                (part / "files.json").unlink()
                entries = {str(f.relative_to(part)): hash_and_sync(f) for f in files_of(part)}
                write_manifest(part, entries)
            with pytest.raises(Exception):  # noqa: B017 (any error will do)
                reader.load(folder, training())
            shutil.rmtree(folder)
    assert not mark.exists()
