"""Builds a training run from its configuration and runs it: the one place that knows every part.

Opens the tokenizer and the data, builds the models on the mesh, loads what they start from, hands an algorithm to the
loop, and writes the run's report.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from filelock import FileLock, Timeout

from fastrlhf.algorithms.ppo import PPO, Models
from fastrlhf.algorithms.rewards import Rewards, load_reward_function
from fastrlhf.algorithms.rm import RewardModelling, evaluate_ranking
from fastrlhf.algorithms.sft import SupervisedFinetuning, evaluate_loss
from fastrlhf.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, check_batch, dump_config, require
from fastrlhf.data.batches import (
    TokenizedRanking,
    demonstration_tokens,
    pack_demonstrations,
    pack_rankings,
    pack_windows,
    ranking_tokens,
    window_tokens,
)
from fastrlhf.data.datasets import check_groups, load_demonstrations, load_prompts, load_rankings
from fastrlhf.data.loader import Loader
from fastrlhf.data.mix import Mixture
from fastrlhf.data.pretrain import PretrainWindows, TokenStream
from fastrlhf.data.tokenize import load_tokenizer, read_prefix
from fastrlhf.errors import UserError
from fastrlhf.evaluation.report import write_run_report
from fastrlhf.models.gpt import GPT, build_model, initialize_weights
from fastrlhf.models.loading import (
    check_meaning,
    check_vocabulary,
    find_model,
    is_hugging_face,
    load_saved,
    without_dropout,
)
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.training import loop
from fastrlhf.training.checkpoint import Checkpointer, SavedModel, describe_model, load_model
from fastrlhf.training.metrics import MetricsLog, SampleLog
from fastrlhf.training.optimizer import ExponentialAverage, Learner
from fastrlhf.training.writing import same_outcome


@dataclass
class Job:
    """What a command hands to the loop."""

    algorithm: Any
    batches: Loader
    total_steps: int
    evaluate: Callable[[], dict[str, float]] | None = None
    finish: Callable[[], None] | None = None


def train(command: Literal["pretrain", "sft", "rm", "ppo"], config: Config) -> None:
    """Trains as `config` says and leaves everything under `config.output_dir`; resumes a run that is there already."""
    train_job(command, config, _JOBS[command])


def train_job(command: str, config: Config, build: Callable[[Parts], Job]) -> Job | None:
    """Trains the job that `build` makes, as `train` does; None when it stopped before its last step (a signal, or
    train.max_seconds). Raises KeyboardInterrupt when Ctrl-C stopped it, after saving.
    """
    start = time.monotonic()
    require(config, command)
    mesh = meshes.initialize(config.parallel, config.train.seed)
    with Watchdog(config.parallel.timeout_s), _own_folder(Path(config.output_dir), mesh):
        with phase("start-up"):
            for sizes in _BATCHES[command]:
                check_batch(config, mesh.data_size, sizes)
            _check_packages(config)
            _find_models(command, config)
            job = build(Parts(config, mesh))
        finished = _loop(command, config, mesh, job, start)
    dist.barrier()
    return job if finished else None


@contextlib.contextmanager
def _own_folder(out: Path, mesh: Mesh) -> Iterator[None]:
    """Makes the folder and locks it: two runs would remove each other's checkpoints. A kill frees the lock."""
    lock = FileLock(out / ".lock", timeout=0)
    with same_outcome(f"output_dir {out} cannot be written"):
        if mesh.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise OSError(f"another run is writing it (it holds {lock.lock_file}); give another folder") from None
    try:
        yield
    finally:
        lock.release()


def _check_packages(config: Config) -> None:
    """What a setting asks for beyond what every installation has."""
    asked = {
        "wandb": ("log.wandb_project", config.log.wandb_project is not None, "null"),
        "flash_attn": ("model.attention=flash", config.model.attention == "flash", "sdpa or auto"),
    }
    for package, (key, is_asked, other) in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise UserError(f"{key} needs the package {name}, which is not installed: pip install it, or set {other}")


def _find_models(command: str, config: Config) -> None:
    """A misspelt path is told before an hour of tokenizing, not after."""
    load = config.model.load
    if load is not None and is_hugging_face(load):
        raise UserError(f"model.load {load} is a Hugging Face model; give it as model.hf, and set model.load=null")
    paths = [load, config.model.hf]
    if command == "ppo":
        paths += [*config.ppo.reward_models, config.ppo.value_model]
    for path in paths:
        if path is not None:
            find_model(path)


