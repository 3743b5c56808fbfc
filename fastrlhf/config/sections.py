"""The sections that every run has: one strict pydantic model per owner, a docstring under each field.

After validation every field holds its final value (unset model fields are filled from the family), except those whose
docstring says what None means. Sections of reinforcement learning are in `configrl.py`; checks that span two sections,
or that depend on the command, are in `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fastrlhf.config.yaml_file import ConfigError


def _not_bool(value: Any) -> Any:
    """pydantic would read `train.steps: true` as one step."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


NotBool = BeforeValidator(_not_bool)
Positive = Annotated[int, NotBool, Field(gt=0)]
Count = Annotated[int, NotBool, Field(ge=0)]
Fraction = Annotated[float, NotBool, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, NotBool, Field(ge=0.0, lt=1.0)]
Above0 = Annotated[float, NotBool, Field(gt=0.0)]
AtLeast0 = Annotated[float, NotBool, Field(ge=0.0)]
Strings = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""A list of strings; one bare string is a list of one."""
Blend = Annotated[
    # Tags of digits are left out of the key that a mistake is told with, as indices are.
    Annotated[list[str], Tag("0")] | Annotated[dict[str, Above0], Tag("1")],
    Discriminator(lambda value: "1" if isinstance(value, dict) else "0"),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
"""Paths, or path: weight."""

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "llama": {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
}
"""What `model.family` puts in the fields that the configuration leaves unset."""


def _from_family(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: FAMILIES[fields["family"]][key]


def _ffn_default(fields: dict[str, Any]) -> int:
    return (
        4 * fields["hidden_size"] if fields["family"] == "gpt" else 0
    )  # 0 is refused below, with the cure


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_unset(cls, values: Any) -> Any:
        """`num_kv_heads: null` asks for the derived default, as leaving the key out does."""
        if not isinstance(values, dict):
            return values
        derived = {name for name, field in cls.model_fields.items() if field.default_factory}
        return {
            key: value for key, value in values.items() if value is not None or key not in derived
        }


class ModelConfig(Section):
    """The shape of a decoder-only transformer and where its weights come from."""

    family: Literal["gpt", "llama"]
    """Fills unset fields. gpt: learned positions, LayerNorm, tanh GELU, biases, tied embeddings, ffn 4H.
    llama: RoPE, RMSNorm, SwiGLU, no biases, untied embeddings."""
    num_layers: Positive
    """Transformer layers."""
    hidden_size: Positive
    """Width of the residual stream, H."""
    num_heads: Positive
    """Attention (query) heads."""
    num_kv_heads: Positive = Field(default_factory=lambda fields: fields["num_heads"])
    """Key/value heads; fewer than num_heads is grouped-query attention. Unset: num_heads."""
    head_dim: Positive = Field(
        default_factory=lambda fields: fields["hidden_size"] // fields["num_heads"]
    )
    """Width of one head. Unset: hidden_size / num_heads."""
    ffn_size: int = Field(default_factory=_ffn_default)
    """Width of the feed-forward layer. Unset: 4 * hidden_size (gpt); llama must give it."""
    vocab_size: Positive | None = None
    """True vocabulary size, before padding for tensor parallelism. None: the tokenizer's."""
    max_positions: Positive
    """Longest sequence in tokens; the rows of the learned position table."""
    position: Literal["learned", "rope"] = Field(default_factory=_from_family("position"))
    """Position encoding. Unset: the family's."""
    rope_theta: Above0 = 10000.0
    """Base of the rotary frequencies; unused with learned positions."""
    norm: Literal["layernorm", "rmsnorm"] = Field(default_factory=_from_family("norm"))
    """Normalisation, always before the sub-layer. Unset: the family's."""
    norm_eps: Above0 = 1e-5
    """Epsilon inside the normalisation."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = Field(
        default_factory=_from_family("activation")
    )
    """Feed-forward activation. Unset: the family's."""
    bias: bool = Field(default_factory=_from_family("bias"))
    """Biases in the linear layers. Unset: the family's."""
    qkv_bias: bool = Field(default_factory=lambda fields: fields["bias"])
    """Biases in the query/key/value projection. Unset: the same as bias."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Qwen 3)."""
    tie_embeddings: bool = Field(default_factory=_from_family("tie_embeddings"))
    """Use the embedding as the output matrix. Unset: the family's."""
    residual_dropout: Rate = 0.0
    """Dropout after each sub-layer, before the residual sum. InstructGPT's SFT uses 0.2."""
    embedding_dropout: Rate = 0.0
    """Dropout on the embeddings."""
    attention_dropout: Rate = 0.0
    """Dropout on the attention probabilities."""
    init_std: Above0 = 0.02
    """Standard deviation of the initial weights."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of weights and activations; with bf16 and fp16 the optimizer keeps fp32 masters."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward: none, the core attention (selective; flash kernels keep none of it), or
    whole layers (full)."""
    recompute_layers: Positive | None = None
    """Layers of each pipeline stage that recompute full is about, the first ones; the others keep their activations.
    None: all."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Core attention. auto: flash-attn where it is installed and can run, else torch's SDPA."""
    shared_prompt: bool = True
    """Reward models: a prompt is encoded once and its responses branch from it. The scores are the same either way."""
    load: str | None = None
    """Checkpoint folder of this project to start from. None: random weights (or hf)."""
    hf: str | None = None
    """Hugging Face model folder to start from. None: random weights (or load)."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.ffn_size <= 0:
            why = (
                "is required for family llama"
                if self.ffn_size == 0
                else f"is {self.ffn_size}, expected above 0"
            )
            raise ConfigError(
                "ffn_size",
                f"{why}; give the feed-forward width (Llama: 8/3 of hidden_size, rounded up)",
            )
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_heads:
            raise ConfigError(
                "hidden_size",
                f"{self.hidden_size} is not a multiple of num_heads {self.num_heads}; set head_dim, or change one",
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads",
                f"{self.num_kv_heads} does not divide num_heads {self.num_heads}; use a divisor of it",
            )
        if self.recompute_layers is not None and self.recompute != "full":
            raise ConfigError(
                "recompute_layers",
                f"is for recompute full, not {self.recompute}; set one or the other",
            )
        if self.attention == "flash" and self.dtype == "fp32":
            raise ConfigError(
                "attention",
                "flash needs dtype bf16 or fp16; use attention sdpa (or auto) with fp32",
            )
        if self.load and self.hf:
            raise ConfigError(
                "hf",
                "and load are both set; a model starts from one of them: set the other to null",
            )
        return self


class ParallelConfig(Section):
    """How a model is split over processes; data parallel is what is left of the world size."""

    tensor: Positive = 1
    """Ranks that share each layer (tensor parallel)."""
    pipeline: Positive = 1
    """Stages that share the layers (pipeline parallel)."""
    context: Positive = 1
    """Ranks that share each sequence; only 1 is supported."""
    sequence: bool = False
    """Split norms and dropouts along the sequence over the tensor-parallel ranks; no effect with tensor 1."""
    timeout_s: Positive = 1800
    """Seconds before a collective that does not finish is an error."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.context > 1:
            raise ConfigError(
                "context",
                f"{self.context} is not supported yet; use 1, and split the model with tensor or pipeline",
            )
        return self


