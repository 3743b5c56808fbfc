"""The sections of what a policy does beside training: PPO, generation, sampling.

Same rules as `configsections.py`: strict pydantic models, a docstring under each field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fastrlhf.config.sections import (
    Above0,
    AtLeast0,
    Count,
    Fraction,
    Positive,
    Rate,
    Section,
    Strings,
)
from fastrlhf.config.yaml_file import ConfigError


def _first(paths: str | list[str] | None) -> str | None:
    return paths[0] if isinstance(paths, list) and paths else paths or None  # type: ignore[return-value]


class PPOConfig(Section):
    """PPO-ptx. Defaults are InstructGPT's (arXiv 2203.02155, appendix C.4)."""

    reward_model: str | list[str] | None = None
    """Checkpoint folder of the reward model, or several whose scores are added. The ppo command needs this or
    reward_function."""
    reward_weights: list[float] | None = None
    """Weight of each reward model's score. None: 1 each."""
    reward_function: str | None = None
    """Python function "module:function" that scores responses, alone or added to the reward models:
    f(prompts: list[str], responses: list[str]) -> list[float]."""
    value_model: str | None = Field(default_factory=lambda fields: _first(fields["reward_model"]))
    """Checkpoint folder that the value function starts from. Unset: the (first) reward_model; without one, the
    policy's start with a fresh scalar head."""
    batch_size: Positive = 512
    """Episodes in one iteration over all ranks."""
    minibatch_size: Positive = 64
    """Episodes in one optimizer step over all ranks."""
    inner_epochs: Positive = 1
    """Passes over the episodes of an iteration."""
    target_kl: Above0 | None = None
    """Ends an iteration before the minibatch whose approximate KL from the sampling policy (nats a token) is above
    it. None: every minibatch is taken."""
    kl_coef: AtLeast0 = 0.02
    """Weight beta of the KL penalty in the reward."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Per-token estimate of the KL from the reference."""
    kl_clip: Above0 | None = None
    """Largest absolute per-token KL in the reward. None: no clip."""
    adaptive_kl_target: Above0 | None = None
    """KL that an adaptive controller steers kl_coef to (classic: 6). None: kl_coef is fixed."""
    adaptive_kl_horizon: Positive = 10000
    """Episodes over which the controller acts."""
    gamma_ptx: AtLeast0 = 27.8
    """Weight gamma of the pretraining term; 0 is plain PPO."""
    ptx_per_episode: Positive = 8
    """Pretraining examples for each episode."""
    clip: Above0 = 0.2
    """Clip range of the probability ratio."""
    value_clip: Above0 = 0.2
    """Clip range of the value around its rollout value."""
    gamma: Fraction = 1.0
    """Discount of rewards."""
    lam: Fraction = 0.95
    """GAE lambda."""
    entropy_coef: AtLeast0 = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch, without shifting the mean."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0, variance 1 over the batch."""
    no_stop_penalty: float | None = -1.0
    """Score of a response without a stop token. None: the reward model's."""
    ema_decay: Rate | None = 0.992
    """Decay of the running average of the policy, which is evaluated and exported. None: off."""
    value_lr: Above0 = 9e-6
    """Peak learning rate of the value function."""
    offload: bool = False
    """Keep the reference, the reward models and the running average in host memory while they are not in use. The
    trained models stay: their memory is part of megatron's contiguous buffers."""

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
        """reward_model as a list, empty when there is none."""
        if self.reward_model is None:
            return []
        return [self.reward_model] if isinstance(self.reward_model, str) else self.reward_model


class GenerationConfig(Section):
    """Sampling. The defaults draw from the model's own distribution, as PPO requires."""

    max_new_tokens: Positive = 1024
    """Longest response in tokens."""
    min_new_tokens: Count = 0
    """No stop token before this many tokens."""
    temperature: AtLeast0 = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: Count = 0
    """Sample from the k likeliest tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the likeliest tokens that hold this probability; 1: all."""
    stop: Strings = Field(default_factory=list)
    """Strings that end a response, besides the end-of-text token."""
    slots: Positive = 64
    """Sequences decoded at once on one data-parallel rank."""
    cache_mb: Above0 | None = None
    """Most memory of the KV cache on a rank, 10^6 bytes; where it binds, fewer than `slots` decode at once. None: half
    of a GPU's free memory; on a CPU, no bound."""
    cuda_graphs: bool = False
    """Decode steps as CUDA graphs, on a GPU without tensor and pipeline parallelism. Off until measured on one."""

    @model_validator(mode="after")
    def _check(self) -> GenerationConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                "min_new_tokens",
                f"{self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}",
            )
        return self


def _range(value: Any) -> Any:
    """4 -> (4, 4) and "4..9" -> (4, 9); other text is no range."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", value)
        if match is None:
            raise PydanticCustomError("range", "a number, or least..most such as 4..9")
        return (int(match[1]), int(match[2] or match[1]))
    return value


class EvalConfig(Section):
    """What the eval winrate and eval select commands compare, and who judges."""

    baseline: str | None = None
    """What the policy (model.load or model.hf) is compared with: a run, a checkpoint, a model folder, or a Hugging
    Face folder."""
    baseline_prefix: str | None = None
    """Text file put before each prompt of the baseline (the paper's prompted GPT-3), as data.prompt_prefix is for the
    policy. The judge sees neither."""
    reward_model: str | None = None
    """Judge: the checkpoint folder of a reward model."""
    judge: str | None = None
    """Judge: a Python function "module:function", higher for better: f(prompts: list[str], responses: list[str]) ->
    list[float]."""
    responses: Positive = 1
    """Responses of each policy to each prompt."""
    tie_margin: AtLeast0 = 0.0
    """Scores no further apart than this are a tie."""

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
    """What the sample command writes."""

    k: Annotated[tuple[Positive, Positive], BeforeValidator(_range)] = (4, 9)
    """Distinct responses to a prompt: a number, or least..most (as "4..9" or [4, 9]) drawn for each prompt.
    InstructGPT's labelers ranked 4 to 9."""

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        if self.k[0] > self.k[1]:
            raise ConfigError(
                "k",
                f"{self.k[0]}..{self.k[1]} is empty: the first number must not be the larger one",
            )
        return self
