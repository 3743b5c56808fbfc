"""Every parallel layout returns the responses of one process.

Tokens are compared exactly. Layouts round the logits differently (1e-6 here), which changes a token
only if the two best candidates are that close, about once in 1e5 tokens. The seeds are fixed, and
no such token is among the 1,500 here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.parallel.mesh import Mesh

LAYOUTS = ("tensor-2", "tensor-2-sequence", "pipeline-2", "all")
CASES = ("greedy", "sampled", "top-k", "top-p", "min")
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def serial(cases: ModuleType, mesh: Mesh) -> dict[str, Any]:
    results: dict[str, Any] = {family: cases.run_model(family, mesh) for family in cases.FAMILY}
    results["histogram"] = cases.histogram(mesh)
    return results


@pytest.mark.parametrize("family", ["gpt", "llama", "windowed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_one_process(
    serial: dict[str, Any], parallel_results: Results, layout: str, family: str
) -> None:
    seen = set()
    for rank in parallel_results[layout]:
        results = rank[family]
        seen.update(results["ids"])
        for name in CASES:
            assert len(results[name]) == len(results["ids"])
            for i, got in zip(results["ids"], results[name], strict=True):
                expected = serial[family][name][i]
                assert got["tokens"] == expected["tokens"], (name, i)
                assert got["stopped"] == expected["stopped"]
                assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=2e-5)
    assert seen == set(range(len(serial[family]["greedy"])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_model_agree_exactly(parallel_results: Results, layout: str) -> None:
    """Results are bitwise equal, because a trainer slices the same batch on each of the ranks."""
    by_prompts: dict[tuple, list[dict[str, Any]]] = {}
    for rank in parallel_results[layout]:
        by_prompts.setdefault(tuple(rank["gpt"]["ids"]), []).append(rank)
    for ranks in by_prompts.values():
        assert len(ranks) >= 2
        for family in ("gpt", "llama", "windowed"):
            assert all(
                rank[family][name] == ranks[0][family][name] for rank in ranks for name in CASES
            )


@pytest.mark.parametrize("family", ["gpt", "llama", "windowed"])
def test_logprobs_are_those_of_a_training_forward(
    serial: dict[str, Any], parallel_results: Results, family: str
) -> None:
    """The first PPO ratio is 1 under every layout."""
    ranks = [serial] + [
        rank for ranks in parallel_results.values() for rank in ranks if rank["last_stage"]
    ]
    assert len(ranks) == 1 + 4 + 4 + 2 + 2
    for rank in ranks:
        responses, recomputed = rank[family]["sampled"], rank[family]["recomputed"]
        for response, again in zip(responses, recomputed, strict=True):
            assert response["logprobs"] == pytest.approx(again, abs=1e-5, rel=1e-5)


def test_cases_cover_both_endings(serial: dict[str, Any]) -> None:
    for family in ("gpt", "llama", "windowed"):
        endings = {response["stopped"] for response in serial[family]["sampled"]}
        assert endings == {True, False}
        assert any(
            response["stopped"] and len(response["tokens"]) <= 12
            for response in serial[family]["sampled"]
        )
        assert all(len(response["tokens"]) > 12 for response in serial[family]["min"])


def test_sharded_samples_equal_unsharded_ones(
    serial: dict[str, Any], parallel_results: Results
) -> None:
    for ranks in parallel_results.values():
        for rank in ranks:
            if rank["last_stage"]:
                assert rank["histogram"] == serial["histogram"]


def test_sample_writes_the_same_file(
    cases: ModuleType, mesh: Mesh, parallel_results: Results, tmp_path: Path
) -> None:
    summary = cases.write_samples(mesh, tmp_path / "serial.samples")
    serial = (tmp_path / "serial.samples").read_text()
    assert [json.loads(line)["answer"] for line in serial.split("\n") if line] == list(range(1, 8))
    for ranks in parallel_results.values():
        assert ranks[0]["samples"].read_text() == serial
        assert all(rank["summary"] == summary for rank in ranks)