def _loop(command: str, config: Config, mesh: Mesh, job: Job, start: float) -> bool:
    """Whether the last step was reached."""
    out = Path(config.output_dir)
    checkpointer = Checkpointer(
        mesh, out / "checkpoints", config.checkpoint, dump_config(config), config.data.tokenizer
    )
    done = loop.resume(config, job.algorithm, job.batches, checkpointer)
    with same_outcome(f"output_dir {out} cannot be written"):
        if mesh.rank == 0:  # not before the run there is known to be this one: its configuration would be lost
            (out / "config.yaml").write_text(dump_config(config))
    if done >= job.total_steps:
        if mesh.rank == 0:
            asks = "raise train.steps (or train.epochs), or give another output_dir"
            print(f"{out} is finished (step {done} of {job.total_steps}): {asks}", file=sys.stderr)
            write_run_report(out)
        return True
    if mesh.rank == 0 and done:
        print(f"resuming {out} after step {done} of {job.total_steps}", file=sys.stderr)
    log = MetricsLog(
        out, config.log, title=command, total_steps=job.total_steps, start_step=done, is_main=mesh.rank == 0
    )
    with log:
        stopped = loop.run(
            config,
            job.algorithm,
            job.batches,
            checkpointer,
            log,
            total_steps=job.total_steps,
            done=done,
            deadline=start + config.train.max_seconds if config.train.max_seconds is not None else None,
            evaluate=job.evaluate,
            finish=job.finish,
        )
    if mesh.rank == 0:
        if stopped is not None:
            print(stopped.line, file=sys.stderr)
        page = write_run_report(out)
        if stopped is None:
            print(f"{page}: {command} finished after step {job.total_steps}")
    if stopped is not None and stopped.interrupted:
        raise KeyboardInterrupt
    return stopped is None


