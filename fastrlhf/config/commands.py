"""The table of commands: what each needs, and how a training command is built.

The command line, the checks before a run and the help texts read this table and nothing else.
Adding an algorithm is one row in `TRAINING_COMMANDS` and one file in `algorithms/`
(docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from fastrlhf.config.schema import Config
    from fastrlhf.config.section import Section

_RECORDS = "(JSONL, JSONL.gz or parquet)"
_TRAINING_SECTIONS = (
    "model",
    "parallel",
    "data",
    "optimizer",
    "schedule",
    "train",
    "checkpoint",
    "log",
)


@dataclass(frozen=True)
class Required:
    """A setting without which a command cannot run; any one of `keys` is enough."""

    keys: tuple[str, ...]
    holds: str
    """What the setting names, for the error message."""

    def is_set(self, config: Config) -> bool:
        return any(config.setting(key) for key in self.keys)


def _accept(command: Command, config: Config) -> None:
    """Accept every valid configuration."""


def _never(config: Config) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that reads a run's configuration."""

    name: str
    """As typed after `fastrlhf`."""
    summary: str
    """First line of its help."""
    sections: tuple[str, ...]
    """Configuration sections that it reads, apart from `unread`."""
    unread: tuple[str, ...] = ()
    """Keys of those sections that it never reads, whatever the other settings are."""
    required: tuple[Required, ...] = ()
    """Settings that it cannot do without."""
    longest_sequence: tuple[str, ...] = ()
    """Settings whose sum is the longest sequence of tokens that it can build, unless it is bounded
    by the data."""
    reads_windows: Callable[[Config], bool] = _never
    """Whether it reads windows of `data.sequence_length` tokens of pretraining text."""
    check: Callable[[Command, Config], None] = _accept
    """Further checks; raises UserError."""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand(Command):
    """A command that runs the training loop."""

    job: str
    """Function of `fastrlhf.run.jobs` that builds its `TrainingJob`."""
    batch_keys: tuple[str, ...] = ("train.global_batch_size",)
    """Batch sizes that the micro-batch and the data-parallel size must divide."""


def _check_length(command: Command, config: Config) -> None:
    if config.train.steps is None and config.train.epochs is None:
        raise UserError(f"{command.name} needs a length: set train.steps or train.epochs")
    if "global_batch_size" not in config.train.model_fields_set:
        raise UserError(
            f"{command.name} needs train.global_batch_size: the samples in one step over all ranks"
        )


def _check_sft(command: Command, config: Config) -> None:
    _check_length(command, config)
    if config.data.pretrain_fraction > 0 and isinstance(config.data.train, dict):
        raise UserError(
            "data.train with weights cannot be mixed with pretraining rows; give a list of files,"
            " or set data.pretrain_fraction to 0"
        )
    if config.data.pretrain_fraction > 0 and not config.data.pretrain:
        raise UserError(
            "data.pretrain_fraction above 0 needs data.pretrain: the text to mix in (or set it"
            " to 0)"
        )


def _check_ppo(command: Command, config: Config) -> None:
    ppo, generation = config.ppo, config.generation
    if not ppo.reward_models and ppo.reward_function is None:
        raise UserError(
            "ppo needs ppo.reward_model or ppo.reward_function: the checkpoint folder of a trained"
            " reward model, or a Python function module:function"
        )
    if config.train.steps is None:
        raise UserError(
            "ppo needs train.steps: its number of iterations, which is episodes / ppo.batch_size"
        )
    if ppo.gamma_ptx > 0 and not config.data.pretrain:
        raise UserError(
            "ppo.gamma_ptx above 0 needs data.pretrain: pretraining text (plain PPO:"
            " ppo.gamma_ptx=0)"
        )
    if generation.temperature == 0:
        raise UserError(
            "ppo needs generation.temperature above 0: greedy rollouts explore nothing; use 1.0"
        )
    if generation.top_k > 0 or generation.top_p < 1:
        raise UserError(
            "ppo needs generation.top_k=0 and generation.top_p=1.0: log-probabilities of a"
            " truncated distribution are not the policy's, and the ratio would be wrong from the"
            " first step"
        )
    budget = config.train.max_tokens_per_micro_batch
    for keys in _sequences(command, config):
        # Other commands learn their lengths when they read the data; a response's is known only
        # once it is sampled.
        if budget is not None and _length(config, keys) > budget:
            raise UserError(
                f"{_terms(config, keys)} is above train.max_tokens_per_micro_batch {budget}; raise"
                " it to the sum at least"
            )


