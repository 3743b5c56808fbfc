"""train.eval_batches bounds a validation, and only a validation; impossible sizes are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrlhf.config import ParallelConfig, load_config
from fastrlhf.data.tokenize import train_bpe
from fastrlhf.errors import UserError
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run.builder import RunBuilder
from fastrlhf.run.train import train

CONFIG = """\
model: {{family: gpt, num_layers: 1, hidden_size: 16, num_heads: 2, max_positions: 64, dtype: fp32}}
data: {{tokenizer: {folder}/tokenizer, train: {folder}/train.jsonl, valid: {folder}/valid.jsonl,
  max_prompt_tokens: 16, max_response_tokens: 16}}
optimizer: {{lr: 1e-3}}
train: {{steps: 1, global_batch_size: 2}}
checkpoint: {{save: false}}
log: {{tensorboard: false, progress: false}}
output_dir: {folder}/run
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_bpe(["the cat sat on the mat"] * 4, 270, tmp_path / "tokenizer")
    rows = [{"prompt": f"cat {i}", "response": "mat " * (i + 1)} for i in range(5)]
    for name, chosen in (("train", rows), ("valid", rows), ("first", rows[:2])):
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def valid_loss(folder: Path, name: str, *overrides: str) -> float:
    out = folder / name
    train("sft", load_config(folder / "run.yaml", [f"output_dir={out}", *overrides]))
    meshes.finalize()
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]


def test_a_validation_ends_after_eval_batches(folder: Path):
    whole = valid_loss(folder, "whole")
    first = valid_loss(folder, "first", f"data.valid={folder}/first.jsonl")
    assert valid_loss(folder, "limited", "train.eval_batches=1") == first != whole
    assert valid_loss(folder, "large", "train.eval_batches=9") == whole


def test_every_validation_reads_the_same_batches_and_other_passes_read_all(folder: Path):
    config = load_config(folder / "run.yaml", ["train.eval_batches=2"])
    with meshes.joined(ParallelConfig(), 0) as mesh:
        run = RunBuilder(config, mesh)
        validation = run.validation(list(range(5)), list)
        assert list(validation()) == list(validation()) == [[[0], [1]], [[2], [3]]]
        assert list(run.one_pass(list(range(5)), list)()) == [[[0], [1]], [[2], [3]], [[4]]]


def test_a_model_larger_than_memory_is_refused_before_it_is_built(folder: Path):
    large = ["model.hidden_size=100000", "model.num_heads=100", "model.num_layers=100"]
    with pytest.raises(UserError, match=r"^model: its 1.2e\+13 weights take 48000 GB on each rank"):
        train("sft", load_config(folder / "run.yaml", large))
    meshes.finalize()
