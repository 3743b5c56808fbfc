"""The models of a run: their shapes, and what a rank keeps of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrlhf.checkpoint.model_folder import describe_model
from fastrlhf.config import Config, ModelConfig, load_config
from fastrlhf.data.tokenize import largest_id, load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import Head
from fastrlhf.models.loading import without_dropout

GPT_VOCABULARY = 50257
"""Tokens of GPT-2's and GPT-3's byte-pair encoding: the assumption without a tokenizer."""


@dataclass(frozen=True)
class Role:
    """One model of a run."""

    name: str
    """policy, value, reference, reward, average; or model where there is only one."""
    model: ModelConfig
    head: Head
    vocab_size: int
    is_trained: bool
    is_offloaded: bool = False
    """Whether it waits in host memory while it is not in use."""


def roles(config: Config, command: str, source: Path) -> tuple[list[Role], list[str]]:
    """Return the models of `command`, and a line for each assumption that was made.

    `source` is the file of `config`. Nothing but the descriptions of models is read.
    """
    vocab_size, notes = _vocabulary(config)
    head: Head = "scalar" if command == "rm" else "lm"
    if command != "ppo":
        return [Role("model", config.model, head, vocab_size, is_trained=True)], notes
    shape, offload = without_dropout(config.model), config.ppo.offload
    found = [Role("policy", shape, "lm", vocab_size, is_trained=True)]
    for name, path in _scorers(config):
        other = shape
        if path is not None:
            other, size, note = _find_shape(path, config, source, vocab_size)
            other = without_dropout(other.model_copy(update={"dtype": shape.dtype}))
            notes += [note] if note and note not in notes else []
        else:
            size = vocab_size
        trained = name == "value"
        found.append(Role(name, other, "scalar", size, trained, offload and not trained))
    reference = shape
    if config.ppo.reference_model is not None:
        reference, _, note = _find_shape(config.ppo.reference_model, config, source, vocab_size)
        notes += [note] if note and note not in notes else []
    found.append(Role("reference", without_dropout(reference), "lm", vocab_size, False, offload))
    if config.ppo.ema_decay is not None:
        average = shape.model_copy(update={"dtype": "fp32"})
        found.append(Role("average", average, "lm", vocab_size, False, offload))
    return found, notes


def _scorers(config: Config) -> Iterator[tuple[str, str | None]]:
    """Yield the value model and the reward models: (role, path or None for the policy's shape)."""
    yield "value", config.ppo.value_model
    for path in config.ppo.reward_models:
        yield "reward", path


def _vocabulary(config: Config) -> tuple[int, list[str]]:
    if config.model.vocab_size is not None:
        return config.model.vocab_size, []
    tokenizer = config.data.tokenizer
    try:
        return largest_id(load_tokenizer(tokenizer)) + 1, []
    except UserError:
        note = f"{tokenizer} cannot be read: {GPT_VOCABULARY} tokens are assumed, those of GPT-3"
        return GPT_VOCABULARY, [note]


def _find_shape(
    path: str, config: Config, source: Path, vocab_size: int
) -> tuple[ModelConfig, int, str]:
    """Return the shape and vocabulary of the model at `path`, and the assumption made, if any.

    A model that does not exist yet has the shape of the configuration that will write it: the file
    next to this run's, or in a neighboring folder, whose output_dir is `path`.
    """
    try:
        saved = describe_model(path)
        return saved.model, saved.vocab_size, ""
    except UserError:
        pass
    writer = _config_writing(path, source)
    if writer is None:
        note = f"{path} does not exist: the shape of the policy is assumed"
        return config.model, vocab_size, note
    model = load_config(writer).model
    return (
        model,
        model.vocab_size or vocab_size,
        f"{path} does not exist: its shape is that of {writer}",
    )


def _config_writing(path: str, source: Path) -> Path | None:
    """Return the configuration near `source` whose output_dir is `path`, None if there is none."""
    for candidate in sorted(
        {*source.parent.glob("*.yaml"), *source.parent.parent.glob("*/*.yaml")}
    ):
        try:
            if Path(load_config(candidate).output_dir) == Path(path):
                return candidate
        except UserError:
            continue  # another kind of YAML file
    return None
