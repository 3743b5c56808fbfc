"""The configuration of a run: reading it, the checks that span sections, and what each command needs.

The sections and their fields are in `configsections.py` and `configrl.py`, YAML and overrides in `configfile.py`. No
torch, no megatron, and no look at the data: a path is checked by the module that opens it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fastrlhf import configfile
from fastrlhf.configfile import ConfigError
from fastrlhf.configrl import EvalConfig, GenerationConfig, PPOConfig, SampleConfig
from fastrlhf.configsections import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    Section,
    TrainConfig,
)
from fastrlhf.errors import UserError

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GenerationConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ParallelConfig",
    "SampleConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check_batch",
    "dump_config",
    "load_config",
    "require",
]


class Config(Section):
    """One run."""

    model: ModelConfig
    """The model that is trained or sampled."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How it is split over processes."""
    data: DataConfig
    """What it reads."""
    optimizer: OptimizerConfig
    """How it learns."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Its learning rate over time."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Length and batches."""
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    """The PPO algorithm; read by the ppo command only."""
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    """Sampling, in PPO rollouts too."""
    sample: SampleConfig = Field(default_factory=SampleConfig)
    """What the sample command writes."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """What the eval commands compare."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = Field(default_factory=LogConfig)
    """Reporting."""
    output_dir: str
    """Folder that the run writes."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        model, tensor, pipeline = self.model, self.parallel.tensor, self.parallel.pipeline
        for name in ("num_heads", "num_kv_heads", "ffn_size"):
            size = getattr(model, name)
            if size % tensor:
                cure = f"use a divisor of {size}, or change model.{name}"
                raise ConfigError("parallel.tensor", f"{tensor} does not divide model.{name} {size}; {cure}")
        if model.num_layers % pipeline:
            cure = f"use a divisor of {model.num_layers}"
            raise ConfigError(
                "parallel.pipeline", f"{pipeline} does not divide model.num_layers {model.num_layers}; {cure}"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML), validate.

    Raises UserError with one line that names the file and line, or the override, the key and what was expected.
    """
    return configfile.load(Config, Path(path), overrides)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return configfile.dump(config)


def check_batch(config: Config, data_parallel: int, key: str = "train.global_batch_size") -> int:
    """Micro-batches per data-parallel rank in one batch: `key` / (train.micro_batch_size * data_parallel), exactly.

    `key` is "train.global_batch_size", "ppo.batch_size" or "ppo.minibatch_size". Raises UserError if the division
    leaves a remainder, so that no sample is ever dropped or repeated in silence. Under a token budget
    (train.max_tokens_per_micro_batch) a rank needs one sample, and 1 is returned: lengths decide the rest.
    """
    batch, micro = _get(config, key), config.train.micro_batch_size
    if config.train.max_tokens_per_micro_batch is not None:
        if batch < data_parallel:
            raise UserError(f"{key} {batch} is below the data-parallel size {data_parallel}; every rank needs a sample")
        return 1
    unit = micro * data_parallel
    if batch % unit:
        raise UserError(
            f"{key} {batch} is not a multiple of train.micro_batch_size {micro} x data-parallel size {data_parallel} "
            f"= {unit}; use a multiple of {unit}, or change the micro-batch or the number of processes"
        )
    return batch // unit


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


_RECORDS = "(JSONL, JSONL.gz or parquet)"
_FILES = {
    "pretrain": {"data.train": "the text (JSONL with a text field, or a .bin/.idx pair)"},
    "sft": {"data.train": f"the demonstrations {_RECORDS}"},
    "rm": {"data.train": f"the rankings or pairs {_RECORDS}"},
    "ppo": {"data.prompts": f"the prompts {_RECORDS}"},
    "sample": {"data.prompts": f"the prompts {_RECORDS}"},
    "eval winrate": {
        "data.prompts": f"the prompts {_RECORDS}",
        "eval.baseline": "the run, checkpoint, model folder or Hugging Face folder to compare with",
    },
    "eval select": {"data.prompts": f"the validation prompts {_RECORDS}"},
    "eval rm": {
        "data.valid": f"the held-out rankings or pairs {_RECORDS}",
        "model.load": "the run, checkpoint or model folder of a trained reward model",
    },
}
"""The paths that each command cannot do without, and what they hold."""


def require(config: Config, command: str) -> None:
    """Raise UserError, one line, for the first thing that `command` needs and `config` lacks.

    Commands: pretrain, sft, rm, ppo, sample, eval rm; any other needs nothing beyond a valid configuration.
    """
    for key, what in _FILES.get(command, {}).items():
        if not _get(config, key) and not (command == "pretrain" and config.data.pretrain):
            raise UserError(f"{command} needs {key}: {what}; add it to the configuration or pass {key}=PATH")
    if command in ("pretrain", "sft", "rm"):
        if config.train.steps is None and config.train.epochs is None:
            raise UserError(f"{command} needs a length: set train.steps or train.epochs")
        if "global_batch_size" not in config.train.model_fields_set:
            raise UserError(f"{command} needs train.global_batch_size: the samples in one step over all ranks")
    if command == "sft" and config.data.pretrain_fraction > 0 and not config.data.pretrain:
        raise UserError("data.pretrain_fraction above 0 needs data.pretrain: the text to mix in (or set it to 0)")
    if command == "ppo":
        _require_ppo(config)
    if command in ("eval winrate", "eval select") and not (config.eval.reward_model or config.eval.judge):
        raise UserError(
            f"{command} needs a judge: set eval.reward_model to a reward model's checkpoint folder, or eval.judge to a "
            "Python function module:function"
        )
    _require_positions(config, command)


def _require_ppo(config: Config) -> None:
    ppo, generation = config.ppo, config.generation
    if not ppo.reward_models and ppo.reward_function is None:
        raise UserError(
            "ppo needs ppo.reward_model or ppo.reward_function: the checkpoint folder of a trained reward model, or a "
            "Python function module:function"
        )
    if config.train.steps is None:
        raise UserError("ppo needs train.steps: its number of iterations, which is episodes / ppo.batch_size")
    if ppo.gamma_ptx > 0 and not config.data.pretrain:
        raise UserError("ppo.gamma_ptx above 0 needs data.pretrain: pretraining text (plain PPO: ppo.gamma_ptx=0)")
    if generation.temperature == 0:
        raise UserError("ppo needs generation.temperature above 0: greedy rollouts explore nothing; use 1.0")
    if generation.top_k > 0 or generation.top_p < 1:
        raise UserError(
            "ppo needs generation.top_k=0 and generation.top_p=1.0: log-probabilities of a truncated distribution "
            "are not the policy's, and the ratio would be wrong from the first step"
        )


def _require_positions(config: Config, command: str) -> None:
    """The longest sequence that the command can build must fit the model's positions."""
    lengths: list[list[str]] = []
    if command in ("sft", "rm"):
        lengths.append(["data.max_prompt_tokens", "data.max_response_tokens"])
    if command in ("ppo", "sample"):
        lengths.append(["data.max_prompt_tokens", "generation.max_new_tokens"])
    ptx = {"pretrain": 1.0, "sft": config.data.pretrain_fraction, "ppo": config.ppo.gamma_ptx}
    if ptx.get(command, 0.0) > 0:
        lengths.append(["data.sequence_length"])
    for keys in lengths:
        if sum(_get(config, key) for key in keys) > config.model.max_positions:
            terms = " + ".join(f"{key} {_get(config, key)}" for key in keys)
            raise UserError(f"{terms} is above model.max_positions {config.model.max_positions}; shorten the sequences")
        budget = config.train.max_tokens_per_micro_batch
        # Elsewhere lengths are known when the data are read; a response's only when it is sampled.
        if command == "ppo" and budget is not None and sum(_get(config, key) for key in keys) > budget:
            terms = " + ".join(f"{key} {_get(config, key)}" for key in keys)
            raise UserError(f"{terms} is above train.max_tokens_per_micro_batch {budget}; raise it to the sum at least")
