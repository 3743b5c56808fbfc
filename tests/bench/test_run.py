"""Providers are found, checked before they are timed, and none is missing from the results."""

from __future__ import annotations

import time

import pytest
import torch

from bench import run
from bench.cases import OPS, parse_shape
from bench.machine import Limits
from bench.providers import EAGER, PROVIDERS, Provider, provider
from bench.run import Session, run_case
from bench.timing import Candidate, Effort, interleaved, peak_extra_bytes

CPU = torch.device("cpu")
ABOUT = dict.fromkeys(
    ("device", "torch", "triton", "python", "commit", "dirty", "time"), "here"
) | {"threads": 1}
TINY = Effort(0.0, min_rounds=3, max_rounds=3, warmup=1)


def session(*only: str) -> Session:
    return Session(CPU, 1, TINY, Limits(1.0, {torch.float32: 1e-3}), dict(ABOUT), only)


def by_provider(rows):
    return {r.provider: r for r in rows}


def test_every_op_has_ours_and_something_to_compare_with():
    assert set(PROVIDERS) == set(OPS)
    for name, providers in PROVIDERS.items():
        names = [p.name for p in providers]
        assert {"fastrlhf[cpu]", "fastrlhf[triton]", "fastrlhf[torch]"} <= set(names), name
        assert any(p.kind == "rival" and "cpu" in p.devices for p in providers), name


def test_the_libraries_that_are_compared_with():
    named = {p.name for providers in PROVIDERS.values() for p in providers}
    assert {
        "Liger",
        "quack",
        "flash-attn",
        "cut-cross-entropy",
        "TRL",
        "F.linear_cross_entropy",
    } <= named
    assert {
        "eager",
        "torch.compile",
        "Python loop over time",
        "Python loop over pairs",
        "3 bare GEMMs",
    } <= named


@pytest.mark.parametrize("name", list(OPS))
def test_a_case_of_every_op(name):
    op = OPS[name]
    mode = "fwd+bwd" if op.leaves else "fwd"
    shape = op.shapes["quick"][0]
    rows = by_provider(
        run_case(session("fastrlhf", "eager", "loop", "GEMMs"), op, mode, shape, torch.float32)
    )
    ours = rows["fastrlhf[torch]"]
    assert ours.status == "ok" and ours.samples == 3
    assert 0 < ours.p20_ms <= ours.median_ms <= ours.p80_ms
    moved, flops = op.least(mode, shape, torch.float32)
    assert ours.gb_per_s == pytest.approx(moved / ours.median_ms / 1e6)
    assert ours.pct_sol == pytest.approx(100 * max(moved / 1e6, flops / 1e6) / ours.median_ms)
    assert ours.peak_extra_mb > 0
    assert rows["fastrlhf[triton]"].status == "not for this device"
    rivals = [r for r in rows.values() if r.kind != "ours" and r.status != "not for this device"]
    assert rivals and all(r.status == "ok" for r in rivals), rivals


@pytest.fixture
def extra_provider():
    """Register providers of gae for one test."""
    before = list(PROVIDERS["gae"])
    yield provider
    PROVIDERS["gae"][:] = before


def test_what_cannot_be_measured_is_listed_with_the_reason(extra_provider):
    @extra_provider("gae", "absent")
    def _():
        import a_library_that_is_not_there  # noqa: F401

    @extra_provider("gae", "half a percent off")
    def _():
        right = next(p for p in PROVIDERS["gae"] if p.name == "Python loop over time").load()
        return lambda x: tuple(1.005 * t for t in right(x))

    @extra_provider("gae", "breaks")
    def _():
        def function(x):
            raise RuntimeError("no such kernel\nsecond line")

        return function

    @extra_provider("gae", "never ready")
    def _():
        return lambda x: time.sleep(60)

    asked = (OPS["gae"], "fwd", (4, 8), torch.float32)
    rows = by_provider(run_case(session("absent", "half", "breaks"), *asked))
    hasty = session("never")  # the others may take a while on a busy machine
    hasty.patience_s = 0.2
    rows |= by_provider(run_case(hasty, *asked))
    assert (
        rows["absent"].status == "not installed"
        and "a_library_that_is_not_there" in rows["absent"].note
    )
    assert (
        rows["half a percent off"].status == "wrong"
        and "advantages off by 5.0e-03" in rows["half a percent off"].note
    )
    assert (
        rows["breaks"].status == "failed" and rows["breaks"].note == "RuntimeError: no such kernel"
    )
    assert rows["never ready"].status == "failed" and "TimeoutError" in rows["never ready"].note
    assert all(r.median_ms is None for r in rows.values())


