"""`fastrlhf eval winrate` and `eval select` on tiny models, with every parallel layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastrlhf.checkpoint.model_folder import describe_model, save_model
from fastrlhf.commands.eval_policy import select, winrate
from fastrlhf.config import Config, ModelConfig, ParallelConfig
from fastrlhf.data.tokenize import train_bpe
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import build_model
from fastrlhf.parallel import mesh as meshes

SHAPE = {
    "family": "gpt",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "max_positions": 64,
    "dtype": "fp32",
}
PROMPTS = [
    "the cat",
    "a dog ran",
    [{"role": "user", "content": "hello"}],
    "on the mat. ",
    "the dog " * 30,
    "hello",
]
VOCAB = 290


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models, prompts, a tokenizer and a judge in Python.

    The models are policies, a reward model, a Hugging Face model and the checkpoints of a run.
    """
    folder = tmp_path_factory.mktemp("models")
    text = "the cat sat on the mat. a dog ran after the cat.\nuser: hello\nassistant: hi\n"
    for name in ("hf", "tok"):
        train_bpe([text] * 4, VOCAB, folder / name)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    )
    (folder / "tiny_judge.py").write_text(
        "def length(prompts, responses):\n    return [len(response) for response in responses]\n"
        "def broken(prompts, responses):\n    return [1.0]\n"
    )
    (folder / "prefix.txt").write_text("the cat sat. ")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    shape = ModelConfig(**SHAPE, init_std=0.5)
    for name, head, seed in (("policy", "lm", 1), ("other", "lm", 2), ("rm", "scalar", 3)):
        stage = build_model(shape, mesh, VOCAB, head=head, seed=seed)
        save_model(folder / name, stage, tokenizer=str(folder / "tok"))
    for step in (5, 10, 15):
        stage = build_model(shape, mesh, VOCAB, seed=step)
        save_model(
            folder / "run" / "checkpoints" / f"step_{step:08d}" / "policy",
            stage,
            tokenizer=str(folder / "tok"),
        )
    (folder / "run" / "metrics.jsonl").write_text('{"step": 10, "valid_loss": 2.5}\n')
    meshes.finalize()
    return folder


