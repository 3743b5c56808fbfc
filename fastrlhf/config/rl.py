"""Config sections for PPO, generation, sampling and evaluation.

Same rules as `sections.py`: strict pydantic models, a docstring under each field.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fastrlhf.config.field_types import (
    Above0,
    AtLeast0,
    Copies,
    Count,
    FilePath,
    FilePathOrPaths,
    Fraction,
    Megabytes,
    Number,
    Positive,
    Rate,
    Slots,
    StopStrings,
)
from fastrlhf.config.section import Section
from fastrlhf.config.yaml_file import ConfigError


def _first(paths: str | list[str] | None) -> str | None:
    return paths[0] if isinstance(paths, list) and paths else paths or None  # type: ignore[return-value]


class PPOConfig(Section):
    """PPO-ptx. Defaults are InstructGPT's (arXiv 2203.02155, appendix C.4)."""

    reward_model: FilePathOrPaths | None = None
    """Folder of the reward model (a run, a checkpoint or a model folder), or several whose scores
    are added. The ppo command needs this or reward_function."""
    reward_weights: list[Number] | None = None
    """Weight of each reward model's score. null: 1 each."""
    reward_function: str | None = None
    """Python function "module:function" that scores responses: f(prompts: list[str], responses:
    list[str]) -> list[float]. With a third parameter records: list[dict] it gets the other columns
    of the prompts' records. Its scores are added to those of the reward models, if there are
    any."""
    value_model: FilePath | None = Field(
        default_factory=lambda fields: _first(fields["reward_model"])
    )
    """Folder of the model that the value function starts from. Unset: the (first) reward_model;
    without one, the policy's initial weights with a new scalar head."""
    reference_model: FilePath | None = None
    """Model that the KL penalty is measured from: a run, a checkpoint, a model folder or a Hugging
    Face folder. It needs the policy's tokenizer, not its shape. null: the policy's start."""
    batch_size: Positive = 512
    """Episodes per iteration over all ranks."""
    minibatch_size: Positive = 64
    """Episodes per optimizer step over all ranks."""
    inner_epochs: Positive = 1
    """Passes over the episodes of an iteration."""
    target_kl: Above0 | None = None
    """Stop an iteration's updates before the first minibatch whose approximate KL from the sampling
    policy (nats per token) exceeds this. null: use every minibatch."""
    kl_coef: AtLeast0 = 0.02
    """Coefficient beta of the KL penalty in the reward."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Estimator of the per-token KL from the reference."""
    kl_clip: Above0 | None = None
    """Largest absolute per-token KL in the reward. null: no clipping."""
    adaptive_kl_target: Above0 | None = None
    """KL per response (nats) that an adaptive controller holds by changing kl_coef (classic: 6).
    null: kl_coef is fixed."""
    adaptive_kl_horizon: Positive = 10000
    """Time constant of the adaptive controller, in episodes."""
    gamma_ptx: AtLeast0 = 27.8
    """Coefficient gamma of the pretraining term; 0 is plain PPO."""
    ptx_per_episode: Positive = 8
    """Pretraining examples per episode."""
    clip: Above0 = 0.2
    """Clip range of the probability ratio."""
    value_clip: Above0 = 0.2
    """Clip range of the value around its rollout value."""
    gamma: Fraction = 1.0
    """Discount factor."""
    lam: Fraction = 0.95
    """GAE lambda."""
    entropy_coef: AtLeast0 = 0.0
    """Coefficient of the entropy bonus."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch, without shifting the mean."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0, variance 1 over the batch."""
    no_stop_penalty: Number | None = -1.0
    """Score of a response that did not end with a stop token. null: the reward model's score."""
    ema_decay: Rate | None = 0.992
    """Decay of the exponential moving average of the policy, which is evaluated and exported. null:
    off."""
    ema_every: Literal["update", "iteration"] = "update"
    """When the average moves: after each optimizer update, or once after the updates of an
    iteration. The metric ema_start_share is the part of the average that is still the policy's
    start: ema_decay to the power of the moves."""
    value_lr: Above0 = 9e-6
    """Peak learning rate of the value function."""
    offload: bool = False
    """Keep the reference, the reward models and the moving average in host memory while they are
    not in use. Trained models stay on the device: megatron keeps their parameters in contiguous
    buffers."""

    @model_validator(mode="after")
    def _check(self) -> PPOConfig:
        if self.batch_size % self.minibatch_size:
            raise ConfigError(
                "minibatch_size",
                f"{self.minibatch_size} does not divide batch_size {self.batch_size}; change one",
            )
        weights, models = self.reward_weights, len(self.reward_models)
        if weights is not None and len(weights) != models:
            raise ConfigError(
                "reward_weights",
                f"has {len(weights)} entries for {models} reward models; give one for each",
            )
        if self.reward_function is not None and not re.fullmatch(
            r"[\w.]+:\w+", self.reward_function
        ):
            raise ConfigError(
                "reward_function",
                f"is {self.reward_function!r}, expected module:function, as in my_rewards:length",
            )
        return self

    @property
    def reward_models(self) -> list[str]:
        """The reward models as a list, empty if there are none."""
        if self.reward_model is None:
            return []
        return [self.reward_model] if isinstance(self.reward_model, str) else self.reward_model


