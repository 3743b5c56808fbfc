"""The job of each training command: the data and models of an algorithm, for the training loop.

`TrainingCommand.job` in config/commands.py names the function here that builds a command's job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastrlhf.algorithms.ppo import PPO, Models
from fastrlhf.algorithms.ppo_evaluation import HeldOutPrompts, evaluate_policy
from fastrlhf.algorithms.protocols import MovingAverage
from fastrlhf.algorithms.rewards import Rewards, load_reward_function
from fastrlhf.algorithms.rm import RewardModelling, evaluate_ranking
from fastrlhf.algorithms.sft import SupervisedFinetuning, evaluate_loss
from fastrlhf.config import ModelConfig, TrainingCommand
from fastrlhf.data.batches import (
    PackedBatch,
    TokenizedDemonstration,
    TokenizedPrompt,
    TokenizedRanking,
    demonstration_tokens,
    pack_demonstrations,
    pack_rankings,
    pack_windows,
    ranking_tokens,
    window_tokens,
)
from fastrlhf.data.datasets import check_ranking_sizes
from fastrlhf.data.loader import Dataset, Loader
from fastrlhf.data.mix import Mixture
from fastrlhf.models.gpt import build_model
from fastrlhf.models.loading import without_dropout
from fastrlhf.run.builder import RunBuilder
from fastrlhf.training.loop import Algorithm, Batches
from fastrlhf.training.metrics import SampleLog
from fastrlhf.training.optimizer import ExponentialAverage, Learner

AlgorithmT = TypeVar("AlgorithmT", bound=Algorithm)


@dataclass
class TrainingJob(Generic[AlgorithmT]):
    """What a command hands to the training loop."""

    algorithm: AlgorithmT
    batches: Batches
    total_steps: int
    evaluate: Callable[[], dict[str, float]] | None = None
    """Returns the metrics of a validation."""
    finish: Callable[[], None] | None = None
    """Runs after the last update, before the last evaluation and checkpoint."""


JobBuilder = Callable[[RunBuilder], TrainingJob[AlgorithmT]]


def job_builder(command: TrainingCommand) -> JobBuilder[Algorithm]:
    """Return the function of this module that builds the job of `command`."""
    builder: JobBuilder[Algorithm] = globals()[command.job]
    return builder


def pretrain_job(run: RunBuilder) -> TrainingJob[SupervisedFinetuning]:
    """Return language modelling on the windows of data.train (or data.pretrain)."""
    data = run.config.data
    text = data.train or data.pretrain
    assert text is not None
    valid = (
        run.validation(run.windows(data.valid), pack_windows, window_tokens) if data.valid else None
    )
    return _language_model_job(
        run, run.loader(run.windows(text), pack_windows, cost=window_tokens), valid
    )


def sft_job(run: RunBuilder) -> TrainingJob[SupervisedFinetuning]:
    """Return fine-tuning on the demonstrations of data.train.

    Pretraining rows are mixed in if data.pretrain_fraction is above 0.
    """
    data = run.config.data
    assert data.train is not None
    dataset: Dataset[TokenizedDemonstration] = run.blend(data.train, run.demonstrations)
    pretrain_weight = None
    if data.pretrain_fraction > 0:
        assert data.pretrain is not None
        dataset = mixture = Mixture(
            dataset, run.windows(data.pretrain), data.pretrain_fraction, run.config.train.seed
        )
        pretrain_weight = mixture.loss_weight() if data.pretrain_fraction_of == "loss" else 1.0
    batches = run.loader(dataset, pack_demonstrations, cost=demonstration_tokens)
    valid = None
    if data.valid:
        valid = run.validation(
            run.demonstrations(data.valid), pack_demonstrations, demonstration_tokens
        )
    return _language_model_job(run, batches, valid, pretrain_weight)


def _language_model_job(
    run: RunBuilder,
    batches: Loader[Any, PackedBatch],
    validation: Callable[[], Iterable[list[PackedBatch]]] | None,
    pretrain_weight: float | None = None,
) -> TrainingJob[SupervisedFinetuning]:
    total_steps = run.total_steps(batches)
    policy = run.learner(run.model(run.config.model, "lm"), total_steps)
    evaluate = None
    if validation is not None:

        def evaluate() -> dict[str, float]:
            return {"valid_loss": evaluate_loss(run.mesh, policy.model, validation())}

    algorithm = SupervisedFinetuning(run.mesh, policy, pretrain_weight)
    return TrainingJob(algorithm, batches, total_steps, evaluate)


def reward_model_job(
    run: RunBuilder,
    rankings: Dataset[TokenizedRanking] | None = None,
    valid: Sequence[TokenizedRanking] | None = None,
) -> TrainingJob[RewardModelling]:
    """Return reward modelling on `rankings`, validated on `valid`.

    By default they are those of data.train and data.valid. Each prompt's responses stay in one
    micro-batch.
    """
    data, shared = run.config.data, run.config.model.shared_prompt
    if rankings is None:
        assert data.train is not None
        rankings = run.blend(data.train, run.rankings)
        valid = run.rankings(data.valid) if data.valid else None
    collate, cost = (
        partial(pack_rankings, shared_prompt=shared),
        partial(ranking_tokens, shared_prompt=shared),
    )
    check_ranking_sizes(rankings, cost, run.config.train.max_tokens_per_micro_batch)
    batches = run.loader(rankings, collate, cost=cost)
    total_steps = run.total_steps(batches)
    algorithm = RewardModelling(
        run.mesh, run.learner(run.model(run.config.model, "scalar"), total_steps)
    )
    evaluate = finish = None
    if valid is not None:
        check_ranking_sizes(valid, cost, run.config.train.max_tokens_per_micro_batch)
        held_out = run.validation(valid, collate, cost)

        def evaluate() -> dict[str, float]:
            metrics = evaluate_ranking(run.mesh, algorithm.reward.model, held_out())
            return {f"valid_{name}": metrics[name] for name in ("loss", "accuracy", "margin")}

    if data.demonstrations:
        dataset = run.demonstrations(data.demonstrations)
        demonstrations = run.one_pass(dataset, pack_demonstrations, demonstration_tokens)

        def finish() -> None:
            algorithm.center(demonstrations())

    return TrainingJob(algorithm, batches, total_steps, evaluate, finish)


def ppo_job(run: RunBuilder) -> TrainingJob[PPO]:
    """Return PPO-ptx on the prompts of data.prompts.

    Policy, value, reference and reward models share one mesh.
    """
    config, mesh = run.config, run.mesh
    assert config.data.prompts is not None and config.train.steps is not None
    prompts = run.loader(
        run.prompts(config.data.prompts), _as_list, global_batch_size=config.ppo.batch_size
    )
    updates = config.ppo.inner_epochs * math.ceil(config.ppo.batch_size / config.ppo.minibatch_size)
    # PPO counts its warm-up in iterations, as it counts its steps.
    schedule = config.schedule.model_copy(
        update={"warmup_steps": config.schedule.warmup_steps * updates}
    )
    total_updates = config.train.steps * updates
    # With dropout in any of its models, the ratios of the first update would not be 1.
    shape = without_dropout(config.model)
    policy = run.learner(run.policy(shape), total_updates, schedule)
    value_start = config.ppo.value_model
    value = run.model(shape, "scalar") if value_start is None else run.value(value_start)
    models = Models(
        policy=policy,
        value=run.learner(value, total_updates, schedule, config.ppo.value_lr),
        reference=run.reference(shape),
        rewards=_rewards(run),
        average=_average(run, shape, policy),
    )
    samples = SampleLog(Path(config.output_dir) / "samples.jsonl") if mesh.rank == 0 else None
    algorithm = PPO(
        mesh,
        config,
        models,
        run.tokenizer,
        pretraining=_ptx_batches(run),
        write_samples=samples,
    )
    evaluate = None
    if config.data.valid:
        held_out = HeldOutPrompts(run.prompts(config.data.valid), config)

        def evaluate() -> dict[str, float]:
            metrics = evaluate_policy(algorithm, held_out)
            return {f"valid_{name}": value for name, value in metrics.items()}

    return TrainingJob(algorithm, prompts, config.train.steps, evaluate)


def _as_list(prompts: list[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Collate prompts: PPO packs them once they have responses."""
    return prompts


def _rewards(run: RunBuilder) -> Rewards:
    ppo = run.config.ppo
    weights = ppo.reward_weights or [1.0] * len(ppo.reward_models)
    models = [
        (weight, run.reward(path)) for weight, path in zip(weights, ppo.reward_models, strict=True)
    ]
    if ppo.reward_function is None:
        return Rewards(models)
    function = load_reward_function(ppo.reward_function)
    return Rewards(models, function, f"ppo.reward_function {ppo.reward_function}")


def _average(run: RunBuilder, shape: ModelConfig, policy: Learner) -> MovingAverage | None:
    decay = run.config.ppo.ema_decay
    if decay is None:
        return None
    average = build_model(shape.model_copy(update={"dtype": "fp32"}), run.mesh, run.vocab_size)
    return ExponentialAverage(policy.model, average, decay)


def _ptx_batches(run: RunBuilder) -> Loader[list[int], PackedBatch] | None:
    ppo, pretrain = run.config.ppo, run.config.data.pretrain
    if ppo.gamma_ptx == 0:
        return None
    assert pretrain is not None
    examples = ppo.ptx_per_episode * ppo.minibatch_size
    return run.loader(
        run.windows(pretrain), pack_windows, global_batch_size=examples, cost=window_tokens
    )