def settings(models: Path, out: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "model": {**SHAPE, "load": str(models / "policy")},
        "data": {
            "tokenizer": str(models / "tok"),
            "prompts": str(models / "prompts.jsonl"),
            "max_prompt_tokens": 20,
        },
        "optimizer": {"lr": 1e-3},
        "generation": {"max_new_tokens": 8},
        "eval": {
            "baseline": str(models / "other"),
            "reward_model": str(models / "rm"),
            "responses": 2,
        },
        "output_dir": str(out),
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config(**values)


@pytest.fixture(autouse=True)
def _finalize() -> Iterator[None]:
    yield
    meshes.finalize()


def rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(), which also splits at characters that a response may have, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def compared(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    winrate(settings(models, out))
    return out


def test_winrate_writes_its_files(models: Path, compared: Path) -> None:
    results, pairs = (
        json.loads((compared / "winrate.json").read_text()),
        rows(compared / "pairs.jsonl"),
    )
    assert results["prompts_too_long"] == 1
    assert [pair["prompt"] for pair in pairs] == [
        p for p in PROMPTS if len(p) < 100 for _ in range(2)
    ]
    won = sum(pair["policy_score"] > pair["baseline_score"] for pair in pairs)
    lost = sum(pair["policy_score"] < pair["baseline_score"] for pair in pairs)
    assert (results["won"], results["lost"]) == (won, lost) and results["tied"] == 10 - won - lost
    assert results["win_rate"]["clusters"] == 5 and results["win_rate"]["n"] == 10
    assert results["policy"]["model"] == str(models / "policy")
    assert len({pair["policy_score"] for pair in pairs}) > 5
    assert (compared / "winrate.html").read_text().startswith("<!doctype html>")


def test_a_policy_ties_with_itself_and_a_prefix_changes_it(models: Path, tmp_path: Path) -> None:
    same = {"baseline": str(models / "policy")}
    assert winrate(settings(models, tmp_path, eval=same))["tied"] == 10
    prompted = winrate(
        settings(models, tmp_path, eval={**same, "baseline_prefix": str(models / "prefix.txt")})
    )
    assert prompted["tied"] < 10


def test_a_hugging_face_baseline_and_a_judge_in_python(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(models)
    judge = {"baseline": str(models / "hf"), "reward_model": None, "judge": "tiny_judge:length"}
    results = winrate(settings(models, tmp_path, eval=judge))
    pairs = rows(tmp_path / "pairs.jsonl")
    assert all(pair["policy_score"] == len(pair["policy"]) for pair in pairs)
    assert all(pair["baseline_score"] == len(pair["baseline"]) for pair in pairs)
    assert results["baseline"]["model"] == str(models / "hf")
    with pytest.raises(UserError, match="tiny_judge:broken returned 1 scores for 10 responses"):
        winrate(settings(models, tmp_path, eval={**judge, "judge": "tiny_judge:broken"}))


def test_select(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = models / "run"
    results = select(settings(models, run))
    scores = {row["step"]: row["score"] for row in results["checkpoints"]}
    assert list(scores) == [5, 10, 15] and results["best"] == max(
        scores, key=lambda step: scores[step]
    )
    assert [row.get("valid_loss") for row in results["checkpoints"]] == [None, 2.5, None]
    best = run / "checkpoints" / "best"
    assert best.read_text() == f"step_{results['best']:08d}"
    # model.load accepts checkpoints/best.
    assert describe_model(best).path == run / "checkpoints" / best.read_text() / "policy"
    assert "step       10" in capsys.readouterr().out
    assert json.loads((run / "select.json").read_text()) == results
    # The win rate of one checkpoint against another uses the same scores.
    low = min(scores, key=lambda step: scores[step])
    sides = {
        "model": {"load": str(best)},
        "eval": {"baseline": str(run / "checkpoints" / f"step_{low:08d}")},
    }
    pair = winrate(settings(models, models / "pair", **sides))
    assert (
        pair["policy"]["score"] == scores[results["best"]]
        and pair["baseline"]["score"] == scores[low]
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"reward_model": None}}, "eval winrate needs a judge: set eval.reward_model"),
        ({"eval": {"baseline": None}}, "eval winrate needs eval.baseline"),
        ({"data": {"prompts": None}}, "eval winrate needs data.prompts"),
        ({"model": {"load": None}}, "eval winrate needs a trained model"),
        ({"eval": {"reward_model": "policy"}}, "is a language model, not a reward model"),
        ({"eval": {"baseline": "rm"}}, "is a reward or value model, not a policy"),
        ({"eval": {"baseline": "nothing"}}, "no model here"),
        ({"eval": {"baseline_prefix": "nothing"}}, "nothing: cannot be read as the prompt prefix"),
    ],
)
def test_mistakes_raise_user_error(
    models: Path, tmp_path: Path, sections: dict[str, dict[str, str | None]], message: str
) -> None:
    named = {
        section: {
            key: str(models / value) if value is not None else None
            for key, value in changes.items()
        }
        for section, changes in sections.items()
    }
    with pytest.raises(UserError, match=message):
        winrate(settings(models, tmp_path, **named))


def test_select_needs_checkpoints(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        select(settings(models, tmp_path))


LAYOUTS = """
import json, sys
from pathlib import Path
from fastrlhf.config import Config
from fastrlhf.commands.eval_policy import winrate
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.exit import clean_exit

def main():
    config, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    layouts = {"data": {}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}
    for name, parallel in layouts.items():
        winrate(Config(**{**config, "parallel": parallel, "output_dir": str(out / name)}))
        meshes.finalize()

if __name__ == "__main__":
    with clean_exit():
        main()
"""


def test_layouts_give_the_same_results(models: Path, compared: Path, tmp_path: Path) -> None:
    (tmp_path / "layouts.py").write_text(LAYOUTS)
    (tmp_path / "config.json").write_text(settings(models, tmp_path).model_dump_json())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "layouts.py"), str(tmp_path / "config.json"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = rows(compared / "pairs.jsonl")
    for layout in ("data", "tensor", "pipeline"):
        pairs = rows(tmp_path / layout / "pairs.jsonl")
        for pair, other in zip(pairs, expected, strict=True):
            assert pair["policy"] == other["policy"] and pair["baseline"] == other["baseline"]
            assert pair["policy_score"] == pytest.approx(other["policy_score"], abs=1e-4)
        rate, other = (
            json.loads((f / "winrate.json").read_text())["win_rate"]
            for f in (tmp_path / layout, compared)
        )
        assert rate == other