def test_a_wrong_gradient_is_caught():
    wrong = run.check(
        OPS["logprobs"],
        lambda x: (EAGER["logprobs"](x)[0] + 0.01 * x["logits"][:, 0],),
        (8, 130),
        torch.float32,
        CPU,
    )
    assert wrong.startswith("logprobs off")

    def detached(x):
        (logp,) = EAGER["logprobs"](x)
        return (logp.detach() + 0.5 * (logp - logp.detach()),)

    assert run.check(OPS["logprobs"], detached, (8, 130), torch.float32, CPU).startswith(
        "gradient of logits off by 5"
    )
    assert run.check(OPS["logprobs"], EAGER["logprobs"], (8, 130), torch.float32, CPU) == ""


def test_a_provider_that_overwrites_its_input_gets_its_own():
    seen = []

    def overwrite(x):
        seen.append(float(x["logits"].detach()[0, 0]))
        out = EAGER["logprobs"]({**x, "logits": x["logits"] * 1})
        x["logits"].data.fill_(7.0)
        return out

    op = OPS["logprobs"]
    greedy = Provider("logprobs", "greedy", "rival", lambda: overwrite, mutates=("logits",))
    shared = op.make((4, 9), torch.float32, CPU)
    first = float(shared["logits"][0, 0])
    one = run.candidate(op, greedy, overwrite, shared, "fwd")
    for _ in range(3):
        one.call(one.prepare())
    assert seen == [first] * 3 and float(shared["logits"][0, 0]) == first


def test_past_the_deadline_nothing_is_started():
    late = session("fastrlhf[torch]")
    late.deadline = time.monotonic() - 1
    (row,) = run_case(late, OPS["gae"], "fwd", (4, 8), torch.float32)
    assert (row.status, row.note) == ("skipped", "out of time")


def test_candidates_take_turns():
    calls = []
    both = [Candidate(n, lambda: None, lambda _, n=n: calls.append(n)) for n in "AB"]
    results = interleaved(both, CPU, "wall", TINY)
    A, B = ["A"] * 20, ["B"] * 20  # short calls come twenty in a row
    assert calls == [*"AB", *A, *B, *B, *A, *A, *B]  # the first two are the warm-up
    assert [r.samples for r in results] == [3, 3]


def test_peak_memory_counts_what_is_held_at_a_time():
    size = 1 << 20

    def call(_):
        first = torch.empty(size, dtype=torch.int8)
        del first
        return torch.empty(size, dtype=torch.int8), torch.empty(size, dtype=torch.int8)

    assert peak_extra_bytes(Candidate("two at a time", lambda: None, call), CPU) == 2 * size


def test_shapes():
    assert parse_shape("8192x128256") == (8192, 128256)
    for text in ("8192x", "ax3", "0x3", "-1x3"):
        with pytest.raises(ValueError, match="expected positive numbers joined by x"):
            parse_shape(text)


@pytest.mark.parametrize(
    ("vocab", "small"), [(128256, 1024), (50257, 1024 + 50257 % 128), (100, 100)]
)
def test_the_check_keeps_the_alignment_of_rows(vocab, small):
    assert OPS["logprobs"].check_shape((8192, vocab)) == (64, small)
    assert OPS["linear_ppo_loss"].check_shape((8192, 4096, vocab)) == (64, 64, small)
