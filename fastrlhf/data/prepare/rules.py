"""Configuration of `data prepare`; unknown keys are errors, as in a run's configuration.

fastrlhf data prepare configs/data/prepare.yaml max_per_user=100
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from fastrlhf.config.field_types import Positive, Rate, Seed, Strings
from fastrlhf.config.section import Section
from fastrlhf.config.yaml_file import ConfigError
from fastrlhf.data.files import as_paths
from fastrlhf.data.records import OnError

Split: TypeAlias = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def named_sources(value: Any) -> Any:
    """Return a path or list of paths as {file name: [path, ...]}, anything else unchanged.

    The name is the file name up to its first dot. pydantic checks what is returned unchanged.
    """
    if isinstance(value, (str, Path)) or (
        isinstance(value, list) and all(isinstance(p, (str, Path)) for p in value)
    ):
        named: dict[str, list[str]] = {}
        for path in as_paths(value):
            named.setdefault(path.name.split(".")[0], []).append(str(path))
        return named
    return value


Sources = Annotated[dict[str, Strings], BeforeValidator(named_sources), Field(min_length=1)]
"""Files by the name of their source; a path or a list of paths is named by its files."""


class Rules(Section):
    """The rules of InstructGPT (arXiv 2203.02155, section 3.2 and appendix A).

    Where the paper gives no value, the default is fastrlhf's choice.
    """

    seed: Seed = 1234
    """Seed of the splits and of the choice between duplicates."""
    prefix: Positive | None = 200
    """Prompts that share this many first characters or tokens are duplicates; shorter ones if they
    are equal. Case and spacing are ignored. Of rankings, the responses and the labeler are compared
    too. null: compare complete prompts, and of demonstrations the responses too."""
    prefix_unit: Literal["characters", "tokens"] = "characters"
    """Unit of prefix; tokens need a tokenizer."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer. None: lengths are reported in characters."""
    max_per_user: Positive = 200
    """Maximum number of prompts kept per user."""
    valid_fraction: Rate = 0.05
    """Share of the users in valid."""
    test_fraction: Rate = 0.05
    """Share of the users in test."""
    min_chars: Positive = 1
    """Shorter prompts are dropped."""
    max_chars: Positive = 20_000
    """Longer prompts are dropped."""
    max_prompt_tokens: Positive | None = None
    """Prompts of more tokens are dropped; needs a tokenizer. None: no limit but max_chars."""
    pii: Literal["drop", "redact", "keep"] = "drop"
    """Records with personal data are dropped, or redacted (each finding becomes [EMAIL], [PHONE],
    ...); keep does not search them."""
    pii_splits: list[Split] = Field(default=["train"], min_length=1)
    """Splits that are searched for personal data; the paper searched the training split."""

    @model_validator(mode="after")
    def _check(self) -> Rules:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ConfigError(
                "test_fraction", "and valid_fraction add up to 1 or more; leave users for train"
            )
        if self.min_chars > self.max_chars:
            raise ConfigError(
                "min_chars", f"{self.min_chars} is above max_chars {self.max_chars}; lower it"
            )
        for name, used in (
            ("prefix_unit", self.prefix_unit == "tokens"),
            ("max_prompt_tokens", self.max_prompt_tokens),
        ):
            if used and self.tokenizer is None:
                raise ConfigError(
                    name, "counts tokens; set tokenizer to the folder of the model's tokenizer"
                )
        return self


class Inputs(Section):
    """Record files by kind. Each kind is a path, a list, or source: paths."""

    demonstrations: Sources | None = None
    """For SFT."""
    rankings: Sources | None = None
    """For the reward model; pairs too."""
    prompts: Sources | None = None
    """For PPO."""


class PrepareConfig(Rules):
    """One `data prepare`: all kinds of records with the same rules.

    A user is in the same split of all kinds.
    """

    inputs: Inputs
    """Files to read."""
    out: str
    """Folder to write, with one folder for each kind."""
    on_error: OnError = "strict"
    """A malformed record stops the command (strict) or goes to rejected.jsonl (quarantine)."""

    @model_validator(mode="after")
    def _check_inputs(self) -> PrepareConfig:
        if not any(getattr(self.inputs, kind) for kind in Inputs.model_fields):
            raise ConfigError(
                "inputs",
                f"names no files; give {', '.join(Inputs.model_fields)} or several of them",
            )
        return self
