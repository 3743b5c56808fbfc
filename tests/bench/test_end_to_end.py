"""The trainers' steps and plain Hugging Face's do equal work; a failure affects one side."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch

from bench import end_to_end, machine, plain, results, sides
from bench.machine import Limits
from bench.sides import Side, guarded
from bench.step_rows import StepRow
from bench.trainers import RandomParts, Steps, Trainers, draw_weights, make_task
from fastrlhf.algorithms.rollouts import gather
from fastrlhf.config import ParallelConfig
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import mesh as meshes
from fastrlhf.run import jobs

SIZES = {
    "layers": 1,
    "hidden": 32,
    "heads": 2,
    "vocab": 200,
    "prompt": 8,
    "response": 6,
    "episodes": 4,
    "minibatch": 2,
    "sft-batch": 3,
    "rankings": 2,
    "micro-tokens": 150,
    "steps": 2,
    "iterations": 1,
    "warmup": 1,
}
ABOUT = dict.fromkeys(
    ("device", "torch", "triton", "python", "commit", "dirty", "time"), "here"
) | {"threads": 1}


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the level of the logger that the benchmark silences."""
    logger = logging.getLogger("fastrlhf.algorithms.ppo")
    level = logger.level
    yield
    logger.setLevel(level)


def options(**changes) -> list[str]:
    return [f"--{name}={value}" for name, value in (SIZES | {"threads": 1} | changes).items()]


@pytest.fixture
def session():
    args = end_to_end.arguments(options())
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    yield sides.Session(
        args, RandomParts(make_task(args), mesh), Limits(2.0, {torch.float32: 0.5}), dict(ABOUT)
    )
    meshes.finalize()


def models() -> int:
    gc.collect()
    return sum(isinstance(thing, GPT) for thing in gc.get_objects())


def test_the_command(tmp_path, capsys):
    before = models()
    assert end_to_end.main([*options(), "--out", str(tmp_path)]) == 0
    assert models() == before  # a part's models are gone before the next one's are built
    rows = results.read_csv(tmp_path / end_to_end.CSV_NAME, StepRow)
    assert {r.status for r in rows} == {"ok"}, rows
    modes = {
        "sft": ["step"],
        "rm": ["prompts repeated"],
        "ppo": ["iteration", "rollout", "scoring", "update", "prefill"],
    }
    expected = {
        (op, m, p)
        for op, names in modes.items()
        for m in names
        for p in ("fastrlhf", "transformers")
    }
    found = {
        (r.op, r.mode, r.provider) for r in rows if r.mode != "decode"
    }  # which may take no time beyond a prefill
    assert found == expected | {("rm", "prompts shared", "fastrlhf")}
    sft = next(r for r in rows if (r.op, r.provider) == ("sft", "fastrlhf"))
    assert (sft.samples, sft.versus, sft.limit) == (2, "transformers", "matmul") and sft.ratio > 0
    assert sft.tflop_per_s / sft.matmul_tflop_s == pytest.approx(sft.pct_sol / 100, rel=1e-2)
    shared = next(r for r in rows if r.mode == "prompts shared")
    assert shared.versus == "prompts repeated" and shared.rankings_per_s == pytest.approx(
        2e3 / shared.median_ms, rel=1e-4
    )
    shares = [
        r.share_pct for r in rows if r.op == "ppo" and r.provider == "fastrlhf" and r.share_pct
    ]
    assert len(shares) == 3 and 90 < sum(shares) <= 100.5
    printed = capsys.readouterr().out
    assert (
        "limits here: copy" in printed
        and "times faster than" in printed
        and "ppo update" in printed
    )


