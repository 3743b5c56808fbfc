"""Configuration of a run: strict pydantic models, read from YAML and command-line overrides.

Imports neither torch nor megatron and opens no data file: each path is checked by the module that
opens it. Names are imported when they are first used, so that the command line can show its help
without loading pydantic and YAML.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrlhf.config.commands import (
        COMMANDS,
        TRAINING_COMMANDS,
        Command,
        TrainingCommand,
        require,
        training_command,
        unread_settings,
    )
    from fastrlhf.config.model import ModelConfig
    from fastrlhf.config.rl import EvalConfig, GenerationConfig, PPOConfig, SampleConfig
    from fastrlhf.config.schema import Config, check_batch, dump_config, load_config
    from fastrlhf.config.sections import (
        CheckpointConfig,
        DataConfig,
        LogConfig,
        OptimizerConfig,
        ParallelConfig,
        ScheduleConfig,
        TrainConfig,
    )

__all__ = [
    "COMMANDS",
    "TRAINING_COMMANDS",
    "CheckpointConfig",
    "Command",
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
    "TrainingCommand",
    "check_batch",
    "dump_config",
    "load_config",
    "require",
    "training_command",
    "unread_settings",
]

_OWNERS = {
    "commands": (
        "COMMANDS",
        "TRAINING_COMMANDS",
        "Command",
        "TrainingCommand",
        "require",
        "training_command",
        "unread_settings",
    ),
    "model": ("ModelConfig",),
    "rl": ("EvalConfig", "GenerationConfig", "PPOConfig", "SampleConfig"),
    "schema": ("Config", "check_batch", "dump_config", "load_config"),
    "sections": (
        "CheckpointConfig",
        "DataConfig",
        "LogConfig",
        "OptimizerConfig",
        "ParallelConfig",
        "ScheduleConfig",
        "TrainConfig",
    ),
}
"""Module of this package -> the names it defines."""


def __getattr__(name: str) -> object:
    for module, names in _OWNERS.items():
        if name in names:
            value: object = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
