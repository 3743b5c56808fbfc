"""The config section of the model: its shape, and where its weights come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastrlhf.config.families import family_default, ffn_default
from fastrlhf.config.field_types import (
    Above0,
    FilePath,
    Layers,
    NotBool,
    Positive,
    Rate,
    Rows,
    Width,
)
from fastrlhf.config.section import Section
from fastrlhf.config.yaml_file import ConfigError

MAX_PARAMETERS = 10**14
"""Above this a model is refused: a misplaced digit, since no model is a hundredth of it."""


class ModelConfig(Section):
    """The shape of a decoder-only transformer and where its weights come from."""

    family: Literal["gpt", "llama"]
    """Fills unset fields. gpt: learned positions, LayerNorm, tanh GELU, biases, tied embeddings,
    ffn 4H. llama: RoPE, RMSNorm, SwiGLU, no biases, untied embeddings."""
    num_layers: Layers
    """Transformer layers."""
    hidden_size: Width
    """Width of the residual stream, H."""
    num_heads: Width
    """Attention (query) heads."""
    num_kv_heads: Width = Field(default_factory=lambda fields: fields["num_heads"])
    """Key/value heads; fewer than num_heads is grouped-query attention. Unset: num_heads."""
    head_dim: Width = Field(
        default_factory=lambda fields: fields["hidden_size"] // fields["num_heads"]
    )
    """Width of one head. Unset: hidden_size / num_heads."""
    ffn_size: Annotated[int, NotBool, Field(le=2**24)] = Field(default_factory=ffn_default)
    """Width of the feed-forward layer. Unset: 4 * hidden_size (gpt); llama must give it."""
    vocab_size: Rows | None = None
    """True vocabulary size, before padding for tensor parallelism. null: the tokenizer's."""
    max_positions: Rows
    """Longest sequence in tokens; the rows of the learned position table."""
    position: Literal["learned", "rope"] = Field(default_factory=family_default("position"))
    """Position encoding. Unset: the family's."""
    rope_theta: Above0 = 10000.0
    """Base of the rotary frequencies; unused with learned positions."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Scaling of the rotary frequencies. linear divides all of them by rope_factor; llama3 (Llama
    3.1 to 3.3) divides the low ones, keeps the high ones and interpolates between."""
    rope_factor: Above0 | None = None
    """Divisor of the scaled frequencies; required with rope_scaling. null: not scaled."""
    rope_low_freq_factor: Above0 = 1.0
    """With llama3: frequencies of fewer turns than this in rope_original_positions are divided."""
    rope_high_freq_factor: Above0 = 4.0
    """With llama3: frequencies of more turns than this in rope_original_positions are kept."""
    rope_original_positions: Rows = 8192
    """With llama3: longest sequence, in tokens, of the training before the scaling."""
    sliding_window: Positive | None = None
    """Tokens that a token attends to, itself included (Mistral, Qwen). null: all before it."""
    full_attention_layers: Annotated[int, NotBool, Field(ge=0, le=2**14)] = 0
    """With sliding_window: number of first layers without it (Qwen's max_window_layers)."""
    norm: Literal["layernorm", "rmsnorm"] = Field(default_factory=family_default("norm"))
    """Normalisation, always before the sub-layer. Unset: the family's."""
    norm_eps: Above0 = 1e-5
    """Epsilon inside the normalisation."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = Field(
        default_factory=family_default("activation")
    )
    """Feed-forward activation. Unset: the family's."""
    bias: bool = Field(default_factory=family_default("bias"))
    """Biases in the linear layers. Unset: the family's."""
    qkv_bias: bool = Field(default_factory=lambda fields: bool(fields["bias"]))
    """Biases in the query/key/value projection. Unset: the same as bias."""
    qk_norm: bool = False
    """Normalise queries and keys per head (Qwen 3)."""
    tie_embeddings: bool = Field(default_factory=family_default("tie_embeddings"))
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
    """Dtype of weights and activations; with bf16 and fp16 the optimizer keeps fp32 master weights.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none, those of the core attention (selective;
    flash kernels store none of them), or whole layers (full)."""
    recompute_layers: Positive | None = None
    """With recompute full: number of layers of each pipeline stage that are recomputed, counted
    from the first. The others keep their activations. null: all."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Core attention. auto: flash-attn if it is installed and supports the run, else torch's SDPA.
    """
    shared_prompt: bool = True
    """Reward models: encode a prompt once for all its responses. The scores are the same either
    way."""
    load: FilePath | None = None
    """fastrlhf run, checkpoint or model folder to start from. null: hf, or random weights."""
    hf: FilePath | None = None
    """Hugging Face model folder to start from. null: load, or random weights."""

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
                f"{self.hidden_size} is not a multiple of num_heads {self.num_heads}; set head_dim,"
                " or change one",
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads",
                f"{self.num_kv_heads} does not divide num_heads {self.num_heads}; use a divisor"
                " of it",
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
        if self.num_weights > MAX_PARAMETERS:
            raise ConfigError(
                "hidden_size",
                f"{self.hidden_size} with num_layers {self.num_layers} is a model of"
                f" {self.num_weights:.1e} weights, expected {MAX_PARAMETERS:.0e} at most; make"
                " it smaller",
            )
        if self.load and self.hf:
            raise ConfigError(
                "hf",
                "and load are both set; a model starts from one of them: set the other to null",
            )
        self._check_rope_scaling()
        if self.full_attention_layers and self.sliding_window is None:
            raise ConfigError("full_attention_layers", "is for a sliding_window; set that, or 0")
        if self.full_attention_layers >= self.num_layers:
            raise ConfigError(
                "full_attention_layers",
                f"{self.full_attention_layers} leaves no layer of num_layers {self.num_layers} to"
                " sliding_window; lower it, or set sliding_window to null",
            )
        return self

    def _check_rope_scaling(self) -> None:
        kind, low, high = self.rope_scaling, self.rope_low_freq_factor, self.rope_high_freq_factor
        if kind != "none" and self.position != "rope":
            raise ConfigError(
                "rope_scaling", f"{kind} needs position rope, not {self.position}; use none"
            )
        if (kind == "none") != (self.rope_factor is None):
            raise ConfigError(
                "rope_factor",
                "is for rope_scaling linear or llama3; set rope_scaling, or rope_factor to null"
                if kind == "none"
                else f"is required for rope_scaling {kind}; give the divisor of the frequencies",
            )
        if kind == "llama3" and low >= high:
            raise ConfigError(
                "rope_low_freq_factor",
                f"{low} is not below rope_high_freq_factor {high}; Llama 3.1 has 1 and 4",
            )

    @property
    def num_weights(self) -> int:
        """Number of entries of the weight matrices and embeddings, without biases and norms."""
        hidden, heads = self.hidden_size, self.num_heads + self.num_kv_heads
        matrices = 3 if self.activation == "swiglu" else 2
        layer = hidden * (2 * heads * self.head_dim + matrices * self.ffn_size)
        embeddings = (self.vocab_size or 0) * (1 if self.tie_embeddings else 2)
        positions = self.max_positions if self.position == "learned" else 0
        return self.num_layers * layer + hidden * (embeddings + positions)