class GenerationConfig(Section):
    """Sampling. The defaults draw from the model's own distribution, as PPO requires."""

    max_new_tokens: Positive = 1024
    """Longest response in tokens."""
    min_new_tokens: Count = 0
    """Shortest response: stop tokens are not sampled before this many tokens."""
    temperature: AtLeast0 = 1.0
    """Temperature that divides the logits; 0 is greedy decoding."""
    top_k: Count = 0
    """Sample from the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this; 1: all."""
    stop: StopStrings = Field(default_factory=list)
    """Strings that end a response, in addition to the end-of-text token."""
    slots: Slots = 64
    """Sequences decoded at the same time on a data-parallel rank."""
    cache_mb: Megabytes | None = None
    """Memory limit of the KV cache on a rank, in 10^6 bytes; it may lower the number of sequences
    decoded at the same time. null: half of a GPU's free memory; on a CPU, no limit."""
    cuda_graphs: bool = False
    """Run decode steps as CUDA graphs, on a GPU without tensor and pipeline parallelism. Not
    measured on a GPU yet."""

    @model_validator(mode="after")
    def _check(self) -> GenerationConfig:
        if 0 < self.temperature < 1e-6:
            raise ConfigError(
                "temperature",
                f"{self.temperature} is too small to divide by; use 0 for greedy decoding",
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                "min_new_tokens",
                f"{self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}",
            )
        return self


def _range(value: object) -> object:
    """Parse 4 as (4, 4) and "4..9" as (4, 9)."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:\.\.\s*([0-9]{1,9})\s*)?", value)
        if match is None:
            raise PydanticCustomError("range", "a number, or least..most such as 4..9")
        return (int(match[1]), int(match[2] or match[1]))
    return value


class EvalConfig(Section):
    """Policies and judge of the eval winrate and eval select commands."""

    baseline: FilePath | None = None
    """Policy that model.load or model.hf is compared with: a run, a checkpoint, a model folder, or
    a Hugging Face folder."""
    baseline_prefix: FilePath | None = None
    """Text file prepended to each prompt of the baseline (the paper's prompted GPT-3), as
    data.prompt_prefix is for the policy. The judge sees neither."""
    reward_model: FilePath | None = None
    """Judge: the folder of a reward model."""
    judge: str | None = None
    """Judge: a Python function "module:function" whose scores are higher for better responses:
    f(prompts: list[str], responses: list[str]) -> list[float], or with a third parameter records:
    list[dict], the other columns of the prompts' records."""
    responses: Copies = 1
    """Responses per policy and prompt."""
    tie_margin: AtLeast0 = 0.0
    """Scores whose difference is at most this are a tie."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.reward_model is not None and self.judge is not None:
            raise ConfigError(
                "judge", "and reward_model are both set; one of them judges: remove the other"
            )
        if self.judge is not None and not re.fullmatch(r"[\w.]+:\w+", self.judge):
            raise ConfigError(
                "judge", f"is {self.judge!r}, expected module:function, as in my_judges:length"
            )
        return self


class SampleConfig(Section):
    """Output of the sample command."""

    k: Annotated[tuple[Copies, Copies], BeforeValidator(_range)] = (4, 9)
    """Distinct responses per prompt: a number, or a range such as "4..9" or [4, 9] from which one
    is drawn for each prompt. InstructGPT's labelers ranked 4 to 9."""

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        if self.k[0] > self.k[1]:
            raise ConfigError(
                "k",
                f"{self.k[0]}..{self.k[1]} is empty: the first number must not be the larger one",
            )
        return self