class DataConfig(Section):
    """The files and how records become token sequences. One path is a list of one."""

    tokenizer: str
    """Folder of a Hugging Face tokenizer."""
    train: Strings | None = None
    """Training files: demonstrations (sft), rankings or pairs (rm), text (pretrain)."""
    valid: Strings | None = None
    """Validation files of the same kind. None: no validation."""
    demonstrations: Strings | None = None
    """Demonstration files (rm): the head's bias is shifted after training so that they score 0 on average."""
    prompts: Strings | None = None
    """Prompt files (ppo, sample)."""
    prompt_prefix: str | None = None
    """Text file that is put before each prompt, such as a few worked examples for a prompted baseline; it counts in
    max_prompt_tokens. None: nothing."""
    loss_on: Literal["last", "all"] = "last"
    """What SFT trains on in a conversation: the response (last), or the assistant's earlier turns too (all)."""
    pretrain: Blend | None = None
    """Pretraining text: the ptx term of PPO, the share mixed into SFT, and the pretrain command's when train is not
    set. Files are read in proportion to their size, or as path: weight in these proportions."""
    pretrain_fraction: Rate = 0.0
    """Share of pretraining rows mixed into SFT; InstructGPT's RL starting point uses 0.1."""
    max_prompt_tokens: Positive = 1024
    """Records with a longer prompt are dropped, and counted."""
    max_response_tokens: Positive = 1024
    """Longest response kept in training, in tokens."""
    cache: str | None = None
    """Folder of tokenized text, which runs may share. None: cache/ in the output folder."""
    sequence_length: Positive = 2048
    """Tokens in a pretraining window."""
    on_error: Literal["strict", "quarantine"] = "strict"
    """A malformed record stops the run (strict), or is set aside in a file with its reason (quarantine)."""


