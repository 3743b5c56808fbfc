from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastrlhf.config import Config, load_config

MINIMAL = """\
model:
  family: gpt
  num_layers: 4
  hidden_size: 64
  num_heads: 4
  max_positions: 2048
data:
  tokenizer: tok
  train: a.jsonl
optimizer:
  lr: 9e-6
output_dir: runs/x
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def make(minimal: Path) -> Callable[..., Config]:
    """Return a function that loads the minimal configuration with overrides."""
    return lambda *overrides: load_config(minimal, list(overrides))