class Parts:
    """The parts that every command builds in the same way."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.vocab_size = config.model.vocab_size or len(self.tokenizer)
        if self.vocab_size < len(self.tokenizer):
            raise UserError(
                f"model.vocab_size is {self.vocab_size}, but the tokenizer {config.data.tokenizer} has "
                f"{len(self.tokenizer)} tokens; leave model.vocab_size out to take the tokenizer's size"
            )

    def loader(
        self,
        dataset: Sequence[Any],
        collate: Callable,
        *,
        global_batch_size: int | None = None,
        shuffle: bool = True,
        epochs: int | None = None,
        drop_last: bool = True,
        cost: Callable[[Any], int] | None = None,
    ) -> Loader:
        """With `cost`, the tokens of a sample, train.max_tokens_per_micro_batch decides what a micro-batch holds."""
        train = self.config.train
        budget = train.max_tokens_per_micro_batch if cost is not None else None
        return Loader(
            dataset,
            global_batch_size=global_batch_size or train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data_size,
            seed=train.seed,
            collate=collate,
            shuffle=shuffle,
            epochs=epochs,
            drop_last=drop_last,
            max_tokens=budget,
            cost=cost if budget is not None else None,
            order=dataset.order if isinstance(dataset, PretrainWindows) and dataset.weights is not None else None,
        )

    def total_steps(self, batches: Loader) -> int:
        train = self.config.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return max(1, math.ceil(train.epochs * len(batches)))

    def one_pass(
        self, dataset: Sequence[Any], collate: Callable, cost: Callable[[Any], int] | None = None
    ) -> Callable[[], Loader]:
        """A fresh loader over the whole of `dataset` for every evaluation."""
        return partial(self.loader, dataset, collate, shuffle=False, epochs=1, drop_last=False, cost=cost)

    def windows(self, sources: list[str] | dict[str, float]) -> PretrainWindows:
        cache = self.config.data.cache or Path(self.config.output_dir) / "cache"
        stream = TokenStream.open(list(sources), self.tokenizer, cache)
        weights = list(sources.values()) if isinstance(sources, dict) else None
        return PretrainWindows(stream, self.config.data.sequence_length, weights)

    def demonstrations(self, paths: list[str]) -> Sequence[Any]:
        data = self.config.data
        options = {"max_response_tokens": data.max_response_tokens, "loss_on": data.loss_on}
        return self._read(load_demonstrations, paths, **options)

    def rankings(self, paths: list[str]) -> Sequence[Any]:
        return self._read(load_rankings, paths, max_response_tokens=self.config.data.max_response_tokens)

    def prompts(self, paths: list[str]) -> Sequence[Any]:
        return self._read(load_prompts, paths, prefix=read_prefix(self.config.data.prompt_prefix))

    def _read(self, load: Callable, paths: list[str], **limits: Any) -> Sequence[Any]:
        data = self.config.data
        # Under on_error=quarantine rank 0 sets bad records aside, a file for each set of inputs.
        rejected = Path(self.config.output_dir) / "rejected" / Path(paths[0]).name if self.mesh.rank == 0 else None
        options = {"max_prompt_tokens": data.max_prompt_tokens, "on_error": data.on_error, "rejected": rejected}
        records, _ = load(paths, self.tokenizer, **options, **limits)
        return records

    def stage(self, model: ModelConfig, head: Literal["lm", "scalar"]) -> GPT:
        """The model of the `model` section: from its checkpoint, from a Hugging Face folder, or fresh."""
        fresh, seed = model.load is None and model.hf is None, self.config.train.seed
        stage = build_model(model, self.mesh, self.vocab_size, head=head, seed=seed if fresh else None)
        if not fresh:  # drawing billions of weights to throw them away takes minutes; a scalar head may stay
            initialize_weights(stage, seed, "score.")
        if model.load is not None:
            saved = describe_model(model.load)
            _check_same_shape(model, self.vocab_size, saved)
            check_vocabulary(saved, self.tokenizer, self.config.data.tokenizer)
            load_model(saved, stage)
        elif model.hf is not None:
            from fastrlhf.models.hf import load_hf

            check_vocabulary(find_model(model.hf), self.tokenizer, self.config.data.tokenizer)
            load_hf(model.hf, stage)
        return stage

    def saved_stage(self, path: str, *, fresh_head: bool = False) -> GPT:
        """A reward or value model whose shape is its own (a 6B reward model beside a 175B policy), in the policy's
        dtype. With `fresh_head` it may also be a language model, which gets a new head.

        Raises `UserError` if it cannot read whatever the policy writes.
        """
        saved, seed = find_model(path), self.config.train.seed if fresh_head else None
        _check_reads_all(saved, path, self.config, self.tokenizer)
        return load_saved(saved, self.mesh, "scalar", self.config.model.dtype, seed=seed)

    def learner(
        self, stage: GPT, total_steps: int, schedule: ScheduleConfig | None = None, lr: float | None = None
    ) -> Learner:
        optimizer: OptimizerConfig = self.config.optimizer
        schedule = schedule or self.config.schedule
        return Learner(self.mesh, stage, optimizer, schedule, total_steps=total_steps, lr=lr)


def _pretrain(run: Parts) -> Job:
    data = run.config.data
    text = data.train or data.pretrain
    assert text is not None
    valid = run.one_pass(run.windows(data.valid), pack_windows, window_tokens) if data.valid else None
    return _language_modelling(run, run.loader(run.windows(text), pack_windows, cost=window_tokens), valid)


def _sft(run: Parts) -> Job:
    data = run.config.data
    assert data.train is not None
    dataset = run.demonstrations(data.train)
    if data.pretrain_fraction > 0:
        assert data.pretrain is not None
        dataset = Mixture(dataset, run.windows(data.pretrain), data.pretrain_fraction, run.config.train.seed)
    batches = run.loader(dataset, pack_demonstrations, cost=demonstration_tokens)
    valid = None
    if data.valid:
        valid = run.one_pass(run.demonstrations(data.valid), pack_demonstrations, demonstration_tokens)
    return _language_modelling(run, batches, valid)


def _language_modelling(run: Parts, batches: Loader, evaluation: Callable[[], Loader] | None) -> Job:
    total_steps = run.total_steps(batches)
    policy = run.learner(run.stage(run.config.model, "lm"), total_steps)
    evaluate = None
    if evaluation is not None:

        def evaluate() -> dict[str, float]:
            return {"valid_loss": evaluate_loss(run.mesh, policy.stage, evaluation())}

    return Job(SupervisedFinetuning(run.mesh, policy), batches, total_steps, evaluate)


def _rm(run: Parts) -> Job:
    data = run.config.data
    assert data.train is not None
    return reward_job(run, run.rankings(data.train), run.rankings(data.valid) if data.valid else None)


def reward_job(run: Parts, rankings: Sequence[TokenizedRanking], valid: Sequence[TokenizedRanking] | None) -> Job:
    """A reward model trained on `rankings`, each of whose prompts stays whole in one micro-batch."""
    data, shared = run.config.data, run.config.model.shared_prompt
    collate, cost = partial(pack_rankings, shared_prompt=shared), partial(ranking_tokens, shared_prompt=shared)
    check_groups(rankings, cost, run.config.train.max_tokens_per_micro_batch)
    batches = run.loader(rankings, collate, cost=cost)
    total_steps = run.total_steps(batches)
    algorithm = RewardModelling(run.mesh, run.learner(run.stage(run.config.model, "scalar"), total_steps))
    stage = algorithm.reward.stage
    evaluate = finish = None
    if valid is not None:
        check_groups(valid, cost, run.config.train.max_tokens_per_micro_batch)
        held_out = run.one_pass(valid, collate, cost)

        def evaluate() -> dict[str, float]:
            metrics = evaluate_ranking(run.mesh, stage, held_out())
            return {f"valid_{name}": metrics[name] for name in ("loss", "accuracy", "margin")}

    if data.demonstrations:
        dataset = run.demonstrations(data.demonstrations)
        demonstrations = run.one_pass(dataset, pack_demonstrations, demonstration_tokens)

        def finish() -> None:
            algorithm.centre(demonstrations())

    return Job(algorithm, batches, total_steps, evaluate, finish)


def _ppo(run: Parts) -> Job:
    config, mesh = run.config, run.mesh
    assert config.data.prompts is not None and config.train.steps is not None
    prompts = run.loader(run.prompts(config.data.prompts), list, global_batch_size=config.ppo.batch_size)
    updates = config.ppo.inner_epochs * math.ceil(config.ppo.batch_size / config.ppo.minibatch_size)
    # PPO counts its warm-up in iterations, as it counts its steps.
    schedule = config.schedule.model_copy(update={"warmup_steps": config.schedule.warmup_steps * updates})
    total_updates = config.train.steps * updates
    # Dropout in any of its models, and the ratios of the first update would not be 1.
    model = without_dropout(config.model)
    policy = run.learner(run.stage(model, "lm"), total_updates, schedule)
    value_start = config.ppo.value_model
    value = run.stage(model, "scalar") if value_start is None else run.saved_stage(value_start, fresh_head=True)
    models = Models(
        policy=policy,
        value=run.learner(value, total_updates, schedule, config.ppo.value_lr),
        reference=run.stage(model, "lm"),
        rewards=_rewards(run),
        average=_average(run, model, policy),
    )
    samples = SampleLog(Path(config.output_dir) / "samples.jsonl") if mesh.rank == 0 else None
    algorithm = PPO(mesh, config, models, run.tokenizer, _ptx_batches(run), samples)
    return Job(algorithm, prompts, config.train.steps)


def _check_reads_all(saved: SavedModel, path: str, config: Config, tokenizer: Any) -> None:
    """Of a model that scores the policy's sequences."""
    data, positions = config.data, saved.model.max_positions
    if saved.vocab_size < len(tokenizer):
        raise UserError(
            f"the model in {path} has a vocabulary of {saved.vocab_size}, and the tokenizer {data.tokenizer} "
            f"{len(tokenizer)} tokens; train it with the policy's tokenizer"
        )
    check_meaning(saved, tokenizer, data.tokenizer)
    longest = data.max_prompt_tokens + config.generation.max_new_tokens
    if positions < longest:
        raise UserError(
            f"the model in {path} reads {positions} tokens, and data.max_prompt_tokens + generation.max_new_tokens "
            f"are {longest}; lower one of them, or give a model with more positions"
        )


