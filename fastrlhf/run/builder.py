"""Builds the parts of a run from its configuration: tokenizer, data, models and learners.

Commands differ in which parts they combine (jobs.py). How a part is built is the same for all of
them, and is here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict, TypeVar

from fastrlhf.checkpoint.model_folder import SavedModel, describe_model, load_model
from fastrlhf.config import Config, ModelConfig, ScheduleConfig
from fastrlhf.data.batches import TokenizedDemonstration, TokenizedPrompt, TokenizedRanking
from fastrlhf.data.blend import Blended
from fastrlhf.data.datasets import load_demonstrations, load_prompt_records, load_rankings
from fastrlhf.data.loader import Dataset, Loader
from fastrlhf.data.pretrain import PretrainWindows, TokenStream
from fastrlhf.data.records import OnError
from fastrlhf.data.tokenize import largest_id, load_tokenizer, read_prefix
from fastrlhf.errors import UserError
from fastrlhf.models.checks import check_same_shape, check_saved
from fastrlhf.models.gpt import GPT, build_model, initialize_weights
from fastrlhf.models.hf import load_hf
from fastrlhf.models.loading import find_model, load_saved
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.training.optimizer import Learner

Sample = TypeVar("Sample")
MicroBatch = TypeVar("MicroBatch")


class _RecordOptions(TypedDict):
    """Arguments that all loaders of records share."""

    max_prompt_tokens: int
    on_error: OnError
    rejected: Path | None


class RunBuilder:
    """Builds the parts of one run on `mesh` as `config` says.

    Raises UserError if the tokenizer cannot be read or has more tokens than `model.vocab_size`.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.tokenizer = load_tokenizer(config.data.tokenizer, add_bos=config.data.add_bos)
        largest = largest_id(self.tokenizer)
        self.vocab_size = config.model.vocab_size or largest + 1
        if self.vocab_size <= largest:
            raise UserError(
                f"model.vocab_size is {self.vocab_size}, but the tokenizer {config.data.tokenizer}"
                f" has {len(self.tokenizer)} tokens with ids up to {largest}; leave"
                " model.vocab_size out to take the tokenizer's size"
            )

    # ---- data ----

    def loader(
        self,
        dataset: Dataset[Sample],
        collate: Callable[[list[Sample]], MicroBatch],
        *,
        global_batch_size: int | None = None,
        shuffle: bool = True,
        epochs: int | None = None,
        drop_last: bool = True,
        cost: Callable[[Sample], int] | None = None,
    ) -> Loader[Sample, MicroBatch]:
        """Return a loader of this data-parallel rank's micro-batches.

        With `cost`, the number of tokens of a sample, micro-batches are filled up to
        train.max_tokens_per_micro_batch if that is set.
        """
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
            order=(
                dataset.order
                if isinstance(dataset, Blended)
                or (isinstance(dataset, PretrainWindows) and dataset.weights is not None)
                else None
            ),
        )

    def one_pass(
        self,
        dataset: Dataset[Sample],
        collate: Callable[[list[Sample]], MicroBatch],
        cost: Callable[[Sample], int] | None = None,
    ) -> Callable[[], Iterable[list[MicroBatch]]]:
        """Return a function that makes a new loader over all of `dataset`."""
        return partial(
            self.loader, dataset, collate, shuffle=False, epochs=1, drop_last=False, cost=cost
        )

    def validation(
        self,
        dataset: Dataset[Sample],
        collate: Callable[[list[Sample]], MicroBatch],
        cost: Callable[[Sample], int] | None = None,
    ) -> Callable[[], Iterable[list[MicroBatch]]]:
        """Return what `one_pass` does, ended after train.eval_batches global batches.

        They are the first ones of `dataset`, the same in every validation.
        """
        batches, limit = self.one_pass(dataset, collate, cost), self.config.train.eval_batches
        return lambda: itertools.islice(batches(), limit)

    def total_steps(self, batches: Loader[Sample, MicroBatch]) -> int:
        """Return the steps of the run: train.steps, or train.epochs passes over `batches`."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None
        return max(1, math.ceil(train.epochs * len(batches)))

    def windows(self, sources: list[str] | dict[str, float]) -> PretrainWindows:
        """Return windows of data.sequence_length tokens of pretraining text.

        `sources` are paths, or path -> weight.
        """
        cache = self.config.data.cache or Path(self.config.output_dir) / "cache"
        stream = TokenStream.open(list(sources), self.tokenizer, cache)
        weights = list(sources.values()) if isinstance(sources, dict) else None
        return PretrainWindows(stream, self.config.data.sequence_length, weights)

    def demonstrations(self, paths: list[str]) -> list[TokenizedDemonstration]:
        """Read and tokenize demonstration files."""
        data = self.config.data
        demonstrations, _ = load_demonstrations(
            paths,
            self.tokenizer,
            max_response_tokens=data.max_response_tokens,
            loss_on=data.loss_on,
            **self._record_options(paths),
        )
        return demonstrations

    def rankings(self, paths: list[str]) -> list[TokenizedRanking]:
        """Read and tokenize ranking or pair files."""
        limit = self.config.data.max_response_tokens
        rankings, _ = load_rankings(
            paths, self.tokenizer, max_response_tokens=limit, **self._record_options(paths)
        )
        return rankings

    def blend(
        self,
        sources: list[str] | dict[str, float],
        load: Callable[[list[str]], Sequence[Sample]],
    ) -> Sequence[Sample] | Blended[Sample]:
        """Return the samples that `load` reads from `sources`: paths, or path -> weight."""
        if isinstance(sources, list):
            return load(sources)
        return Blended([load([path]) for path in sources], list(sources.values()))

    def prompts(self, paths: list[str]) -> list[TokenizedPrompt]:
        """Read and tokenize prompt files."""
        prefix = read_prefix(self.config.data.prompt_prefix)
        records, tokens, _ = load_prompt_records(
            paths, self.tokenizer, prefix=prefix, **self._record_options(paths)
        )
        return [
            TokenizedPrompt(ids, record.other_columns)
            for ids, record in zip(tokens, records, strict=True)
        ]

    def _record_options(self, paths: list[str]) -> _RecordOptions:
        data = self.config.data
        # Under on_error=quarantine rank 0 writes malformed records to one file for each set of
        # inputs.
        rejected = (
            Path(self.config.output_dir) / "rejected" / Path(paths[0]).name
            if self.mesh.rank == 0
            else None
        )
        return {
            "max_prompt_tokens": data.max_prompt_tokens,
            "on_error": data.on_error,
            "rejected": rejected,
        }

    # ---- models ----

    def model(self, config: ModelConfig, head: Literal["lm", "scalar"]) -> GPT:
        """Build a model of the shape `config` and load or draw its weights.

        Weights come from config.load, else from config.hf, else they are drawn from train.seed. A
        scalar head that the source does not have is drawn too. `check_models` has compared shapes.
        """
        is_fresh, seed = config.load is None and config.hf is None, self.config.train.seed
        model = build_model(
            config, self.mesh, self.vocab_size, head=head, seed=seed if is_fresh else None
        )
        if (
            not is_fresh
        ):  # drawing billions of weights only to overwrite them takes minutes; the head may stay
            initialize_weights(model, seed, "score.")
        if config.load is not None:
            load_model(describe_model(config.load), model)
        elif config.hf is not None:
            load_hf(config.hf, model)
        return model

    def check_models(self, *, ppo: bool = False) -> None:
        """Check the model section's checkpoint, and with `ppo` every other model of the run.

        Nothing but descriptions is read. Raises UserError naming the model's setting.
        """
        config = self.config
        path = config.model.load or config.model.hf
        if path is not None:
            saved = find_model(path)
            key = "model.load" if config.model.load else "model.hf"
            check_saved(saved, key, config.parallel, self.tokenizer, config.data.tokenizer)
            check_same_shape(config.model, self.vocab_size, saved, "lm" if ppo else saved.head)
        if ppo:
            for reward in config.ppo.reward_models:
                self._described("ppo.reward_model", reward, "scalar")
            if config.ppo.value_model is not None:
                self._described("ppo.value_model", config.ppo.value_model)
            if config.ppo.reference_model is not None:
                self._described("ppo.reference_model", config.ppo.reference_model, "lm")

    def _described(self, key: str, path: str, head: str | None = None) -> SavedModel:
        """Return the description of the model that the setting `key` names, checked."""
        config = self.config
        saved = find_model(path)
        if head == "scalar" and saved.head != head:
            raise UserError(
                f"{key} {saved.path} is a language model: its scores would be random; give a "
                "reward model, a run of fastrlhf rm"
            )
        if head == "lm" and saved.head != head:
            raise UserError(f"{key} {saved.path} is a reward or value model; give a language model")
        longest = config.data.max_prompt_tokens + config.generation.max_new_tokens
        folder = config.data.tokenizer
        check_saved(saved, key, config.parallel, self.tokenizer, folder, longest)
        return saved

    def reward(self, path: str) -> GPT:
        """Load the reward model at `path`, in its own shape and in the policy's dtype.

        A 6B reward model can serve a 175B policy. Raises UserError if the model cannot read every
        sequence that the policy can produce.
        """
        saved = self._described("ppo.reward_model", path, "scalar")
        return load_saved(saved, self.mesh, "scalar", self.config.model.dtype)

    def value(self, path: str) -> GPT:
        """Load the value model at `path` as `reward` does; a language model gets a new head."""
        saved = self._described("ppo.value_model", path)
        seed, dtype = self.config.train.seed, self.config.model.dtype
        return load_saved(saved, self.mesh, "scalar", dtype, seed=seed)

    def reference(self, shape: ModelConfig) -> GPT:
        """Load ppo.reference_model in its own shape, or the policy's start in `shape`."""
        path = self.config.ppo.reference_model
        if path is None:
            return self.policy(shape)
        saved = self._described("ppo.reference_model", path, "lm")
        return self._with_tokens(load_saved(saved, self.mesh, "lm", self.config.model.dtype))

    def policy(self, shape: ModelConfig) -> GPT:
        """Build the policy's start, whose distribution is over the tokenizer's ids alone."""
        return self._with_tokens(self.model(shape, "lm"))

    def _with_tokens(self, model: GPT) -> GPT:
        model.num_tokens = largest_id(self.tokenizer) + 1
        return model

    def learner(
        self,
        model: GPT,
        total_steps: int,
        schedule: ScheduleConfig | None = None,
        lr: float | None = None,
    ) -> Learner:
        """Return `model` with an optimizer and a learning-rate schedule over `total_steps`."""
        schedule = schedule or self.config.schedule
        return Learner(
            self.mesh, model, self.config.optimizer, schedule, total_steps=total_steps, lr=lr
        )
