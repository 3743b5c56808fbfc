"""Mistakes around an existing run: one line, status 2, and no computed result is lost."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import GPT2Config, GPT2LMHeadModel

from fastrlhf import cli
from fastrlhf.data.tokenize import train_bpe
from fastrlhf.parallel import mesh as meshes

CONFIG = """\
model: {{family: gpt, num_layers: 1, hidden_size: 16, num_heads: 2, max_positions: 64,
  vocab_size: 300, dtype: fp32}}
data:
  tokenizer: {folder}/tokenizer
  train: {folder}/demonstrations.jsonl
  prompts: {folder}/prompts.jsonl
  max_prompt_tokens: 16
  max_response_tokens: 16
optimizer: {{lr: 1e-3}}
train: {{steps: 1, global_batch_size: 2}}
generation: {{max_new_tokens: 4}}
sample: {{k: 2}}
log: {{tensorboard: false}}
output_dir: {folder}/sft
"""


def write(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fastrlhf(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["fastrlhf", *map(str, arguments)])
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a finished SFT run of one step, and the files to continue with."""
    folder = tmp_path_factory.mktemp("runs")
    train_bpe(["the cat sat on the mat"] * 4, 270, folder / "tokenizer")
    train_bpe(["a dog ran"] * 4, 262, folder / "other_tokenizer")
    write(
        folder / "demonstrations.jsonl",
        *({"prompt": f"cat {i}", "response": f"mat {i}"} for i in range(4)),
    )
    write(
        folder / "rankings.jsonl",
        *({"prompt": "a", "chosen": f"{i}", "rejected": "mat"} for i in range(4)),
    )
    write(folder / "prompts.jsonl", {"prompt": "the cat"})
    (folder / "t.txt").write_text("the cat sat")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    assert fastrlhf("sft", folder / "run.yaml") == 0
    yield folder
    meshes.finalize()


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    """Return `refused(COMMAND, settings...)`, the line of a command that exits with status 2."""

    def call(command: str, *settings: str) -> str:
        capfd.readouterr()
        assert fastrlhf(*command.split(), folder / "run.yaml", *settings) == 2
        [line] = [
            line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        return line

    return call


def test_a_run_says_where_its_report_is(folder, capfd):
    assert (
        fastrlhf("sft", folder / "run.yaml", f"output_dir={folder}/again", "checkpoint.save=false")
        == 0
    )
    assert capfd.readouterr().out == f"{folder}/again/report.html: sft finished after step 1\n"


def test_another_commands_run_is_left_as_it_was(folder, refused):
    before = (folder / "sft" / "config.yaml").read_text()
    line = refused("rm", f"data.train={folder}/rankings.jsonl")
    assert line.endswith(
        "has no reward, so it is of another command's run; give another output_dir"
    )
    line = refused("sft", "train.seed=5", "train.steps=2")
    assert "cannot resume the data order" in line
    assert (folder / "sft" / "config.yaml").read_text() == before


def test_one_run_a_folder_at_a_time(folder, refused):
    with FileLock(folder / "sft" / ".lock"):
        assert "another run is writing it" in refused("sft", "train.steps=2")


@pytest.mark.parametrize("command", ["sft", "pretrain", "sample", "eval winrate"])
def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_computed(
    folder, refused, command
):
    models = [f"model.load={folder}/sft", f"eval.baseline={folder}/sft", "eval.judge=math:prod"]
    line = refused(
        command, f"output_dir={folder}/prompts.jsonl/x", "data.sequence_length=8", *models
    )
    assert f"{folder}/prompts.jsonl" in line
    assert "cannot be written" in line


@pytest.mark.parametrize(
    ("setting", "package"),
    [("log.wandb_project=x", "wandb"), ("model.attention=flash", "flash_attn")],
)
def test_a_package_that_is_not_there(folder, refused, monkeypatch, setting, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )
    line = refused("sft", setting, "model.dtype=bf16", f"output_dir={folder}/new")
    assert f"needs the package {package.replace('_', '-')}, which is not installed" in line


def test_weights_and_biases_without_a_key_is_reported_before_the_models_are_built(
    folder, refused, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find("json" if name == "wandb" else name)
    )
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "none"))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("HOME", str(folder))
    missing = ["log.wandb_project=x", f"output_dir={folder}/new", f"model.load={folder}/missing"]
    assert "needs a key for Weights & Biases: run wandb login" in refused("sft", *missing)
    # With a key, or without a need of one, the next check is reached.
    (folder / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert "missing" in refused("sft", *missing)
    (folder / "netrc").write_text("machine example.org login user password 0123\n")
    assert "needs a key" in refused("sft", *missing)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "missing" in refused("sft", *missing)


def test_converting_into_a_folder_that_cannot_be_written(folder, capfd):
    assert fastrlhf("convert", "to-hf", folder / "sft", folder / "prompts.jsonl" / "hf") == 2
    assert "prompts.jsonl: cannot be written" in capfd.readouterr().err


def test_data_commands_into_a_folder_that_cannot_be_written(folder, capfd):
    out, prompts = folder / "prompts.jsonl" / "x", folder / "prompts.jsonl"
    assert fastrlhf("data", "prepare", prompts, "--out", out) == 2
    assert (
        fastrlhf(
            "data",
            "tokenize",
            folder / "t.txt",
            "--tokenizer",
            folder / "tokenizer",
            "--out",
            out / "t",
        )
        == 2
    )
    assert capfd.readouterr().err.count("x: cannot be written") == 2


def test_models_are_looked_for_before_the_data(folder, refused):
    start = [f"output_dir={folder}/new", "data.train=missing.jsonl"]
    assert "nothing: no model here" in refused("sft", "model.load=nothing", *start)
    ppo = [
        "ppo.gamma_ptx=0",
        "ppo.batch_size=8",
        "ppo.minibatch_size=8",
        "data.prompts=missing.jsonl",
    ]
    assert "nothing: no model here" in refused("ppo", "ppo.reward_model=nothing", *start, *ppo)
    shape = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(shape).save_pretrained(folder / "hf")
    assert "give it as model.hf" in refused("sft", f"model.load={folder}/hf", *start)


@pytest.mark.parametrize("command", ["sft", "sample", "eval winrate"])
def test_a_tokenizer_that_does_not_fit(folder, refused, command):
    """Nothing would fail with fewer tokens than the model: ids would only mean something else."""
    settings = [f"data.tokenizer={folder}/other_tokenizer", f"model.load={folder}/sft"]
    judge = [f"eval.baseline={folder}/sft", "eval.judge=math:prod"]
    line = refused(command, *settings, *judge, f"output_dir={folder}/new")
    assert "was trained with the tokenizer" in line and line.endswith(
        f"set data.tokenizer={folder}/tokenizer"
    )


def test_a_reward_model_of_another_tokenizer(folder, refused):
    other = [f"data.tokenizer={folder}/other_tokenizer", f"output_dir={folder}/other_rm"]
    assert fastrlhf("rm", folder / "run.yaml", *other, f"data.train={folder}/rankings.jsonl") == 0
    ppo = [
        "ppo.gamma_ptx=0",
        "ppo.batch_size=1",
        "ppo.minibatch_size=1",
        f"ppo.reward_model={folder}/other_rm",
    ]
    line = refused("ppo", f"model.load={folder}/sft", f"output_dir={folder}/new", *ppo)
    assert f"was trained with the tokenizer {folder}/other_tokenizer" in line


def test_sample_overwrites_nothing(folder):
    samples = folder / "samples" / "samples.jsonl"
    contents = []
    for seed in (3, 4):
        settings = [
            f"model.load={folder}/sft",
            f"output_dir={folder}/samples",
            f"train.seed={seed}",
        ]
        assert fastrlhf("sample", folder / "run.yaml", *settings) == 0
        contents.append(samples.read_bytes())
    assert contents[0] != contents[1]
    assert samples.with_name("samples.jsonl.unused1").read_bytes() == contents[0]
