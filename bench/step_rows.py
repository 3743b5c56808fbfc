"""Rows of the end-to-end benchmark: the least work of each step and phase, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench import flops, machine, results
from bench.flops import Work
from bench.results import text_of
from bench.sides import Session, Side
from bench.stats import quantile, spread
from bench.trainers import ranking_batch
from fastrlhf.data.batches import pack_demonstrations
from fastrlhf.models.gpt import DTYPES


@dataclass(frozen=True)
class StepRow(results.Row):
    """A measurement; `op` is the stage, `mode` the step or a phase of it."""

    tokens_per_s: float | None = None
    rankings_per_s: float | None = None
    share_pct: float | None = None
    """of the iteration's time"""
    limit: str = ""
    """what pct_sol is of: "matmul", "copy" or "both" """
    peak_memory_mb: float | None = None
    """most memory of torch's allocator on a GPU, models and optimizers included, 10^6 bytes"""
    versus: str = ""
    ratio: float | None = None
    """median over the rounds of (seconds of `versus` / seconds of this)"""


class Least(NamedTuple):
    """The least operations and bytes of a step, for any implementation."""

    tokens: int
    """Counted for tokens a second."""
    operations: int
    moved: int = 0
    """Bytes that decoding must read."""
    decoding: int = 0
    """Those of the operations that wait for these bytes."""


def least_of(part: str, mode: str, session: Session) -> dict[str, Least]:
    """Return the least work of the whole step, under "", and of its phases."""
    task, model = session.parts.task, session.parts.task.config.model
    if part == "sft":
        work = flops.work_of(pack_demonstrations(task.demonstrations))
        return {"": Least(work.tokens, flops.training_flops(model, work, task.vocab))}
    if part == "rm":
        work = flops.work_of(ranking_batch(task, shared_prompt=mode == "prompts shared"))
        return {"": Least(work.tokens, flops.training_flops(model, work, 1))}
    return ppo_least(session)


