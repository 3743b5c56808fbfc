"""Config sections that every run has: one strict pydantic model each, a docstring under each field.

After validation every field holds its final value (unset model fields are filled from the family),
except those whose docstring says what null means. Field docstrings are the settings reference
(`fastrlhf config`). The model is in `model.py`, sections for reinforcement learning in `rl.py`,
checks that span sections in `schema.py`, checks of a command in `commands.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fastrlhf.config.field_types import (
    Above0,
    AtLeast0,
    Blend,
    Count,
    Epochs,
    FilePath,
    FilePaths,
    Fraction,
    Positive,
    Ranks,
    Rate,
    Seconds,
    Seed,
)
from fastrlhf.config.section import Section
from fastrlhf.config.yaml_file import ConfigError


class ParallelConfig(Section):
    """How a model is split over processes.

    Data parallelism uses the rest: world size / (tensor * pipeline).
    """

    tensor: Ranks = 1
    """Tensor-parallel ranks, which share each layer."""
    pipeline: Ranks = 1
    """Pipeline-parallel stages, which divide the layers."""
    context: Ranks = 1
    """Context-parallel ranks, which share each sequence. Only 1 is supported."""
    sequence: bool = False
    """Sequence parallelism: split norms and dropout along the sequence over the tensor-parallel
    ranks. No effect with tensor 1."""
    timeout_s: Positive = 600
    """Seconds after which a collective that has not finished is an error that names the ranks that
    did not arrive. Also the limit of one call of a reward function."""
    startup_timeout_s: Positive = 1800
    """The same limit from the start to the end of the first step, for ranks that start late, reading
    and tokenizing data, loading models and compiling kernels. Evaluations of policies, which load
    models in turn, have it throughout."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.context > 1:
            raise ConfigError(
                "context",
                f"{self.context} is not supported yet; use 1, and split the model with tensor or"
                " pipeline",
            )
        return self


class DataConfig(Section):
    """Input files, and how records become token sequences. A single path is a list of one."""

    tokenizer: FilePath
    """Folder of a Hugging Face tokenizer."""
    train: Blend | None = None
    """Training files: demonstrations (sft), rankings or pairs (rm), text (pretrain). Samples of a
    list of files are equally likely; a mapping of path to weight is read in proportion to the
    weights, in epochs of as many samples as the files have."""
    valid: FilePaths | None = None
    """Validation files of the same kind (PPO: prompts). null: no validation."""
    demonstrations: FilePaths | None = None
    """Demonstration files (rm): after training, the head's bias is shifted so that they score 0 on
    average."""
    prompts: FilePaths | None = None
    """Prompt files (ppo, sample)."""
    prompt_prefix: FilePath | None = None
    """Text file prepended to each prompt, such as a few worked examples for a prompted baseline. It
    counts in max_prompt_tokens. null: no prefix."""
    add_bos: bool | None = None
    """Begin prompts that are strings and pretraining documents with the bos token; chat templates
    write their own. null: as the tokenizer does for text that it encodes with special tokens."""
    loss_on: Literal["last", "all"] = "last"
    """Tokens that SFT trains on in a conversation: the response (last), or the assistant's earlier
    turns too (all)."""
    pretrain: Blend | None = None
    """Pretraining text: for the ptx term of PPO, the share mixed into SFT, and the pretrain command
    if train is unset. A list of files is read in proportion to their sizes, a mapping of path to
    weight in proportion to the weights."""
    pretrain_fraction: Rate = 0.0
    """Share of pretraining rows mixed into SFT; InstructGPT's RL starting point uses 0.1."""
    pretrain_fraction_of: Literal["rows", "loss"] = "rows"
    """Unit of pretrain_fraction. rows: that share of the rows is pretraining text; the loss is the
    mean over all tokens, and pretraining rows count in more of them. loss: the rows are the same,
    and the loss is a weighted mean in which pretraining tokens have one weight, so that their share
    of the weight of the whole data set is the fraction. Metrics: pretrain_share_rows,
    pretrain_share_loss."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt in tokens; records with a longer one are dropped and counted."""
    max_response_tokens: Positive = 1024
    """Longest response in training, in tokens; longer ones are cut."""
    cache: FilePath | None = None
    """Folder of tokenized text, which runs may share. null: cache/ in the output folder."""
    sequence_length: Positive = 2048
    """Tokens of a pretraining window."""
    on_error: Literal["strict", "quarantine"] = "strict"
    """A malformed record stops the run (strict), or is written to a file with the reason and
    skipped (quarantine)."""


