"""A GPT or Llama model as pipeline stages built from megatron-core's modules.

A stage returns hidden states, never logits: `lm_head()` gives the arguments of the LM head for
`ops.linear_*`, and the scalar head of reward and value models reads hidden states in fp32.
Parameter names are those of megatron's GPTModel. Initial weights depend on the seed and the
parameter's name alone, so every parallel layout starts from the same model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock

from fastrlhf.checkpoint.shards import Box, ParameterBox
from fastrlhf.config import ModelConfig
from fastrlhf.models import eager_forward
from fastrlhf.models.heads import Head, LMHead, ScalarHead
from fastrlhf.models.initialization import initialize_weights, mark_shards
from fastrlhf.models.inputs import CachedInput, StageInput
from fastrlhf.models.layout import SequenceLayout
from fastrlhf.models.rope import rope_tables
from fastrlhf.models.spec import DTYPES, layer_spec, stage_config
from fastrlhf.models.stage import VOCAB_MULTIPLE, global_names
from fastrlhf.parallel.mesh import Mesh

__all__ = [
    "DTYPES",
    "GPT",
    "VOCAB_MULTIPLE",
    "build_model",
    "global_names",
    "initialize_weights",
]

Tensor = torch.Tensor


class GPT(LanguageModule):
    """One pipeline stage of a GPT or Llama model with an LM head or a scalar head.

    `stage(batch)` runs a packed micro-batch. The last stage returns hidden states after the final
    norm, [T, H], complete on every tensor-parallel rank; the other stages return what megatron
    sends to the next stage.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, vocab_size: int, head: Head) -> None:
        config = stage_config(model, mesh)
        super().__init__(config=config, pg_collection=mesh.groups)
        self.model_config = model
        self.mesh = mesh
        self.vocab_size = vocab_size
        # A tokenizer may have fewer tokens than the table has rows (Qwen: 151,665 of 151,936).
        # Sampling and log-probabilities share this limit, so the first PPO ratio is 1.
        self.num_tokens = vocab_size
        self.pre_process = mesh.is_first_stage
        self.post_process = mesh.is_last_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.tie_embeddings and head == "lm"
        self.head_kind: Head = head
        padded_vocab = _round_up(vocab_size, VOCAB_MULTIPLE * mesh.tensor_size)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab,
                max_sequence_length=model.max_positions,
                position_embedding_type="learned_absolute"
                if model.position == "learned"
                else "none",
                tp_group=mesh.tensor_group,
            )
            self.embedding.embedding_dropout.p = config.embedding_dropout
        self.decoder = TransformerBlock(
            config=config,
            spec=layer_spec(config, mesh),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=mesh.groups,
        )
        if self.post_process and head == "scalar":
            self.score = ScalarHead(config.hidden_size)
        elif self.post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded_vocab,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process
                and self.share_embeddings_and_output_weights,
                tp_group=mesh.tensor_group,
            )
        if head == "lm" and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receive the previous stage's output; called by megatron's schedules."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(self, batch: StageInput) -> Tensor:
        """Run a micro-batch of T tokens through this stage; see the class for what it returns."""
        if self._use_eager_forward:
            return eager_forward.forward(self, batch, self.decoder.input_tensor)
        layout = self.layout(batch)
        hidden = None
        if self.pre_process:
            tokens = _pad_to_multiple(batch.tokens, self._token_multiple)
            positions = _pad_to_multiple(layout.positions, self._token_multiple)
            hidden = self.embedding(tokens[None], positions[None])
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        if not self.post_process:
            return hidden
        if self.mesh.sequence_parallel:
            # The heads return the full gradient of the hidden states on every rank, so the backward
            # pass takes this rank's slice and does not sum.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        return hidden[: layout.num_tokens, 0]

    @property
    def _use_eager_forward(self) -> bool:
        """Whether the forward pass runs without megatron's modules.

        True on a CPU wherever it computes the same: the modules' Python code and their unfused
        passes over memory took a third of a PPO iteration.
        """
        if self.mesh.device.type != "cpu" or (self.training and self._has_dropout):
            return False
        alone = self.mesh.tensor_size == 1 and self.mesh.pipeline_size == 1
        return not torch.is_grad_enabled() or (alone and self.config.recompute_granularity is None)

    @property
    def _has_dropout(self) -> bool:
        return (
            max(
                self.config.hidden_dropout,
                self.config.embedding_dropout,
                self.config.attention_dropout,
            )
            > 0
        )

    @property
    def _token_multiple(self) -> int:
        """Number of tokens of which the layers need a multiple."""
        return self.mesh.tensor_size if self.mesh.sequence_parallel else 1

    def layout(self, batch: StageInput) -> SequenceLayout:
        """Return the layout of a micro-batch, with the model's rotary tables and window, if any."""
        layout = batch.layout if isinstance(batch, CachedInput) else SequenceLayout.of(batch)
        if self.model_config.position == "rope":
            layout.rope = rope_tables(layout.positions, self.config.kv_channels, self.model_config)
        layout.set_window(self.model_config.sliding_window)
        return layout

    def lm_head(self) -> LMHead:
        """Return the LM head's arguments for `ops.linear_*`; only on the last stage.

        Ids from `num_tokens` on are left out of the softmax.

        For example `ops.linear_logprobs(hidden, labels=labels, **stage.lm_head())`.
        """
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return {"weight": weight, "vocab_size": self.num_tokens, "group": self.mesh.vocab_group}

    def parameter_boxes(self) -> Iterator[tuple[str, torch.nn.Parameter, list[ParameterBox]]]:
        """Yield each parameter's local name, its tensor, and the boxes stacked in the tensor.

        A gated projection has two boxes: its part of the gate and its part of the up matrix.
        """
        parameters = dict(self.named_parameters())
        for name, entry in self.sharded_state_dict(metadata={}).items():
            parameter = parameters.pop(name, None)
            if parameter is not None:  # any other entry is megatron's empty "_extra_state"
                tensors = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
                yield name, parameter, [_parameter_box(tensor) for tensor in tensors]
        assert not parameters, f"megatron's sharded state lacks {sorted(parameters)}"

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return megatron's sharded state, also for a scalar head."""
        if self.head_kind == "lm":
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # LanguageModule expects an output layer, which a scalar head does not have.
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)


def _parameter_box(tensor: ShardedTensor) -> ParameterBox:
    box = Box(
        tuple(tensor.global_shape),
        tuple(tensor.global_offset),
        (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
    )
    # The last number is the data-parallel replica.
    return ParameterBox(tensor.key, box, any(tensor.replica_id[:-1]), tensor.allow_shape_mismatch)


def build_model(
    model: ModelConfig,
    mesh: Mesh,
    vocab_size: int,
    *,
    head: Head = "lm",
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> GPT:
    """Build this rank's stage on `device` (default: the mesh's).

    Weights are initialized from `seed`, or left uninitialized if it is None (for a load).
    """
    with torch.device(device or mesh.device):
        stage = GPT(model, mesh, vocab_size, head)
    mark_shards(stage)
    dtype = DTYPES[model.dtype]
    for name, parameter in stage.named_parameters():
        if not name.startswith("score."):
            parameter.data = parameter.data.to(dtype)
    if seed is not None:
        initialize_weights(stage, seed)
    return stage


def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def _pad_to_multiple(row: Tensor, multiple: int) -> Tensor:
    return F.pad(row, (0, -row.numel() % multiple)) if row.numel() % multiple else row
