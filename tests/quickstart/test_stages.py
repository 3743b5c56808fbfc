"""The whole loop at a scale of seconds: every stage runs, and leaves what the quickstart promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = """
from pathlib import Path
from fastrlhf.quickstart.configs import Scale
from fastrlhf.quickstart.stages import run

if __name__ == "__main__":
    run(Path({out!r}), scale=Scale(
        vocab_size=512, layers=2, hidden=32, heads=2, pretrain_steps=4, sft_steps=4, ranking_prompts=40, rm_epochs=1.0,
        ppo_steps=2, ppo_batch=16, eval_prompts=16, eval_windows=32,
    ))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    script = folder / "tiny.py"
    script.write_text(TINY.format(out=str(folder / "run")))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


def test_summary_has_what_is_promised(out: Path) -> None:
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


def test_labelers_agree_as_the_papers_did(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["labeler_agreement"] == pytest.approx(0.73, abs=0.02)


def test_rankings_are_of_four_to_nine_responses(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "data" / "rankings_train.jsonl").read_text().splitlines()]
    assert {len(row["responses"]) for row in rows} <= set(range(4, 10))
    assert len({len(row["responses"]) for row in rows}) > 2
    assert all(len(row["ranks"]) == len(row["responses"]) for row in rows)


def test_report_stands_alone(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "PPO-ptx" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page and "<link" not in page