class OptimizerConfig(Section):
    """AdamW."""

    lr: Above0
    """Peak learning rate."""
    beta1: Rate = 0.9
    """Decay rate of the first moment."""
    beta2: Rate = 0.95
    """Decay rate of the second moment."""
    eps: Above0 = 1e-8
    """Adam's epsilon. Classic PPO recipes use 1e-5."""
    weight_decay: AtLeast0 = 0.0
    """Decoupled weight decay, applied to matrices only."""
    clip_grad: AtLeast0 = 1.0
    """Largest global gradient norm; 0 disables clipping."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks (megatron's distributed optimizer)."""
    initial_loss_scale: Above0 = 65536.0
    """Initial loss scale (fp16 only)."""


class ScheduleConfig(Section):
    """The learning-rate schedule."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: Count = 0
    """Steps of linear warm-up; for PPO, iterations."""
    warmup_start: Fraction = 0.1
    """Learning rate at the start of the warm-up, as a fraction of the peak."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak; unused with decay constant.
    """


class TrainConfig(Section):
    """Training length and batch sizes."""

    seed: Seed = 1234
    """Seed of initial weights, data order and sampling."""
    steps: Positive | None = None
    """Number of optimizer steps; for PPO, iterations. null: given by epochs."""
    epochs: Epochs | None = None
    """Passes over the training data. null: given by steps."""
    micro_batch_size: Positive = 1
    """Sequences (rm: prompts with all their responses) per forward pass and rank."""
    max_tokens_per_micro_batch: Positive | None = None
    """Token budget of a micro-batch: sequences are packed first-fit under it and balanced over
    ranks. null: each micro-batch has micro_batch_size sequences."""
    global_batch_size: Positive = Field(default_factory=lambda fields: fields["micro_batch_size"])
    """Sequences (rm: prompts) per optimizer step over all ranks. Required by pretrain, sft and rm;
    PPO uses ppo.batch_size. Unset: micro_batch_size."""
    max_seconds: Seconds | None = None
    """Seconds after which the run saves a checkpoint and stops, between two steps. Set it below the
    job's time limit by the time of a step and a checkpoint. The same command then resumes. null: no
    limit."""
    eval_interval: Count = 0
    """Steps between validations; 0: only at the end of the run."""
    eval_batches: Positive | None = None
    """Batches of global_batch_size per validation (PPO: of ppo.batch_size), the first ones of the
    set. null: the whole set.
    """

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                "epochs", "and steps are both set; a run has one length: set the other to null"
            )
        if (
            self.max_tokens_per_micro_batch is None
            and self.global_batch_size % self.micro_batch_size
        ):
            raise ConfigError(
                "global_batch_size",
                f"{self.global_batch_size} is not a multiple of micro_batch_size"
                f" {self.micro_batch_size}; change one",
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved and kept, and whether a run resumes."""

    interval: Count = 0
    """Steps between checkpoints; 0: only at the end of the run."""
    keep_last: Positive = 2
    """Number of newest checkpoints to keep. Older ones are deleted unless keep_every or keep_best
    keeps them."""
    keep_every: Count = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0: none."""
    keep_best: str | None = None
    """"lowest METRIC" or "highest METRIC", a metric of metrics.jsonl: the best checkpoint by it is
    kept and named in checkpoints/best. Checkpoints of steps without that metric do not compete.
    null: off."""
    asynchronous: bool = True
    """Copy the state to host memory and write it in the background. false: training waits for the
    disk, and host memory holds no copy."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest complete checkpoint of output_dir. never: rename existing
    checkpoints and start over."""
    save: bool = True
    """Write checkpoints."""

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        words = (self.keep_best or "lowest x").split()
        if len(words) != 2 or words[0] not in ("lowest", "highest"):
            raise ConfigError(
                "keep_best",
                f'is "{self.keep_best}"; expected "lowest METRIC" or "highest METRIC", as in'
                ' "lowest valid_loss"',
            )
        return self


class LogConfig(Section):
    """Reporting during a run. metrics.jsonl is always written."""

    interval: Positive = 1
    """Steps between records."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str | None = None
    """Weights & Biases project. null: off."""
    samples: Count = 4
    """Number of responses of each PPO iteration written to samples.jsonl and shown in the report.
    """
    progress: bool = True
    """Show a live progress line on rank 0."""
    profile_step: Positive | None = None
    """Step that torch's profiler traces on rank 0, to trace_STEP.json in output_dir (for
    chrome://tracing or Perfetto). Choose one after the first few. null: no trace."""
