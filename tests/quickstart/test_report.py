"""The quickstart's page from made-up results: it shows summary.json and the reached targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.evaluation.page import Answer
from fastrlhf.evaluation.winrate import win_rate
from fastrlhf.quickstart.labeler import TERMS, Calibration, Noise
from fastrlhf.quickstart.report import (
    COLORS,
    RUNS,
    Results,
    Sample,
    outcomes,
    write_quickstart_report,
)


def summary(**changes: Any) -> dict[str, Any]:
    values = {
        "model": "tiny",
        "dtype": "fp32",
        "rm_heldout_accuracy": 0.72,
        "winrate_ppo_ptx_vs_sft": 0.70,
        "winrate_ppo_ptx_vs_sft_ci95": [0.61, 0.78],
        "winrate_ppo_vs_sft": 0.71,
        "kl_ppo_ptx": 4.2,
        "pretrain_loss": {"base": 5.0, "sft": 5.2, "ppo": 5.9, "ppo_ptx": 5.3},
        "seconds": {"corpus": 12.0, "pretrain": 80.0, "total": 92.0},
    }
    return values | changes


@pytest.fixture
def results(tmp_path: Path) -> Results:
    runs: dict[str, Path] = {}
    for key in RUNS:
        runs[key] = tmp_path / key
        runs[key].mkdir()
        metrics = {
            "ppo": ("score", "kl"),
            "ppo_ptx": ("score", "kl", "ptx_loss"),
            "rm": ("loss", "accuracy"),
        }.get(key, ("loss",))
        lines = [
            json.dumps({"step": s, "time": 0.0, **dict.fromkeys(metrics, 1.0 / s)})
            for s in range(1, 6)
        ]
        (runs[key] / "metrics.jsonl").write_text("\n".join(lines))
    rate = win_rate([1, 1, 0, 0.5])
    return Results(
        summary=summary(),
        runs=runs,
        win_rates={"PPO": rate, "PPO-ptx": rate},
        terms={model: dict.fromkeys((*TERMS, "utility"), 0.5) for model in COLORS},
        calibration=Calibration(Noise(0.1, 0.02), agreement=0.726, ties=0.08, ceiling=0.8),
        counts={"documents": 1234},
        samples=[
            Sample(
                "Function: run\n",
                [Answer("SFT", "Runs <b>it</b>.", 0.4), Answer("PPO-ptx", "Run it.", 0.9)],
            )
        ],
    )


def test_the_page_shows_the_results(results: Results, tmp_path: Path) -> None:
    path = write_quickstart_report(tmp_path / "out", results)
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "out" / "report.html"
    for text in (
        "70.0%",
        "72.0%",
        "61.0% to 78.0%",
        "5.300",
        "4.20",
        "1 min 32 s",
        "1,234",
        "Runs &lt;b&gt;it&lt;/b&gt;.",
    ):
        assert text in html
    assert html.count(">reached<") == 3
    for heading, _, _ in RUNS.values():
        assert heading in html
    assert "Score against KL" in html


def test_a_missed_target_has_a_badge(results: Results, tmp_path: Path) -> None:
    missed = Results(**{**vars(results), "summary": summary(rm_heldout_accuracy=0.6)})
    html = write_quickstart_report(tmp_path, missed).read_text()
    assert html.count(">missed<") == 1 and html.count(">reached<") == 2


def test_without_plain_ppo_pretraining_losses_are_no_target(
    results: Results, tmp_path: Path
) -> None:
    loss = {"base": 4.1, "sft": 3.6, "ppo_ptx": 3.7}
    assert set(outcomes(summary(pretrain_loss=loss))) == {
        "rm_heldout_accuracy",
        "winrate_ppo_ptx_vs_sft",
    }
    runs = {run: folder for run, folder in results.runs.items() if run not in ("pretrain", "ppo")}
    pretrained = Results(
        **{**vars(results), "runs": runs, "summary": summary(pretrain_loss=loss, model="smollm2")}
    )
    html = write_quickstart_report(tmp_path, pretrained).read_text()
    assert (
        "A pretrained model (smollm2, trained in fp32)" in html
        and "before 4.100, SFT 3.600" in html
    )
    assert html.count(">reached<") == 2 and "tiny GPT" not in html


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("rm_heldout_accuracy", {"rm_heldout_accuracy": 0.699}),
        ("winrate_ppo_ptx_vs_sft", {"winrate_ppo_ptx_vs_sft": 0.64}),
        ("winrate_ppo_ptx_vs_sft", {"winrate_ppo_ptx_vs_sft_ci95": [0.5, 0.9]}),
        (
            "pretrain_loss",
            {"pretrain_loss": {"base": 5.0, "sft": 5.2, "ppo": 5.3, "ppo_ptx": 5.35}},
        ),
        (
            "pretrain_loss",
            {"pretrain_loss": {"base": 5.0, "sft": 5.2, "ppo": 5.25, "ppo_ptx": 5.1}},
        ),
    ],
)
def test_outcomes(key: str, changes: dict[str, Any]) -> None:
    assert all(outcomes(summary()).values())
    reached = outcomes(summary(**changes))
    assert not reached.pop(key)
    assert all(reached.values())