@pytest.mark.parametrize("part", ["sft", "rm"])
def test_both_sides_take_the_same_steps(session, part):
    """Three updates, so that the optimizers are compared too."""
    ours = Trainers(session.parts)
    mine = ours.sft() if part == "sft" else ours.rm(shared_prompt=True)
    theirs = getattr(plain, part)(session.parts)
    for _ in range(3):
        got, expected = theirs.step(), mine.step()
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_both_sides_update_alike_from_the_same_rollouts(session, monkeypatch):
    """Given our sampled tokens, the plain side has the same weights after an iteration."""
    job = jobs.ppo_job(session.parts)
    algorithm, batches = job.algorithm, iter(job.batches)
    theirs = plain.PPO(session.parts)
    episodes = algorithm.sample([prompt.tokens for micro in next(batches) for prompt in micro])
    ids = torch.tensor([prompt + answer.tokens for prompt, answer in episodes])
    assert not (ids[:, 8:] == 0).any()  # no stop token
    rollouts = algorithm.score(gather(session.parts.mesh, episodes))
    old, values, _ = scored = theirs.score(ids)
    torch.testing.assert_close(old, rollouts.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, rollouts.values, rtol=1e-4, atol=1e-5)
    orders = [torch.cat(list(algorithm.minibatches(4)))]
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: orders[0])
    metrics = algorithm.learn(rollouts)
    theirs.update(ids, *scored)
    assert metrics["updates"] == 2
    for stage, model in (
        (algorithm.policy.model, theirs.policy.model),
        (algorithm.value.model, theirs.value.model),
    ):
        expected = dict(plain.hf_tensors(stage, dict(plain.global_names(stage))))
        for name, tensor in model.state_dict().items():
            if name in expected:
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-6)


def test_a_part_that_does_not_fit_is_listed_and_the_rest_continues(session, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(plain, "sft", full)
    ours, theirs = end_to_end.run_part("sft", session)
    assert ours.status == "ok" and ours.samples == 2 and ours.ratio is None
    assert (theirs.status, theirs.median_ms) == ("out of memory", None)
    assert theirs.note == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    monkeypatch.setattr(Trainers, "rm", full)
    rows = end_to_end.run_part("rm", session)
    assert [(r.provider, r.status) for r in rows] == [("fastrlhf", "out of memory")] * 2 + [
        ("transformers", "ok")
    ]


def test_a_step_that_fails_later_keeps_its_times(session):
    steps = iter([{}, {}, {}])
    failing = Side(
        "step", "fastrlhf", lambda: Steps(lambda: next(steps))
    )  # two steps after the warm-up
    other = Side("step", "transformers", lambda: Steps(dict))
    sides.begin([failing, other], session, 1, same=False)
    with pytest.raises(StopIteration):  # not something that a library fails with: it is not hidden
        sides.race([failing, other], session, 4)
    assert len(failing.times) == 2

    def fails():
        raise UserError("half of the GPU's free memory holds no sequence")

    failing.steps = Steps(fails)
    sides.time_others(failing, {"prefill": fails}, session)
    assert failing.failures["prefill"] == (
        "failed",
        "UserError: half of the GPU's free memory holds no sequence",
    )
    sides.race([failing, other], session, 4)
    assert (failing.status, len(failing.times), failing.steps) == ("failed", 2, None)
    assert len(other.times) == 2 + 4  # from before and now


def test_a_side_that_does_other_work_is_not_timed(session):
    mine = {"loss": 2.0, "grad_norm": 1.0}
    first = Side("step", "fastrlhf", lambda: Steps(lambda: mine))
    other = Side("step", "transformers", lambda: Steps(lambda: mine | {"grad_norm": 1.01}))
    sides.begin([first, other], session, 1, same=True)
    sides.race([first, other], session, 3)
    assert (other.status, other.times) == ("wrong", []) and len(first.times) == 3
    assert other.note == "grad_norm of the first step is 1.01, and 1 in fastrlhf"
    assert sides.disagreement(mine, mine | {"loss": float("nan")}, "fp32")
    assert not sides.disagreement(mine, mine | {"loss": 2.001}, "fp32")


def test_past_the_deadline_nothing_is_begun(session):
    session.deadline = 0.0
    rows = end_to_end.run_part("ppo", session)
    assert [(r.provider, r.status, r.note) for r in rows] == [
        ("fastrlhf", "skipped", "out of time"),
        ("transformers", "skipped", "out of time"),
    ]


def test_memory_of_the_host_that_is_full():
    def full():
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9"
            " bytes"
        )

    assert guarded("x", full)[1] == "out of memory"


def test_weights_do_not_depend_on_who_asks(session):
    parts = session.parts
    first, second = (parts.model(parts.config.model, "lm") for _ in range(2))
    draw_weights(second)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert first.embedding.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("words", [["--minibatch", "3"], ["--steps", "0"], ["--parts", "sfr"]])
def test_mistakes_exit_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        end_to_end.main([*options(), *words])
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_limits_are_the_best_that_was_measured():
    disturbed, calm = Limits(5.0, {torch.float32: 1.0}), Limits(4.0, {torch.float32: 2.0})
    assert machine.best(disturbed, calm) == Limits(5.0, {torch.float32: 2.0})
