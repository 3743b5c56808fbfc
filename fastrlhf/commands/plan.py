"""The command `fastrlhf plan`: memory, time and cost of a run, without a GPU."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastrlhf.config import load_config, require, training_command
from fastrlhf.errors import UserError
from fastrlhf.evaluation.report import read_metrics
from fastrlhf.plan.hardware import GIB, load_hardware
from fastrlhf.plan.page import write_page
from fastrlhf.plan.planner import CASES, Plan, make_plan
from fastrlhf.plan.search import Candidate, search


def run(
    source: Path,
    overrides: list[str],
    command: str,
    gpus: int,
    gpu: str,
    *,
    as_json: bool,
    search_settings: bool,
    lengths: Path | None,
    samples: int | None,
    page: Path | None,
) -> bool:
    """Print the plan of `command` with the configuration `source`; return whether it fits.

    Raises UserError if the configuration, the command, the GPU or their number is not valid.
    """
    training_command(command)
    config = load_config(source, overrides)
    require(config, command)
    hardware = load_hardware(gpu)
    length = _mean_length(lengths) if lengths is not None else None
    with _without_remarks():
        plan = make_plan(
            config, command, gpus, hardware, source, response_length=length, samples=samples
        )
        found = search(source, overrides, command, gpus, hardware) if search_settings else []
    if as_json:
        results: dict[str, object] = {**plan.to_json()}
        if search_settings:
            results["search"] = [_candidate_json(candidate) for candidate in found]
        print(json.dumps(results, indent=2))
    else:
        _print(plan, found)
    if page is not None:
        write_page(plan, page, f"{command} {source}")
    return plan.fits


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence remarks on the simulated ranks: they are about this machine."""
    logger = logging.getLogger("fastrlhf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _mean_length(run_dir: Path) -> float:
    """Return the mean response length of a PPO run, from its metrics.jsonl."""
    columns = read_metrics(run_dir / "metrics.jsonl")
    if "response_length" not in columns:
        raise UserError(
            f"--lengths {run_dir}: its metrics.jsonl has no response_length; expected a PPO run"
        )
    return statistics.fmean(columns["response_length"][1])


def _candidate_json(candidate: Candidate) -> dict[str, object]:
    peak = max(max(rank.peak.values()) for rank in candidate.plan.ranks)
    return {
        "overrides": list(candidate.overrides),
        "seconds": round(candidate.seconds, 4),
        "peak_gib": round(candidate.plan.device_gib(peak), 2),
    }


def _print(plan: Plan, found: list[Candidate]) -> None:
    console, results = Console(), plan.to_json()
    console.print(
        f"{'fits' if plan.fits else 'does not fit'}: {plan.binding}", markup=False, soft_wrap=True
    )
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    memory = Table("rank", "models", *plan.ranks[0].parts, "host", title="GiB at the peak")
    for rank in plan.ranks:
        peaks = [f"{plan.device_gib(size):.1f}" for size in rank.peak.values()]
        memory.add_row(rank.kind, f"{rank.static / GIB:.1f}", *peaks, f"{rank.host / GIB:.1f}")
    console.print(memory)
    times = Table("phase", *CASES, title="seconds of a step")
    for phase, values in plan.seconds.items():
        times.add_row(phase, *(f"{values[case]:.3g}" for case in CASES))
    console.print(times)
    console.print(
        f"bubble {plan.bubble:.0%}, {plan.pflops_days:.3g} PF/s-days,"
        f" {results['gpu_hours']:,.0f} GPU-hours, {results['energy_kwh']:,.0f} kWh,"
        f" {results['disk_gib']:,.0f} GiB of checkpoints"
    )
    if found:
        settings = Table("seconds", "GiB", "settings", title="fastest that fit")
        for candidate in found:
            row = _candidate_json(candidate)
            overrides = " ".join(candidate.overrides)
            settings.add_row(f"{candidate.seconds:.3g}", f"{row['peak_gib']}", overrides)
        console.print(settings)