class OptimizerConfig(Section):
    """AdamW."""

    lr: Above0
    """Peak learning rate."""
    beta1: Rate = 0.9
    """Decay of the gradient average."""
    beta2: Rate = 0.95
    """Decay of the squared-gradient average."""
    eps: Above0 = 1e-8
    """Adam's epsilon; classic PPO recipes use 1e-5."""
    weight_decay: AtLeast0 = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_grad: AtLeast0 = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    initial_loss_scale: Above0 = 65536.0
    """First loss scale (fp16 only)."""


class ScheduleConfig(Section):
    """The learning rate over the steps of a run."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    warmup_start: Fraction = 0.1
    """Fraction of the peak that the warm-up starts from."""
    min_lr_ratio: Fraction = 0.1
    """Fraction of the peak that the decay ends at; unused with decay constant."""


class TrainConfig(Section):
    """How long and in what pieces."""

    seed: Count = 1234
    """Seed of weights, data order and sampling."""
    steps: Positive | None = None
    """Optimizer steps; PPO iterations. None: epochs decides."""
    epochs: Above0 | None = None
    """Passes over the training data. None: steps decides."""
    micro_batch_size: Positive = 1
    """Sequences (rm: prompts with all their responses) in one forward on one rank."""
    max_tokens_per_micro_batch: Positive | None = None
    """Token budget of one micro-batch on one rank; sequences are packed first-fit under it and balanced over ranks.
    None: micro_batch_size sequences."""
    global_batch_size: Positive = Field(default_factory=lambda fields: fields["micro_batch_size"])
    """Sequences (rm: prompts) in one optimizer step over all ranks. sft, rm and pretrain must give it; PPO's global
    batch is ppo.batch_size."""
    max_seconds: Above0 | None = None
    """Seconds from the start of the process after which the run saves and stops, between two steps; set it below the
    job's time limit by a step and a checkpoint. The same command goes on from there. None: no limit."""
    eval_interval: Count = 0
    """Steps between validations; 0: only at the end."""
    eval_batches: Positive | None = None
    """Batches in one validation. None: the whole set."""

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
                f"{self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; change one",
            )
        return self


class CheckpointConfig(Section):
    """When the state is saved, and whether a run continues."""

    interval: Count = 0
    """Steps between checkpoints; 0: only the last."""
    keep_last: Positive = 2
    """Newest checkpoints kept; older ones are removed, but for those of keep_every and keep_best."""
    keep_every: Count = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0: none."""
    keep_best: str | None = None
    """"lowest METRIC" or "highest METRIC": the checkpoint that is best by a number of metrics.jsonl is kept, and named
    in checkpoints/best. Checkpoints of steps without that number do not compete. None: no such rule."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; false: training waits for the disk, and the
    copy is saved."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest whole checkpoint of output_dir; never starts over and sets them aside."""
    save: bool = True
    """Write checkpoints at all."""

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        words = (self.keep_best or "lowest x").split()
        if len(words) != 2 or words[0] not in ("lowest", "highest"):
            raise ConfigError(
                "keep_best",
                f'is "{self.keep_best}"; expected "lowest METRIC" or "highest METRIC", as in "lowest valid_loss"',
            )
        return self


class LogConfig(Section):
    """What is reported while a run goes on; metrics.jsonl is always written."""

    interval: Positive = 1
    """Steps between lines."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str | None = None
    """Weights & Biases project. None: off."""
    samples: Count = 4
    """Responses of each PPO iteration written to samples.jsonl and shown in the report; 0: none."""
    progress: bool = True
    """Show a live progress line on rank 0."""
    profile_step: Positive | None = None
    """Step that torch's profiler traces on rank 0, into trace_STEP.json of the output folder (chrome://tracing,
    Perfetto); take one after the first few. None: none."""