def _check_judge(command: Command, config: Config) -> None:
    if not (config.eval.reward_model or config.eval.judge):
        raise UserError(
            f"{command.name} needs a judge: set eval.reward_model to a reward model's checkpoint"
            " folder, or eval.judge to a Python function module:function"
        )


_TRAINING_LENGTH = (
    "train.steps",
    "train.epochs",
    "train.global_batch_size",
    "train.max_seconds",
    "train.eval_interval",
    "train.eval_batches",
)
_PASSES = ("train.micro_batch_size", "train.max_tokens_per_micro_batch")
_TEXT = (
    "data.pretrain",
    "data.pretrain_fraction",
    "data.pretrain_fraction_of",
    "data.cache",
    "data.sequence_length",
)
_TRAINING_FILES = ("data.train", "data.demonstrations", "data.loss_on", *_TEXT)
_UNREAD_WITH_PROMPTS = (
    *_TRAINING_FILES,
    *_TRAINING_LENGTH,
    "data.valid",
    "data.max_response_tokens",
)
"""What commands that only answer prompts leave unread."""
_RANKINGS_ONLY = ("model.shared_prompt", "data.demonstrations")
_ROLLOUTS_ONLY = ("data.prompts", "data.prompt_prefix", "log.samples")
_DROPOUT = ("model.residual_dropout", "model.embedding_dropout", "model.attention_dropout")

TRAINING_COMMANDS: dict[str, TrainingCommand] = {
    command.name: command
    for command in (
        TrainingCommand(
            name="pretrain",
            summary="Train a language model on plain text.",
            sections=_TRAINING_SECTIONS,
            unread=(
                *_RANKINGS_ONLY,
                *_ROLLOUTS_ONLY,
                "data.loss_on",
                "data.pretrain_fraction",
                "data.pretrain_fraction_of",
                "data.max_prompt_tokens",
                "data.max_response_tokens",
                "data.on_error",
            ),
            required=(
                Required(
                    ("data.train", "data.pretrain"),
                    "the text (JSONL with a text field, or a .bin/.idx pair)",
                ),
            ),
            reads_windows=lambda config: True,
            check=_check_length,
            job="pretrain_job",
        ),
        TrainingCommand(
            name="sft",
            summary="Fine-tune on demonstrations.",
            sections=_TRAINING_SECTIONS,
            unread=(*_RANKINGS_ONLY, *_ROLLOUTS_ONLY),
            required=(Required(("data.train",), f"the demonstrations {_RECORDS}"),),
            longest_sequence=("data.max_prompt_tokens", "data.max_response_tokens"),
            reads_windows=lambda config: config.data.pretrain_fraction > 0,
            check=_check_sft,
            job="sft_job",
        ),
        TrainingCommand(
            name="rm",
            summary="Train a reward model on rankings or pairs.",
            sections=_TRAINING_SECTIONS,
            unread=(*_TEXT, *_ROLLOUTS_ONLY),
            required=(Required(("data.train",), f"the rankings or pairs {_RECORDS}"),),
            longest_sequence=("data.max_prompt_tokens", "data.max_response_tokens"),
            check=_check_length,
            job="reward_model_job",
        ),
        TrainingCommand(
            name="ppo",
            summary="Train a policy against a reward model with PPO-ptx.",
            sections=(*_TRAINING_SECTIONS, "ppo", "generation"),
            unread=(
                *_RANKINGS_ONLY,
                *_DROPOUT,
                "data.train",
                "data.loss_on",
                "data.pretrain_fraction",
                "data.pretrain_fraction_of",
                "data.max_response_tokens",
                "train.epochs",
                "train.global_batch_size",
            ),
            required=(Required(("data.prompts",), f"the prompts {_RECORDS}"),),
            longest_sequence=("data.max_prompt_tokens", "generation.max_new_tokens"),
            reads_windows=lambda config: config.ppo.gamma_ptx > 0,
            check=_check_ppo,
            job="ppo_job",
            batch_keys=("ppo.batch_size", "ppo.minibatch_size"),
        ),
    )
}
"""The commands that train, by name, in the order of the paper."""

