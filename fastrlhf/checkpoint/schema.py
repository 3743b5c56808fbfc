"""Schemas of `state.json` and `model.json`, strict and versioned.

A file without a version is of version 1. Every failure to read one (no file, no JSON, wrong types,
missing keys, a newer version) is one line with the file's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastrlhf.config import ModelConfig
from fastrlhf.data.files import printable

STATE_VERSION = 1
"""Version of `state.json` that this package writes; it reads no newer one."""
MODEL_VERSION = 2
"""Version of `model.json`. Version 1 has no `generation`."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """Data whose keys are all named here."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Open(BaseModel):
    """State that another part of the package defines; keys that are not named here are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")


class DataPosition(_Open):
    """Position in a data set."""

    epoch: Count = 0
    cursor: Count = 0


class AlgorithmState(_Open):
    """State of an algorithm in addition to its models."""

    iteration: Count = 0
    average_moves: Count = 0
    kl_coefficient: Finite = 0.0
    pretraining: DataPosition | None = None
    reference_model: str | None = None
    statistics: dict[str, float] = Field(default_factory=dict)


class LossScale(_Open):
    """State of the fp16 loss scale."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    growth_tracker: Count = 0
    hysteresis_tracker: int = 0


class LearnerFile(_Strict):
    """State of a model in training."""

    updates: Count
    loss_scale: LossScale | None = None


class StateFile(_Open):
    """Content of `state.json`."""

    newest: ClassVar[int] = STATE_VERSION
    version: Literal[1] = 1
    step: Count
    data: DataPosition = Field(default_factory=DataPosition)
    algorithm: AlgorithmState = Field(default_factory=AlgorithmState)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    learners: dict[str, LearnerFile]
    layout: list[Annotated[int, Field(ge=1)]]
    versions: dict[str, str]


class ModelFile(_Strict):
    """Content of `model.json`."""

    newest: ClassVar[int] = MODEL_VERSION
    version: Literal[1, 2] = 1
    model: dict[str, Any]
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    head: Literal["lm", "scalar"]
    tokenizer: str
    statistics: dict[str, float] = Field(default_factory=dict)
    generation: dict[str, Any] = Field(default_factory=dict)

    def config(self) -> ModelConfig:
        """Return the model section; raises ValueError if it is not one."""
        return ModelConfig(**self.model)


File = TypeVar("File", StateFile, ModelFile)


def read_file(path: Path, schema: type[File]) -> File:
    """Read a JSON file as `schema`.

    Raises ValueError with the reason, on one line and without the path, if its content does not
    fit; OSError if it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    version = content.get("version", 1) if isinstance(content, dict) else 1
    if isinstance(version, int) and version > schema.newest:
        raise ValueError(
            f"it has version {version}, and this fastrlhf reads {schema.newest}; update fastrlhf"
        )
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise ValueError(describe_validation(error)) from None


def describe_validation(error: ValueError) -> str:
    """Return the first failure of a validation on one line: key, reason and value."""
    if not isinstance(error, ValidationError):
        return printable(" ".join(str(error).split()))
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
    reason = " ".join(first["msg"].split())
    return printable(f"{key}: {reason}{got}" if key else f"{reason}{got}")
