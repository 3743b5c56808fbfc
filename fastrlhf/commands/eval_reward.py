"""Evaluation of reward models: the entry points of `fastrlhf eval rm`, with and without --folds.

Both run under torchrun in any layout. They write into the output folder: eval_rm.json and eval_rm.html, or
eval_rm_folds.json and eval_rm_folds.html beside one training run for each fold.
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
from fastrlhf.evaluation.report import write_json
from fastrlhf.evaluation.reward_report import write_folds_report, write_reward_report
from fastrlhf.evaluation.winrate import between
from fastrlhf.models.gpt import GPT
from fastrlhf.models.loading import check_vocabulary, find_reward_model, load_saved
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.run.builder import RunBuilder
from fastrlhf.run.jobs import reward_model_job
from fastrlhf.run.train import train_job

By = Literal["labeler_id", "user_id"]


def evaluate(config: Config) -> dict[str, Any]:
    """Scores the rankings of data.valid with the reward model of model.load; returns what it writes to
    output_dir/eval_rm.json.
    """
    require(config, "eval rm")
    assert config.data.valid is not None and config.model.load is not None
    saved = find_reward_model(config.model.load, "model.load")
    out = make_folder(config.output_dir)
    mesh = meshes.initialize(config.parallel, config.train.seed)
    with Watchdog(config.parallel.timeout_s), phase("evaluation"):
        run = RunBuilder(config, mesh)
        rankings = run.rankings(config.data.valid)
        _check_fits(rankings, saved.model.max_positions, f"the model in {saved.path}")
        check_vocabulary(saved, run.tokenizer, config.data.tokenizer)
        stage = load_saved(saved, mesh, "scalar", config.model.dtype)
        results = _judge(config, mesh, stage, rankings, str(saved.path))
    results = {"model": str(saved.path), "files": ", ".join(config.data.valid), **results}
    results |= {"agreement": reward.labeler_agreement(rankings), "statistics": saved.statistics}
    if mesh.rank == 0:
        write_json(out / "eval_rm.json", results)
        page = write_reward_report(results, out / "eval_rm.html")
        accuracy, longer = results["accuracy"], results["length_rule"]
        print(
            f"{page}: accuracy {accuracy['rate']:.3f} ({between(accuracy['low'], accuracy['high'])}) on "
            f"{results['pairs']} pairs of {results['prompts']} prompts; longer wins {longer['rate']:.3f}"
        )
    return results


def cross_validate(config: Config, folds: int, by: By = "labeler_id") -> dict[str, Any]:
    """Trains `folds` reward models, each on data.train without one group of labelers (or users), and evaluates it on
    that group (InstructGPT, section 4.1: 5 groups); returns what it writes to output_dir/eval_rm_folds.json.

    With data.valid, its rankings by labelers of the other groups are evaluated as well, which shows how much worse the
    model does on labelers it has not seen. A fold that is trained already is not trained again.
    """
    require(config, "rm")
    assert config.data.train is not None
    run = RunBuilder(config, meshes.initialize(config.parallel, config.train.seed))
    rankings = run.rankings(config.data.train)
    valid = run.rankings(config.data.valid) if config.data.valid else []
    groups = _groups(rankings, folds, by)
    rows: list[dict[str, Any]] = []
    for fold, group in enumerate(groups, 1):
        kept, held_out = reward.leave_out(rankings, group, attrgetter(by))
        if not kept:
            raise UserError(
                f"fold {fold} of {folds} has nothing to train on: {', '.join(group)} ranked every prompt of the others "
                "too; use fewer folds, or rankings of different prompts by different labelers"
            )
        part = config.model_copy(
            update={"output_dir": str(Path(config.output_dir) / f"fold_{fold}")}
        )
        job = train_job(training_command("rm"), part, partial(reward_model_job, rankings=kept))
        if job is None:
            raise UserError(
                f"fold {fold} of {folds} stopped early; run the same command again to go on from there"
            )
        mesh, stage = job.algorithm.mesh, job.algorithm.reward.model
        seen = [ranking for ranking in valid if getattr(ranking, by) not in group]
        row = {"fold": fold, "labelers": group, "trained_on": len(kept)}
        model = f"the model of fold {fold}"
        row |= {"held_out": _judge(config, mesh, stage, held_out, model)}
        row |= {"seen": _judge(config, mesh, stage, seen, model) if seen else None}
        rows.append(row)
    results = _summary(rows, by)
    if mesh.rank == 0:
        out, held_out_rate = Path(config.output_dir), results["held_out"]
        write_json(out / "eval_rm_folds.json", results)
        page = write_folds_report(results, out / "eval_rm_folds.html")
        print(
            f"{page}: accuracy on groups left out {held_out_rate['mean']:.3f} (standard deviation "
            f"{held_out_rate['std']:.3f} over {folds} folds); longer wins {results['length_rule']['mean']:.3f}"
        )
    return results


def _groups(rankings: Sequence[TokenizedRanking], folds: int, by: By) -> list[list[str]]:
    names = [getattr(ranking, by) for ranking in rankings]
    if None in names:
        raise UserError(
            f"{names.count(None)} of {len(names)} rankings have no {by}, and folds are groups of those; add the field, "
            f"or choose another with --by"
        )
    counts = Counter(names)
    if len(counts) < folds:
        raise UserError(
            f"{folds} folds need as many different {by}s, and the rankings have {len(counts)}; lower --folds"
        )
    return reward.split_groups(counts, folds)


def _judge(
    config: Config, mesh: Mesh, stage: GPT, rankings: Sequence[TokenizedRanking], model: str
) -> dict[str, Any]:
    return reward.evaluate(
        reward.ranked_pairs(rankings, finite_scores(config, mesh, stage, rankings, model))
    )


def _summary(rows: list[dict[str, Any]], by: By) -> dict[str, Any]:
    def over_folds(which: str, what: str) -> dict[str, float]:
        return reward.summarize([row[which][what]["rate"] for row in rows])

    seen = over_folds("seen", "accuracy") if all(row["seen"] for row in rows) else None
    means = {
        "held_out": over_folds("held_out", "accuracy"),
        "length_rule": over_folds("held_out", "length_rule"),
    }
    return {"by": by, **means, "seen": seen, "folds": rows}


def _check_fits(rankings: Sequence[TokenizedRanking], max_positions: int, what: str) -> None:
    longest = max(len(r.prompt_tokens) + max(map(len, r.responses)) for r in rankings)
    if longest > max_positions:
        raise UserError(
            f"a prompt and its response have {longest} tokens, and {what} has {max_positions} positions; lower "
            "data.max_prompt_tokens or data.max_response_tokens"
        )