COMMANDS: dict[str, Command] = {**TRAINING_COMMANDS} | {
    command.name: command
    for command in (
        Command(
            name="sample",
            summary="Write K responses to each prompt, for ranking or reading.",
            sections=("model", "parallel", "data", "train", "generation", "sample"),
            unread=(*_UNREAD_WITH_PROMPTS, *_PASSES),
            required=(Required(("data.prompts",), f"the prompts {_RECORDS}"),),
            longest_sequence=("data.max_prompt_tokens", "generation.max_new_tokens"),
        ),
        Command(
            name="eval winrate",
            summary="Compare two policies on prompts, by a reward model or a function.",
            sections=("model", "parallel", "data", "train", "generation", "eval"),
            unread=_UNREAD_WITH_PROMPTS,
            required=(
                Required(("data.prompts",), f"the prompts {_RECORDS}"),
                Required(
                    ("eval.baseline",),
                    "the run, checkpoint, model folder or Hugging Face folder to compare with",
                ),
            ),
            check=_check_judge,
        ),
        Command(
            name="eval select",
            summary="Name the best checkpoint of a run by a judge's scores.",
            sections=("model", "parallel", "data", "train", "generation", "eval"),
            unread=(
                *_UNREAD_WITH_PROMPTS,
                "model.load",
                "model.hf",
                "eval.baseline",
                "eval.baseline_prefix",
                "eval.tie_margin",
            ),
            required=(Required(("data.prompts",), f"the validation prompts {_RECORDS}"),),
            check=_check_judge,
        ),
        Command(
            name="eval rm",
            summary="Evaluate a reward model on held-out rankings.",
            sections=("model", "parallel", "data", "train"),
            unread=(
                *_TRAINING_FILES,
                *_TRAINING_LENGTH,
                "data.prompts",
                "data.prompt_prefix",
                "model.hf",
            ),
            required=(
                Required(("data.valid",), f"the held-out rankings or pairs {_RECORDS}"),
                Required(
                    ("model.load",), "the run, checkpoint or model folder of a trained reward model"
                ),
            ),
        ),
    )
}
"""Every command that reads a run's configuration, by name."""


def training_command(name: str) -> TrainingCommand:
    """Return the row of the training command `name`. Raises UserError if there is none."""
    if name not in TRAINING_COMMANDS:
        raise UserError(
            f"unknown training command {name!r}; expected one of {', '.join(TRAINING_COMMANDS)}"
        )
    return TRAINING_COMMANDS[name]


def require(config: Config, command: str) -> None:
    """Check that `config` has what `command` needs.

    A command that is not in `COMMANDS` needs nothing beyond a valid configuration. Raises UserError
    with one line for the first setting that is missing or out of range.
    """
    row = COMMANDS.get(command)
    if row is None:
        return
    for required in row.required:
        if not required.is_set(config):
            key = required.keys[0]
            raise UserError(
                f"{command} needs {key}: {required.holds}; add it to the configuration or pass"
                f" {key}=PATH"
            )
    row.check(row, config)
    _check_positions(row, config)


def unread_settings(config: Config, command: str) -> list[str]:
    """Return what `config` sets and `command` does not read: sections, or keys of its sections.

    A key that has its default value is not set, so that a complete configuration, such as a run's
    config.yaml, names only what matters. Neither are keys without a default, which have to be
    given.
    """
    row, names = COMMANDS[command], []
    for section in type(config).model_fields:
        settings = getattr(config, section)
        if section == "output_dir":
            continue
        given = [key for key in settings.model_fields_set if _is_changed(settings, key)]
        if section in row.sections:
            names += [f"{section}.{key}" for key in given if f"{section}.{key}" in row.unread]
        elif given:
            names.append(section)
    return sorted(names)


def _is_changed(settings: Section, key: str) -> bool:
    field = type(settings).model_fields[key]
    if field.is_required():
        return False
    if field.default_factory is None:
        default = field.default
    else:
        default = field.get_default(
            call_default_factory=True, validated_data=settings.__dict__ | {key: None}
        )
    return bool(getattr(settings, key) != default)


def _sequences(row: Command, config: Config) -> list[tuple[str, ...]]:
    """Return the settings whose sum bounds the length, for each kind of sequence."""
    sequences = [row.longest_sequence] if row.longest_sequence else []
    return [*sequences, ("data.sequence_length",)] if row.reads_windows(config) else sequences


def _length(config: Config, keys: tuple[str, ...]) -> int:
    return sum(config.size(key) for key in keys)


def _terms(config: Config, keys: tuple[str, ...]) -> str:
    return " + ".join(f"{key} {config.size(key)}" for key in keys)


def _check_positions(row: Command, config: Config) -> None:
    """Check that the longest sequence the command can build fits the model's positions."""
    for keys in _sequences(row, config):
        if _length(config, keys) > config.model.max_positions:
            raise UserError(
                f"{_terms(config, keys)} is above model.max_positions {config.model.max_positions};"
                " shorten the sequences"
            )
