"""PPO's evaluation on held-out prompts: what it measures, and that training does not see it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithms_support import tiny_ppo

from fastrlhf.algorithms.ppo import PPO
from fastrlhf.algorithms.ppo_evaluation import HeldOutPrompts, evaluate_policy
from fastrlhf.algorithms.rollouts import gather
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run.train import train

Make = Callable[..., PPO]
TIMES = ("time", "seconds", "share", "tokens_per_second")


@pytest.fixture
def held_out(tiny: Path) -> Path:
    lines = (tiny / "data" / "prompts.jsonl").read_text().splitlines(keepends=True)[:21]
    path = tiny / "held_out.jsonl"
    path.write_text("".join(lines))
    return path


def run(
    tiny: Path, name: str, *, steps: int = 2, **sections: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train in tiny/name, from its last checkpoint if it has one; return its metrics."""
    chosen = tiny_ppo.config(tiny, **sections)
    size = chosen.train.model_copy(update={"steps": steps})
    train("ppo", chosen.model_copy(update={"output_dir": str(tiny / name), "train": size}))
    meshes.finalize()
    lines = (tiny / name / "metrics.jsonl").read_text().splitlines()
    return [
        {key: v for key, v in json.loads(line).items() if not any(t in key for t in TIMES)}
        for line in lines
    ]


def without_validation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("valid_")} for row in rows]


def test_training_is_the_same_with_and_without_it_and_a_resumed_run_evaluates_the_same(
    tiny: Path, held_out: Path
) -> None:
    data, each = {"valid": [str(held_out)]}, {"eval_interval": 1}
    plain = run(tiny, "plain", checkpoint={"save": False})
    evaluated = run(tiny, "evaluated", data=data, train=each, checkpoint={"save": False})
    assert [("valid_score" in row, row["valid_prompts"]) for row in evaluated] == [(True, 21)] * 2
    assert without_validation(evaluated) == plain
    # The weights have moved, so the two evaluations differ although their noise is the same.
    assert evaluated[0]["valid_score"] != evaluated[1]["valid_score"]
    run(tiny, "resumed", data=data, train=each, steps=1)
    assert run(tiny, "resumed", data=data, train=each) == evaluated


def test_eval_batches_bounds_it_and_without_an_interval_it_runs_at_the_end(
    tiny: Path, held_out: Path
) -> None:
    settings = {"data": {"valid": [str(held_out)]}, "train": {"eval_batches": 1}}
    first, last = run(tiny, "bounded", checkpoint={"save": False}, **settings)
    assert "valid_prompts" not in first
    assert last["valid_prompts"] == 16  # one batch of ppo.batch_size


def test_figures_are_those_of_the_responses(build: Make, tiny: Path) -> None:
    ppo = build(ppo={"no_stop_penalty": None}, generation={"stop": ["e"]})
    with torch.no_grad():  # so that the KL is not 0
        for weights in ppo.reference.parameters():
            weights.mul_(1.1)
    seen: list[str] = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        seen.extend(responses)
        return [float(len(response)) for response in responses]

    ppo.rewards.models, ppo.rewards.function = (), reward
    chosen = tiny_ppo.config(tiny)
    metrics = evaluate_policy(ppo, HeldOutPrompts(ppo.first_prompts[:7], chosen))
    scores = [len(response) for response in seen]
    assert len(set(scores)) > 1
    assert metrics["prompts"] == len(seen) == 7
    assert metrics["score"] == pytest.approx(statistics.mean(scores))
    assert metrics["score_stderr"] == pytest.approx(statistics.stdev(scores) / math.sqrt(7))
    # The same responses, scored as a training iteration scores them.
    held = HeldOutPrompts(ppo.first_prompts[:7], chosen)
    params = replace(ppo.sampling, seed=held.seed)
    episodes = ppo.respond(ppo.first_tokens[:7], range(7), params)
    rollouts = ppo.score(gather(ppo.mesh, episodes))
    kl = [
        sum((rollouts.logprobs - rollouts.ref_logprobs)[i, : len(answer.tokens)].tolist())
        for i, (_, answer) in enumerate(episodes)
    ]
    lengths = [len(answer.tokens) for _, answer in episodes]
    assert abs(metrics["kl"]) > 1e-3
    assert metrics["kl"] == pytest.approx(statistics.mean(kl), abs=1e-5)
    assert metrics["kl_stderr"] == pytest.approx(statistics.stdev(kl) / math.sqrt(7), rel=1e-4)
    assert metrics["kl_per_token"] == pytest.approx(sum(kl) / sum(lengths), abs=1e-6)
    assert metrics["response_length"] == pytest.approx(statistics.mean(lengths))
    stopped = [answer.stopped for _, answer in episodes]
    assert 0 < metrics["stopped"] < 1
    assert metrics["stopped"] == pytest.approx(statistics.mean(stopped))
    # Not the noise of the rollouts.
    assert [a.tokens for _, a in episodes] != [
        a.tokens for _, a in ppo.sample(ppo.first_tokens[:7])
    ]


def test_one_prompt_has_no_standard_error(build: Make, tiny: Path) -> None:
    ppo = build()
    metrics = evaluate_policy(ppo, HeldOutPrompts(ppo.first_prompts[:1], tiny_ppo.config(tiny)))
    assert not [name for name in metrics if name.endswith("stderr")]


# ---- records ------------------------------------------------------------------------------------

VERIFIABLE = """
import re

def exact(prompts, responses, records):
    a, b = (list(map(int, re.findall(r"[0-9]+", prompt))) for prompt in prompts), records
    return [float(sum(numbers) == record["answer"]) for numbers, record in zip(a, b)]
"""


def test_only_the_right_answer_scores(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, build: Make
) -> None:
    """Every third record has a wrong answer: its prompt alone scores 0, whatever the order.

    Three slots refill as responses end, so they finish in another order than the prompts'.
    """
    (tiny / "verifiable.py").write_text(VERIFIABLE)
    monkeypatch.syspath_prepend(str(tiny))
    wrong, rows = set(), []
    for i, line in enumerate((tiny / "data" / "prompts.jsonl").read_text().splitlines()[:32]):
        prompt = json.loads(line)["prompt"]
        total = sum(int(word) for word in prompt.rstrip("?").split() if word.isdigit())
        wrong |= {prompt} if i % 3 == 0 else set()
        rows.append({"prompt": prompt, "answer": total + (i % 3 == 0), "columns": [i]})
    path = tiny / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ppo = build(
        data={"prompts": [str(path)]},
        ppo={
            "reward_model": None,
            "reward_function": "verifiable:exact",
            "no_stop_penalty": None,
        },
        generation={"slots": 3},
    )
    own = ppo.first_prompts
    assert set(own[0].columns) == {"answer", "columns"}
    episodes = ppo.sample([prompt.tokens for prompt in own])
    scores = ppo.score(gather(ppo.mesh, episodes, ppo.rewards.records_of(own))).scores.tolist()
    texts = [ppo.tokenizer.decode(prompt.tokens) for prompt in own]
    assert 0 < sum(scores) < len(scores)
    assert scores == [float(text not in wrong) for text in texts]
    assert ppo.step([own])["score"] == pytest.approx(statistics.mean(scores))
