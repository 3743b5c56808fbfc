"""The interface of a pipeline stage, for the modules that `gpt.GPT` itself is built from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from fastrlhf.config import ModelConfig
from fastrlhf.models.heads import ScalarHead
from fastrlhf.models.inputs import StageInput
from fastrlhf.models.layout import SequenceLayout
from fastrlhf.parallel.mesh import Mesh

VOCAB_MULTIPLE = 128
"""Every tensor-parallel shard of a vocabulary is padded to a multiple of this.

Tensor cores need aligned matrix products.
"""


@dataclass
class StageConfig(TransformerConfig):
    """megatron's TransformerConfig with the additional fields that our modules read."""

    attention_kernel: str = "auto"
    embedding_dropout: float = 0.0
    full_attention_layers: int = 0
    """Layers, from the model's first, that have no sliding window."""


class Stage(Protocol):
    """The attributes of `gpt.GPT` that the eager forward pass and the initialization read."""

    model_config: ModelConfig
    config: StageConfig
    mesh: Mesh
    vocab_size: int
    pre_process: bool
    """True on the first stage, which has the embedding."""
    post_process: bool
    """True on the last stage, which has the final norm and the head."""
    share_embeddings_and_output_weights: bool
    embedding: LanguageModelEmbedding
    decoder: TransformerBlock
    score: ScalarHead

    def layout(self, batch: StageInput) -> SequenceLayout:
        """Return the layout of a micro-batch, with the model's rotary tables and window, if any."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yield all submodules."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield (name in this stage, parameter)."""
        ...


def global_names(stage: Stage) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (name in the full model, parameter).

    Layers are numbered from the first pipeline stage. A tied output layer has the embedding's name.
    """
    offset = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(stage.decoder.layers)}
    for name, parameter in stage.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{offset[local]}.{rest}"
        if name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter
