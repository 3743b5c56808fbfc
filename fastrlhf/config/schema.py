"""The configuration of a run: all sections, the checks that span them, reading and writing.

Fields are defined in `sections.py` and `rl.py`, YAML and overrides in `yaml_file.py`, what each
command needs in `commands.py`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fastrlhf.config import yaml_file
from fastrlhf.config.field_types import FilePath
from fastrlhf.config.model import ModelConfig
from fastrlhf.config.rl import EvalConfig, GenerationConfig, PPOConfig, SampleConfig
from fastrlhf.config.section import Section
from fastrlhf.config.sections import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from fastrlhf.config.shape import check_layout, complete_shape
from fastrlhf.errors import UserError


class Config(Section):
    """The configuration of one run."""

    model: ModelConfig
    """The model that is trained or sampled."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is split over processes."""
    data: DataConfig
    """Input files and tokenization."""
    optimizer: OptimizerConfig
    """AdamW."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """The learning-rate schedule."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Training length and batch sizes."""
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    """The PPO algorithm."""
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    """Sampling, including PPO rollouts."""
    sample: SampleConfig = Field(default_factory=SampleConfig)
    """What the sample command writes."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """What the eval commands compare."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = Field(default_factory=LogConfig)
    """Metrics, samples and progress."""
    output_dir: FilePath
    """Folder that the run writes."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_layout(self.model, self.parallel, "model.", "change model.{name}")
        return self

    def setting(self, key: str) -> object:
        """Return the value of a dotted key such as `train.global_batch_size`."""
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def size(self, key: str) -> int:
        """Return the value of a dotted key that holds an integer."""
        value = self.setting(key)
        assert isinstance(value, int)
        return value


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate the result.

    Override values are YAML. Keys of the model's shape that are not given come from `model.load` or
    `model.hf`. Raises UserError with one line that names the file and line (or the
    override), the key, and what was expected.
    """
    return yaml_file.load(Config, Path(path), overrides, complete_shape)


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml_file.dump(config)


def check_batch(config: Config, data_parallel: int, key: str = "train.global_batch_size") -> int:
    """Return the micro-batches per data-parallel rank in one batch, by exact division.

    The result is `key` / (train.micro_batch_size * data_parallel); `key` is
    "train.global_batch_size", "ppo.batch_size" or "ppo.minibatch_size". Under a token budget
    (train.max_tokens_per_micro_batch) the result is 1: the number of micro-batches depends on the
    lengths, and a rank only needs one sample.

    Raises UserError if the division leaves a remainder: no sample is ever dropped or repeated
    silently.
    """
    batch, micro = config.size(key), config.train.micro_batch_size
    if config.train.max_tokens_per_micro_batch is not None:
        if batch < data_parallel:
            raise UserError(
                f"{key} {batch} is below the data-parallel size {data_parallel}; every rank needs a"
                " sample"
            )
        return 1
    unit = micro * data_parallel
    if batch % unit:
        raise UserError(
            f"{key} {batch} is not a multiple of train.micro_batch_size {micro} x data-parallel"
            f" size {data_parallel} = {unit}; use a multiple of {unit}, or change the micro-batch"
            " or the number of processes"
        )
    return batch // unit