def _rewards(run: Parts) -> Rewards:
    ppo = run.config.ppo
    weights = ppo.reward_weights or [1.0] * len(ppo.reward_models)
    models = [(w, run.saved_stage(path)) for w, path in zip(weights, ppo.reward_models, strict=True)]
    if ppo.reward_function is None:
        return Rewards(models)
    function = load_reward_function(ppo.reward_function)
    return Rewards(models, function, f"ppo.reward_function {ppo.reward_function}")


def _average(run: Parts, model: ModelConfig, policy: Learner) -> ExponentialAverage | None:
    decay = run.config.ppo.ema_decay
    if decay is None:
        return None
    average = build_model(model.model_copy(update={"dtype": "fp32"}), run.mesh, run.vocab_size)
    return ExponentialAverage(policy.stage, average, decay)


def _ptx_batches(run: Parts) -> Loader | None:
    ppo, pretrain = run.config.ppo, run.config.data.pretrain
    if ppo.gamma_ptx == 0:
        return None
    assert pretrain is not None
    examples = ppo.ptx_per_episode * ppo.minibatch_size
    return run.loader(run.windows(pretrain), pack_windows, global_batch_size=examples, cost=window_tokens)


_SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "max_positions", "position")


def _check_same_shape(model: ModelConfig, vocab_size: int, saved: SavedModel) -> None:
    for name in _SHAPE:
        asked, found = getattr(model, name), getattr(saved.model, name)
        if asked != found:
            raise UserError(
                f"model.{name} is {asked}, but the model in {saved.path} has {found}; set model.{name}={found}"
            )
    if vocab_size != saved.vocab_size:
        raise UserError(
            f"the tokenizer gives a vocabulary of {vocab_size}, but the model in {saved.path} has {saved.vocab_size}; "
            f"set data.tokenizer={saved.tokenizer}"
        )


_BATCHES = {
    **dict.fromkeys(("pretrain", "sft", "rm"), ("train.global_batch_size",)),
    "ppo": ("ppo.batch_size", "ppo.minibatch_size"),
}
"""The sizes that data-parallel ranks and micro-batches must divide."""
_JOBS: dict[str, Callable[[Parts], Job]] = {"pretrain": _pretrain, "sft": _sft, "rm": _rm, "ppo": _ppo}
