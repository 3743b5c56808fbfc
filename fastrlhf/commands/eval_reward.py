"""Evaluation of reward models: the command `fastrlhf eval rm`, with and without --folds.

Both variants run under torchrun with any layout. They write eval_rm.json and eval_rm.html to the
output folder, or eval_rm_folds.json, eval_rm_folds.html and one training run per fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from fastrlhf.algorithms.judging import finite_scores
from fastrlhf.config import Config, require, training_command
from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.data.files import make_folder
from fastrlhf.errors import UserError
from fastrlhf.evaluation import reward
from fastrlhf.evaluation.page import write_json
from fastrlhf.evaluation.reward_report import write_folds_report, write_reward_report
from fastrlhf.evaluation.winrate import interval_text
from fastrlhf.models.checks import check_saved
from fastrlhf.models.gpt import GPT
from fastrlhf.models.loading import find_reward_model, load_saved, with_tokenizer_of
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.run.builder import RunBuilder
from fastrlhf.run.jobs import reward_model_job
from fastrlhf.run.start import start as start_ranks
from fastrlhf.run.train import train_job

By = Literal["labeler_id", "user_id"]


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate the reward model of model.load on the rankings of data.valid.

    Returns the contents of output_dir/eval_rm.json, which it writes.
    """
    require(config, "eval rm")
    assert config.data.valid is not None and config.model.load is not None
    saved = find_reward_model(config.model.load, "model.load")
    out = make_folder(config.output_dir)
    mesh = start_ranks("eval rm", config)
    with Watchdog(config.parallel) as watchdog, phase("evaluation"):
        config = with_tokenizer_of(config, saved)
        run = RunBuilder(config, mesh)
        folder = config.data.tokenizer
        check_saved(saved, "model.load", config.parallel, run.tokenizer, folder)
        assert config.data.valid is not None
        rankings = run.rankings(config.data.valid)
        _check_fits(rankings, saved.model.max_positions, f"the model in {saved.path}")
        model = load_saved(saved, mesh, "scalar", config.model.dtype)
        watchdog.end_start_up()
        results = _evaluate(config, mesh, model, rankings, str(saved.path))
    results = {"model": str(saved.path), "files": ", ".join(config.data.valid), **results}
    results |= {"agreement": reward.labeler_agreement(rankings), "statistics": saved.statistics}
    if mesh.rank == 0:
        write_json(out / "eval_rm.json", results)
        page = write_reward_report(results, out / "eval_rm.html")
        accuracy, longer = results["accuracy"], results["length_rule"]
        interval = interval_text(accuracy["low"], accuracy["high"], accuracy["clusters"])
        print(
            f"{page}: accuracy {accuracy['rate']:.3f} "
            f"({interval}) on {results['pairs']} pairs "
            f"of {results['prompts']} prompts; length rule {longer['rate']:.3f}"
        )
    return results


def cross_validate(config: Config, folds: int, by: By = "labeler_id") -> dict[str, Any]:
    """Cross-validate reward models over groups of labelers (or users).

    Trains `folds` reward models, each on data.train without one group, and evaluates it on that
    group (InstructGPT, section 4.1: 5 groups). With data.valid, its rankings by labelers of the
    other groups are evaluated as well, which shows the loss of accuracy on unseen labelers. A fold
    that is already trained is not trained again.

    Returns the contents of output_dir/eval_rm_folds.json, which it writes.
    """
    require(config, "rm")
    assert config.data.train is not None
    run = RunBuilder(config, start_ranks("rm", config))
    run.check_models()
    rankings = run.rankings(list(config.data.train))
    valid = run.rankings(config.data.valid) if config.data.valid else []
    groups = _groups(rankings, folds, by)
    rows: list[dict[str, Any]] = []
    for fold, group in enumerate(groups, 1):
        kept, held_out = reward.hold_out(rankings, group, attrgetter(by))
        if not kept:
            raise UserError(
                f"fold {fold} of {folds} has no training rankings: {', '.join(group)} ranked every "
                "prompt of the others too; use fewer folds, or rankings of different prompts by "
                "different labelers"
            )
        output_dir = str(Path(config.output_dir) / f"fold_{fold}")
        part = config.model_copy(update={"output_dir": output_dir})
        job = train_job(training_command("rm"), part, partial(reward_model_job, rankings=kept))
        if job is None:
            raise UserError(
                f"fold {fold} of {folds} stopped early; run the same command again to resume it"
            )
        mesh, reward_model = job.algorithm.mesh, job.algorithm.reward.model
        seen = [ranking for ranking in valid if getattr(ranking, by) not in group]
        row = {"fold": fold, "labelers": group, "trained_on": len(kept)}
        name = f"the model of fold {fold}"
        row |= {"held_out": _evaluate(config, mesh, reward_model, held_out, name)}
        row |= {"seen": _evaluate(config, mesh, reward_model, seen, name) if seen else None}
        rows.append(row)
    results = _summary(rows, by)
    if mesh.rank == 0:
        _write_folds(Path(config.output_dir), results)
    return results


def _write_folds(out: Path, results: dict[str, Any]) -> None:
    write_json(out / "eval_rm_folds.json", results)
    page = write_folds_report(results, out / "eval_rm_folds.html")
    held_out, length_rule = results["held_out"], results["length_rule"]
    print(
        f"{page}: accuracy on held-out groups {held_out['mean']:.3f} "
        f"(standard deviation {held_out['std']:.3f} over {len(results['folds'])} folds); "
        f"length rule {length_rule['mean']:.3f}"
    )


def _groups(rankings: Sequence[TokenizedRanking], folds: int, by: By) -> list[list[str]]:
    names = [getattr(ranking, by) for ranking in rankings]
    if None in names:
        raise UserError(
            f"{names.count(None)} of {len(names)} rankings have no {by}, which defines the folds; "
            "add the field, or choose another with --by"
        )
    counts = Counter(names)
    if len(counts) < folds:
        raise UserError(
            f"{folds} folds need as many different {by}s, but the rankings have {len(counts)}; "
            "lower --folds"
        )
    return reward.split_groups(counts, folds)


def _evaluate(
    config: Config, mesh: Mesh, model: GPT, rankings: Sequence[TokenizedRanking], name: str
) -> dict[str, Any]:
    scores = finite_scores(config, mesh, model, rankings, name)
    return reward.evaluate(reward.ranked_pairs(rankings, scores))


def _summary(rows: list[dict[str, Any]], by: By) -> dict[str, Any]:
    def over_folds(rankings: str, rate: str) -> dict[str, float]:
        return reward.summarize([row[rankings][rate]["rate"] for row in rows])

    seen = over_folds("seen", "accuracy") if all(row["seen"] for row in rows) else None
    means = {
        "held_out": over_folds("held_out", "accuracy"),
        "length_rule": over_folds("held_out", "length_rule"),
    }
    return {"by": by, **means, "seen": seen, "folds": rows}


def _check_fits(rankings: Sequence[TokenizedRanking], max_positions: int, model: str) -> None:
    longest = max(len(r.prompt_tokens) + max(map(len, r.responses)) for r in rankings)
    if longest > max_positions:
        raise UserError(
            f"a prompt and its response have {longest} tokens, but {model} has {max_positions} "
            "positions; lower data.max_prompt_tokens or data.max_response_tokens"
        )
