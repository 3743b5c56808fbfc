"""The table of training commands: each row can be built, and one row adds an algorithm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrlhf import ops
from fastrlhf.algorithms.sft import SupervisedFinetuning, counted_tokens
from fastrlhf.config import TRAINING_COMMANDS, TrainingCommand, load_config, training_command
from fastrlhf.data.batches import PackedBatch, demonstration_tokens, pack_demonstrations
from fastrlhf.data.tokenize import train_bpe
from fastrlhf.errors import UserError
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import jobs
from fastrlhf.run.builder import RunBuilder
from fastrlhf.run.train import train

ROOT = Path(__file__).parents[2]
CONFIG = """\
model: {{family: gpt, num_layers: 1, hidden_size: 16, num_heads: 2, max_positions: 64, dtype: fp32}}
data: {{tokenizer: {folder}/tokenizer, train: {folder}/demonstrations.jsonl}}
optimizer: {{lr: 3e-2}}
schedule: {{decay: constant}}
train: {{steps: 20, global_batch_size: 4, micro_batch_size: 4}}
log: {{tensorboard: false, progress: false}}
output_dir: {folder}/run
"""


class Unlikelihood(SupervisedFinetuning):
    """A toy algorithm: lower the likelihood of the demonstrations."""

    def step(self, micro_batches: list[PackedBatch]) -> dict[str, float]:
        tokens = counted_tokens(self.mesh, micro_batches)

        def head(hidden: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
            chosen = ops.linear_logprobs(
                hidden, labels=batch.labels, mask=batch.loss_mask, **self.policy.model.lm_head()
            ).logprobs
            loss = -torch.log1p(-chosen.exp() * batch.loss_mask * 0.999).sum() / tokens
            return loss, {"loss": loss.detach()}

        metrics = self.mesh.sum_metrics(self.policy.accumulate(micro_batches, head), ["loss"])
        return metrics | self.policy.step()


def unlikelihood_job(run: RunBuilder) -> jobs.TrainingJob[Unlikelihood]:
    dataset = run.demonstrations(run.config.data.train or [])
    batches = run.loader(dataset, pack_demonstrations, cost=demonstration_tokens)
    total_steps = run.total_steps(batches)
    policy = run.learner(run.model(run.config.model, "lm"), total_steps)
    return jobs.TrainingJob(Unlikelihood(run.mesh, policy), batches, total_steps)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    train_bpe(["the cat sat on the mat"] * 4, 270, tmp_path / "tokenizer")
    rows = [{"prompt": f"cat {i}", "response": "sat on the mat"} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "demonstrations.jsonl").write_text(lines)
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "run.yaml"


def test_every_row_has_a_job():
    for row in TRAINING_COMMANDS.values():
        assert callable(jobs.job_builder(row)), row.name


def test_an_unknown_command_is_one_line(config: Path):
    with pytest.raises(UserError, match="unknown training command 'dpo'; expected one of pretrain"):
        train("dpo", load_config(config))


def test_a_row_a_job_and_a_class_add_an_algorithm(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The steps of "Add an algorithm" in docs/extending.md, with no other file changed."""
    sft = training_command("sft")
    row = TrainingCommand(
        name="unlikelihood",
        summary="Lower the likelihood of demonstrations.",
        sections=sft.sections,
        required=sft.required,
        longest_sequence=sft.longest_sequence,
        check=sft.check,
        job="unlikelihood_job",
    )
    monkeypatch.setitem(TRAINING_COMMANDS, row.name, row)
    monkeypatch.setattr(jobs, row.job, unlikelihood_job, raising=False)
    short = ["data.max_prompt_tokens=16", "data.max_response_tokens=16"]
    train(row.name, load_config(config, short))
    meshes.finalize()
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20 and 0 < losses[-1] < 0.5 * losses[0]
    assert (config.parent / "run" / "checkpoints" / "step_00000020" / "policy").is_dir()


def test_a_row_is_a_command_with_help(tmp_path: Path):
    """In a new process, since the command line reads the table when it is imported."""
    code = """
import sys
from fastrlhf.config import commands
row = commands.TRAINING_COMMANDS["sft"]
commands.TRAINING_COMMANDS["toy"] = commands.TrainingCommand(
    name="toy", summary="A toy.", sections=row.sections, required=row.required, job="sft_job")
from fastrlhf import cli
sys.argv = ["fastrlhf", "toy", "--help"]
cli.main()
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith("Usage: fastrlhf toy") and "A toy." in shown
    assert "data.train" in shown and "optimizer" in shown
