"""`fastrlhf eval rm` on a reward model that has learned a known rule, and its cross-validation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrlhf.algorithms.rm import score_rankings
from fastrlhf.cli import app
from fastrlhf.commands import eval_reward
from fastrlhf.config import Config, load_config
from fastrlhf.data.batches import pack_rankings
from fastrlhf.data.datasets import load_rankings
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
from fastrlhf.errors import UserError
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import builder, train

CONFIG = """
model: {family: gpt, num_layers: 1, hidden_size: 32, num_heads: 2, max_positions: 64, dtype: fp32}
data: {max_prompt_tokens: 24, max_response_tokens: 24}
optimizer: {lr: 1.0e-2}
schedule: {decay: constant}
train: {steps: 25, global_batch_size: 12, micro_batch_size: 4}
log: {progress: false, tensorboard: false}
"""
WORDS = [
    "red",
    "green",
    "blue",
    "round",
    "square",
    "small",
    "large",
    "quick",
    "slow",
    "warm",
    "cold",
    "plain",
]


def rankings(count: int, seed: int, first: int = 0) -> list[dict[str, Any]]:
    """Draw rankings in which more "yes" and fewer words are better.

    So the length rule is always wrong. Five labelers alternate.
    """
    rng = random.Random(seed)
    rows = []
    for number in range(first, first + count):
        K = rng.choice((2, 3, 4))
        order = rng.sample(range(K), K)
        texts = ["yes " * (K - rank) + " ".join(rng.sample(WORDS, 3 + 3 * rank)) for rank in order]
        prompt = f"What is {number} {rng.choice(WORDS)}?"
        rows.append(
            {
                "prompt": prompt,
                "responses": texts,
                "ranks": order,
                "labeler_id": f"labeler {number % 5}",
            }
        )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval_rm")
    train, valid = rankings(60, 0), rankings(30, 1, first=100)
    # A second labeler ranked two prompts: one in the same order, one in reverse.
    again = [{**row, "labeler_id": "second"} for row in valid[:2]]
    again[1] = {**again[1], "ranks": [-rank for rank in again[1]["ranks"]]}
    for name, rows in (("train", train), ("valid", valid + again)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_bpe((" ".join(row["responses"]) for row in train), 300, folder / "tokenizer")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def configure(folder: Path) -> Iterator[Callable[..., Config]]:
    def build(name: str, *overrides: str) -> Config:
        files = [f"data.{part}={folder / f'{part}.jsonl'}" for part in ("train", "valid")]
        common = [f"data.tokenizer={folder / 'tokenizer'}", f"output_dir={folder / name}"]
        return load_config(folder / "config.yaml", [*common, *files, *overrides])

    yield build
    meshes.finalize()


@pytest.fixture(scope="module")
def trained(configure: Callable[..., Config], folder: Path) -> Path:
    train.train("rm", configure("rm"))
    return folder / "rm"


def test_evaluation_of_a_trained_model(
    configure: Callable[..., Config], trained: Path, capsys: Any
) -> None:
    config = configure("judged", f"model.load={trained}")
    results = eval_reward.evaluate(config)
    out = Path(config.output_dir)
    assert json.loads((out / "eval_rm.json").read_text()) == results
    assert f"{results['accuracy']['rate']:.3f}" in (out / "eval_rm.html").read_text()
    assert capsys.readouterr().out.startswith(
        f"{out / 'eval_rm.html'}: accuracy {results['accuracy']['rate']:.3f}"
    )
    # The last step of training evaluated the same weights on the same file.
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert results["accuracy"]["rate"] == pytest.approx(last["valid_accuracy"])
    assert results["margin"] == pytest.approx(last["valid_margin"], rel=1e-4)
    # A perfect model gets only the reversed ranking wrong, and the length rule only that one right.
    assert results["accuracy"]["rate"] > 0.85 and results["length_rule"]["rate"] < 0.15
    assert results["above_length_rule"]["low"] > 0.5
    assert set(results["accuracy_by_k"]) == {"2", "3", "4"} and set(
        results["accuracy_by_distance"]
    ) == {"1", "2", "3"}
    assert 0 < results["agreement"]["rate"] < 1
    assert set(results["agreement"]["by_labeler"]) == {"labeler 0", "labeler 1", "second"}


def test_micro_batches_do_not_change_scores(
    configure: Callable[..., Config], trained: Path, folder: Path
) -> None:
    config = configure("rm", f"model.load={trained}", "generation.max_new_tokens=24")
    groups, _ = load_rankings(
        folder / "valid.jsonl",
        load_tokenizer(folder / "tokenizer"),
        max_prompt_tokens=24,
        max_response_tokens=24,
    )
    mesh = meshes.initialize(config.parallel, 0)
    stage = builder.RunBuilder(config, mesh).reward(str(trained)).train()
    ways: list[dict[str, Any]] = [
        {"micro_batch_size": 1},
        {"micro_batch_size": 7, "shared_prompt": False},
        {"micro_batch_size": 1, "max_tokens": 150},
    ]
    for way in ways:
        scores = score_rankings(mesh, stage, groups, **way)
        assert stage.training
        for group, group_scores in zip(groups, scores, strict=True):
            batch = pack_rankings([group])
            with torch.no_grad():
                expected = stage.eval().score(stage(batch)[batch.last_index])
            stage.train()
            torch.testing.assert_close(group_scores, expected, atol=1e-5, rtol=1e-5)


def test_cross_validation_over_labelers(
    configure: Callable[..., Config], folder: Path, capsys: Any
) -> None:
    config = configure("folds", "checkpoint.save=true")
    results = eval_reward.cross_validate(config, 2)
    out = Path(config.output_dir)
    assert json.loads((out / "eval_rm_folds.json").read_text()) == results
    first, second = (set(fold["labelers"]) for fold in results["folds"])
    assert first | second == {f"labeler {i}" for i in range(5)} and not first & second
    assert [fold["trained_on"] + fold["held_out"]["prompts"] for fold in results["folds"]] == [
        60,
        60,
    ]
    rates = [fold["held_out"]["accuracy"]["rate"] for fold in results["folds"]]
    assert results["held_out"]["mean"] == pytest.approx(sum(rates) / 2)
    assert min(rates) > 0.85
    # The reversed ranking is of a labeler that no fold holds out.
    assert results["seen"]["mean"] > 0.75
    assert "accuracy on held-out groups" in capsys.readouterr().out
    # A second call trains no fold again and gives the same results.
    written = (out / "fold_1" / "metrics.jsonl").read_text()
    assert eval_reward.cross_validate(config, 2) == results
    assert (out / "fold_1" / "metrics.jsonl").read_text() == written


def test_invalid_configurations_give_one_line_errors(
    configure: Callable[..., Config], trained: Path, folder: Path
) -> None:
    config = (folder / "config.yaml", ["data.tokenizer=x", "output_dir=y"])
    with pytest.raises(UserError, match=r"eval rm needs data\.valid: the held-out rankings"):
        eval_reward.evaluate(load_config(*config))
    with pytest.raises(
        UserError, match=r"eval rm needs model\.load: the run, checkpoint or model folder"
    ):
        eval_reward.evaluate(configure("x"))
    policy = folder / "policy"
    description = json.loads(
        next(trained.glob("checkpoints/step_*/reward/model.json")).read_text()
    ) | {"head": "lm"}
    policy.mkdir()
    (policy / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        eval_reward.evaluate(configure("x", f"model.load={policy}"))
    (folder / "long.jsonl").write_text(
        json.dumps({"prompt": "p", "chosen": "red " * 99, "rejected": "blue"}) + "\n"
    )
    limits = [
        "model.max_positions=2048",
        "data.max_response_tokens=200",
        f"data.valid={folder / 'long.jsonl'}",
    ]
    with pytest.raises(
        UserError,
        match=r"tokens, but the model in .*reward has 64 positions; lower data\.max_prompt",
    ):
        eval_reward.evaluate(configure("x", f"model.load={trained}", *limits))
    with pytest.raises(UserError, match="60 of 60 rankings have no user_id"):
        eval_reward.cross_validate(configure("x"), 2, "user_id")
    with pytest.raises(
        UserError, match="6 folds need as many different labeler_ids, but the rankings have 5"
    ):
        eval_reward.cross_validate(configure("x"), 6)
    with pytest.raises(
        UserError, match=r"a prompt with its \d responses has \d+ tokens and cannot be split"
    ):
        train.train("rm", configure("x", "train.max_tokens_per_micro_batch=40"))


def test_command_line() -> None:
    from typer.testing import CliRunner

    help_text = CliRunner().invoke(app, ["eval", "rm", "--help"]).output
    for name in ("--folds", "--by", "model.load", "data.valid"):
        assert name in help_text
