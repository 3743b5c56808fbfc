"""A small model in training, with everything that a checkpoint holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.checkpoint.checkpointer import Checkpointer
from fastrlhf.config import CheckpointConfig, ModelConfig
from fastrlhf.parallel.mesh import Mesh

SCRIPT = Path(__file__).parents[1] / "parallel" / "run_training.py"


@pytest.fixture(scope="session")
def script(imported: Callable[[Path], ModuleType]) -> ModuleType:
    """Return the module with the models and batches of the tests of parallel layouts."""
    return imported(SCRIPT)


@pytest.fixture
def training(script: Any, mesh: Mesh) -> Callable[..., Any]:
    """Return `training(dtype, seed=..., **optimizer)`, which builds a tied GPT and its learner."""
    seeds = itertools.count(1)

    def build(dtype: str = "fp32", **options: Any) -> Any:
        model = ModelConfig(**script.MODELS["tied"], dtype=dtype)  # type: ignore[arg-type]
        return script.Training(mesh, model, **{"seed": next(seeds), **options})

    return build


@pytest.fixture
def checkpointer(mesh: Mesh, tmp_path: Path) -> Callable[..., Checkpointer]:
    """Return `checkpointer(**section)`, which uses the folder tmp_path/checkpoints."""

    def build(config_text: str = "", **section: Any) -> Checkpointer:
        config = CheckpointConfig(**{"asynchronous": False, **section})
        return Checkpointer(mesh, tmp_path / "checkpoints", config, config_text, tokenizer="")

    return build
