"""Every file in configs/ is valid for its command and has the paper's values (arXiv 2203.02155)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastrlhf.config import Config, check_batch, load_config, require
from fastrlhf.data.records import read_records

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("configs/**/*.yaml"))
COMMANDS = {"rl_init": "sft", "ppo_ptx": "ppo"}
SIZES = ["1.3b", "6b", "175b"]


def shipped(name: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml")


def test_all_are_here():
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in SHIPPED}
    instructgpt = {
        f"instructgpt/{size}/{run}" for size in SIZES for run in ("sft", "rl_init", "rm", "ppo_ptx")
    }
    assert instructgpt | {f"debug/{run}" for run in ("pretrain", "sft", "rm", "ppo")} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_is_valid_for_its_command(path):
    require(load_config(path), COMMANDS.get(path.stem, path.stem))


@pytest.mark.parametrize(
    ("size", "shape"), [("1.3b", (24, 2048, 16)), ("6b", (32, 4096, 32)), ("175b", (96, 12288, 96))]
)
def test_shapes_are_gpt3s(size, shape):
    for run in ("sft", "rl_init", "ppo_ptx"):
        model = shipped(f"instructgpt/{size}/{run}").model
        assert (model.num_layers, model.hidden_size, model.num_heads) == shape
        assert (model.head_dim, model.ffn_size, model.vocab_size) == (
            128,
            4 * model.hidden_size,
            50257,
        )
        assert (model.max_positions, model.position, model.norm, model.bias) == (
            2048,
            "learned",
            "layernorm",
            True,
        )


@pytest.mark.parametrize(
    ("size", "lr", "batch", "rl_lr", "value_lr"),
    [
        ("1.3b", 9.65e-6, 32, 5e-6, 9e-6),
        ("6b", 9.65e-6, 32, 1.04e-5, 9e-6),
        ("175b", 5.03e-6, 8, 2.45e-6, 5e-6),
    ],
)
def test_figures_are_the_papers(size, lr, batch, rl_lr, value_lr):
    sft, init, ppo = (shipped(f"instructgpt/{size}/{run}") for run in ("sft", "rl_init", "ppo_ptx"))
    assert (sft.optimizer.lr, sft.train.global_batch_size, sft.train.epochs) == (lr, batch, 16)
    assert (sft.model.residual_dropout, sft.schedule.decay, sft.schedule.min_lr_ratio) == (
        0.2,
        "cosine",
        0.1,
    )
    assert (init.optimizer.lr, init.train.epochs, init.data.pretrain_fraction) == (rl_lr, 2, 0.1)
    assert (ppo.train.steps or 0) * ppo.ppo.batch_size == 256_000
    assert (ppo.ppo.minibatch_size, ppo.ppo.inner_epochs, ppo.ppo.clip) == (64, 1, 0.2)
    assert (ppo.ppo.kl_coef, ppo.ppo.gamma_ptx, ppo.ppo.ptx_per_episode) == (0.02, 27.8, 8)
    assert (ppo.ppo.ema_decay, ppo.ppo.gamma, ppo.ppo.value_lr) == (0.992, 1.0, value_lr)
    assert (ppo.schedule.decay, ppo.schedule.warmup_steps, ppo.schedule.warmup_start) == (
        "constant",
        10,
        0.1,
    )
    for config in (sft, init, ppo):
        assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
        assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (1024, 1024)


def test_one_reward_model_for_every_policy():
    rm = shipped("instructgpt/6b/rm")
    assert (rm.model.num_layers, rm.model.hidden_size) == (32, 4096)
    assert (rm.optimizer.lr, rm.train.epochs, rm.train.global_batch_size) == (9e-6, 1, 64)
    for size in SIZES:
        assert shipped(f"instructgpt/{size}/rm") == rm
        assert shipped(f"instructgpt/{size}/ppo_ptx").ppo.reward_model == rm.output_dir


@pytest.mark.parametrize(
    ("name", "gpus", "key"),
    [
        ("1.3b/sft", 8, "train.global_batch_size"),
        ("6b/sft", 8, "train.global_batch_size"),
        ("175b/sft", 128, "train.global_batch_size"),
        ("6b/rm", 8, "train.global_batch_size"),
        ("1.3b/ppo_ptx", 16, "ppo.minibatch_size"),
        ("6b/ppo_ptx", 32, "ppo.minibatch_size"),
        ("175b/ppo_ptx", 256, "ppo.minibatch_size"),
    ],
)
def test_layouts_fit_the_gpus_they_name(name, gpus, key):
    path = ROOT / "configs" / "instructgpt" / f"{name}.yaml"
    assert f"for {gpus} GPUs" in path.read_text()
    config = load_config(path)
    ranks = config.parallel.tensor * config.parallel.pipeline
    assert gpus % ranks == 0
    assert check_batch(config, gpus // ranks, key) >= 1


def test_the_four_stages_read_what_the_others_write():
    pretrain, sft, rm, ppo = (
        shipped(f"debug/{stage}") for stage in ("pretrain", "sft", "rm", "ppo")
    )
    assert (sft.model.load, rm.model.load, ppo.model.load) == (
        pretrain.output_dir,
        sft.output_dir,
        sft.output_dir,
    )
    assert ppo.ppo.reward_model == rm.output_dir
    for size in SIZES:
        init, ppo = shipped(f"instructgpt/{size}/rl_init"), shipped(f"instructgpt/{size}/ppo_ptx")
        assert ppo.model.load == init.output_dir
    assert shipped("instructgpt/6b/rm").model.load == shipped("instructgpt/6b/sft").output_dir


def test_debug_data_are_what_the_debug_configurations_read(tmp_path):
    out = tmp_path / "runs" / "debug" / "data"
    subprocess.run(
        [sys.executable, ROOT / "configs" / "debug" / "make_data.py", out], check=True, timeout=1800
    )
    kinds = {"pretrain": "text", "sft": "demonstrations", "rm": "rankings", "ppo": "prompts"}
    for stage, kind in kinds.items():
        data = shipped(f"debug/{stage}").data
        paths = data.prompts if stage == "ppo" else data.train
        assert paths is not None
        records = list(read_records([tmp_path / path for path in paths], kind, "strict", None))
        assert len(records) >= 100
        assert (tmp_path / data.tokenizer / "tokenizer.json").is_file()