def ppo_least(session: Session) -> dict[str, Least]:
    """Return the least work of a PPO iteration and its phases, without the scalar heads."""
    task, model = session.parts.task, session.parts.task.config.model
    prompts, R, B = (
        [len(prompt) for prompt in task.prompts],
        session.args.response,
        len(task.prompts),
    )
    first, rest = flops.prefill(prompts), flops.decode(prompts, R)
    episodes = flops.prefill([P + R for P in prompts])
    body, policy = (
        Work(episodes.tokens, episodes.pairs),
        Work(episodes.tokens, episodes.pairs, B * R),
    )
    window = flops.prefill([len(window) - 1 for window in task.windows])
    ptx = Work(window.tokens, window.pairs, window.tokens) * -(-B // session.args.minibatch)
    prefill = Least(first.tokens, flops.forward_flops(model, first, task.vocab))
    read = flops.decode_bytes(model, prompts, R, task.vocab)
    spent = flops.forward_flops(model, rest, task.vocab)
    decode = Least(rest.tokens, spent, read, spent)
    rollout = Least(B * R, prefill.operations + spent, read, spent)
    scoring = flops.forward_flops(model, policy, task.vocab) + 2 * flops.forward_flops(
        model, body, 1
    )
    update = flops.training_flops(model, policy + ptx, task.vocab) + flops.training_flops(
        model, body, 1
    )
    return {
        "": Least(body.tokens, rollout.operations + scoring + update, read, spent),
        "rollout": rollout,
        "prefill": prefill,
        "decode": decode,
        "scoring": Least(body.tokens, scoring),
        "update": Least(body.tokens + ptx.tokens, update),
    }


# ---- rows --------------------------------------------------------------------------------------


def make_row(session: Session, part: str, side: Side, mode: str, **more: Any) -> StepRow:
    args = session.args
    shape = (
        f"{args.layers}x{args.hidden}x{args.heads}, V {args.vocab}, {args.prompt}+{args.response}"
    )
    counts = {
        "sft": args.sft_batch,
        "rm": args.rankings,
        "ppo": f"{args.episodes}, ptx {args.ptx_per_episode}",
    }
    dtype = DTYPES[args.dtype]
    return StepRow(
        op=part,
        mode=mode or side.mode,
        provider=side.provider,
        kind=side.kind,
        shape=f"{shape}, x{counts[part]}",
        dtype=str(dtype).removeprefix("torch."),
        provider_version=machine.version_of(side.provider),
        copy_gb_s=round(session.limits.copy_gb_s, 1),
        matmul_tflop_s=round(session.limits.matmul_tflop_s[dtype], 3),
        clock="wall",
        load=machine.load(),
        sm_clock_mhz=session.sm_clock,
        **session.about,
        **more,
    )


def timed_row(
    session: Session,
    part: str,
    side: Side,
    mode: str,
    times: Sequence[float],
    least: Least,
    **more: Any,
) -> StepRow:
    """Return the row of a mode; `times` are in seconds."""
    time_s, dtype = spread(times), DTYPES[session.args.dtype]
    # Operations overlap with reading: the slower of the two counts; the rest is added.
    floor_ms = session.limits.floor_ms(least.moved, least.decoding, dtype)
    floor_ms += session.limits.floor_ms(0, least.operations - least.decoding, dtype)
    limit = (
        "matmul" if not least.moved else "copy" if least.decoding == least.operations else "both"
    )
    return make_row(
        session,
        part,
        side,
        mode,
        status="ok",
        median_ms=1e3 * time_s.median,
        p20_ms=1e3 * time_s.p20,
        p80_ms=1e3 * time_s.p80,
        samples=time_s.samples,
        tokens_per_s=least.tokens / time_s.median,
        limit=limit,
        tflop_per_s=least.operations / time_s.median / 1e12,
        pct_sol=floor_ms / time_s.median / 10,
        gb_per_s=least.moved / time_s.median / 1e9 if limit == "copy" else None,
        **more,
    )


def against(side: Side, sides: Sequence[Side], phase: str = "") -> dict[str, Any]:
    """Return the ratio to transformers' neighbouring steps.

    For shared prompts, the ratio is to the same trainer with repeated prompts.
    """
    wanted = "ours" if side.mode == "prompts shared" else "rival"
    others = [s for s in sides if s is not side and s.kind == wanted and s.times]
    if side.kind == "rival" or not others:
        return {}
    # The sides take turns, so the n-th steps of both are neighbours; a side that failed has fewer.
    pairs = zip(others[0].seconds(phase), side.seconds(phase), strict=False)
    name = others[0].provider if wanted == "rival" else others[0].mode
    return {"versus": name, "ratio": quantile([theirs / mine for theirs, mine in pairs], 0.5)}


def rows_of(part: str, side: Side, sides: Sequence[Side], session: Session) -> list[StepRow]:
    """Return rows for the step, its phases and the parts timed separately, or their failures."""
    rows: list[StepRow] = []
    failures = {side.mode: (side.status, side.note)} if side.status != "ok" else {}
    if side.times:
        least, more = (
            least_of(part, side.mode, session),
            {"peak_memory_mb": side.peak / 1e6 if side.peak else None},
        )
        if part == "rm":
            more["rankings_per_s"] = session.args.rankings / quantile(side.seconds(), 0.5)
        whole = side.seconds()
        rows.append(
            timed_row(session, part, side, "", whole, least[""], **more, **against(side, sides))
        )
        for phase in [name for name in side.times[0] if name]:
            times = side.seconds(phase)
            share = 100 * quantile([t / s for t, s in zip(times, whole, strict=True)], 0.5)
            ratio = against(side, sides, phase)
            rows.append(
                timed_row(session, part, side, phase, times, least[phase], share_pct=share, **ratio)
            )
        rows += rows_of_others(part, side, session, least)
    for mode, (status, note) in (failures | side.failures).items():
        rows.append(make_row(session, part, side, mode, status=status, note=note))
    return rows


def rows_of_others(
    part: str, side: Side, session: Session, least: dict[str, Least]
) -> list[StepRow]:
    """Return rows for the parts timed separately, and for decoding.

    Decoding is what a rollout takes in addition to its prefill.
    """
    rows = [
        timed_row(session, part, side, name, t, least[name.split(",")[0]])
        for name, t in side.others.items()
    ]
    if "prefill" not in side.others:
        return rows
    prefill = quantile(side.others["prefill"], 0.5)
    rollouts = {"decode": side.seconds("rollout")}
    rollouts |= {
        f"decode,{name.partition(',')[2]}": t
        for name, t in side.others.items()
        if name != "prefill"
    }
    for name, times in rollouts.items():
        decoding = [t - prefill for t in times if t > prefill]
        if decoding:
            rows.append(timed_row(session, part, side, name, decoding, least["decode"]))
    return rows


def print_table(rows: Sequence[StepRow], console: Console) -> None:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    names = (
        "",
        "by",
        "s (p20-p80)",
        "share %",
        "tokens/s",
        "rankings/s",
        "TFLOP/s",
        "GB/s",
        "% of limit",
        "peak GB",
        "n",
        "times faster than",
    )
    for name in names:
        table.add_column(
            name,
            justify="left" if name in ("", "by", "times faster than") else "right",
            no_wrap=True,
        )
    for row in rows:
        if row.median_ms is None or row.p20_ms is None or row.p80_ms is None:
            continue
        median, low, high = (text_of(ms / 1e3) for ms in (row.median_ms, row.p20_ms, row.p80_ms))
        limit = f"{text_of(row.pct_sol)} {row.limit}"
        peak = text_of(row.peak_memory_mb / 1e3) if row.peak_memory_mb else ""
        ratio = f"{text_of(row.ratio)} {row.versus}" if row.ratio else ""
        table.add_row(
            f"{row.op} {row.mode}",
            row.provider,
            f"{median} ({low}-{high})",
            text_of(row.share_pct),
            text_of(row.tokens_per_s),
            text_of(row.rankings_per_s),
            text_of(row.tflop_per_s),
            text_of(row.gb_per_s),
            limit,
            peak,
            str(row.samples),
            ratio,
            style="green" if row.kind == "ours" else "",
        )
    console.print(table)
    for row in rows:
        if row.status != "ok":
            console.print(
                f"{row.op} {row.mode}, {row.provider}: {row.status}: {row.note}", markup=False
            )
