"""ModelConfig -> this rank's pipeline stage, built from megatron-core's parts.

A stage returns hidden states, never logits: the LM head's weight is handed to `ops.linear_*` by `lm_head()`, and the
scalar head of reward and value models reads hidden states in fp32. Parameter names are those of megatron's GPTModel.
Initial weights depend on the seed and the parameter's name alone, so every parallel layout starts from the same model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from fastrlhf.checkpoint.shards import Box, ParameterBox
from fastrlhf.config import ModelConfig
from fastrlhf.models import eager_forward
from fastrlhf.models.attention import CoreAttention, SequenceLayout, rope_tables
from fastrlhf.models.heads import ScalarHead
from fastrlhf.models.inputs import CachedInput, PackedInput
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import finalize_gradients

Tensor = torch.Tensor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Vocabularies are padded so that every tensor-parallel shard is a multiple of this (tensor cores like aligned GEMMs).
VOCAB_MULTIPLE = 128


@dataclass
class StageConfig(TransformerConfig):
    """megatron's TransformerConfig and what our modules read besides."""

    attention_kernel: str = "auto"
    embedding_dropout: float = 0.0


class Norm:
    """LayerNorm or RMSNorm whose parameters tell megatron that sequence parallelism shards their input."""

    def __new__(  # type: ignore[misc]
        cls, config: StageConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        kind = torch.nn.LayerNorm if config.normalization == "LayerNorm" else torch.nn.RMSNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def stage_config(model: ModelConfig, mesh: Mesh) -> StageConfig:
    """megatron's configuration of `model` on `mesh`."""
    dtype = DTYPES[model.dtype]
    on_gpu = mesh.device.type == "cuda"
    # The fused (torch.compile'd) versions pay off on a GPU; on a CPU they would start a compiler. megatron's fused GELU
    # adds a bias and is the tanh approximation, though asked for by the exact one's name.
    fused_gelu = on_gpu and model.activation == "gelu_tanh" and model.bias
    gelu = partial(F.gelu, approximate="tanh" if model.activation == "gelu_tanh" else "none")
    layers = model.recompute_layers or model.num_layers
    full_recompute = (
        {"recompute_method": "block", "recompute_num_layers": layers}
        if model.recompute == "full"
        else {}
    )
    return StageConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=F.silu if model.activation == "swiglu" else F.gelu if fused_gelu else gelu,
        bias_activation_fusion=fused_gelu or (on_gpu and model.activation == "swiglu"),
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        hidden_dropout=model.residual_dropout,
        embedding_dropout=model.embedding_dropout,
        attention_dropout=model.attention_dropout,
        attention_kernel=model.attention,
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        **full_recompute,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        fp16=model.dtype == "fp16",
        tensor_model_parallel_size=mesh.tensor_size,
        pipeline_model_parallel_size=mesh.pipeline_size,
        sequence_parallel=mesh.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # megatron asks for it beside variable lengths, with or without experts
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_gradients,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=on_gpu
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        use_cpu_initialization=True,  # allocate on torch's default device, which the builder sets
        perform_initialization=False,  # initialize_weights does it, the same for every layout
    )


def _layers(config: StageConfig, mesh: Mesh) -> TransformerBlockSubmodules:
    head_norm = Norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=tensor_parallel.ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=tensor_parallel.RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = MLPSubmodules(
        linear_fc1=tensor_parallel.ColumnParallelLinear,
        linear_fc2=tensor_parallel.RowParallelLinear,
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, pp_rank=mesh.pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


class GPT(LanguageModule):
    """One pipeline stage of a GPT or Llama model with an LM head or a scalar head.

    `stage(batch)` runs a packed micro-batch: on the last stage it returns hidden states after the final norm, [T, H],
    whole on every tensor-parallel rank; on the others what megatron passes to the next stage.
    """

    def __init__(
        self, model: ModelConfig, mesh: Mesh, vocab_size: int, head: Literal["lm", "scalar"]
    ) -> None:
        config = stage_config(model, mesh)
        super().__init__(config=config, pg_collection=mesh.groups)
        self.model_config = model
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.pre_process = mesh.is_first_stage
        self.post_process = mesh.is_last_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.tie_embeddings and head == "lm"
        self.head_kind = head
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
            spec=_layers(config, mesh),
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
        """megatron's schedules hand over the previous stage's output here."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(self, batch: PackedInput | CachedInput) -> Tensor:
        if self._use_eager_forward:
            return eager_forward.forward(self, batch, self.decoder.input_tensor)
        layout = self.layout(batch)
        hidden = None
        if self.pre_process:
            tokens = _pad_to_multiple(batch.tokens, self._multiple)
            positions = _pad_to_multiple(layout.positions, self._multiple)
            hidden = self.embedding(tokens[None], positions[None])
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        if not self.post_process:
            return hidden
        if self.mesh.sequence_parallel:
            # Heads return the whole gradient of the hidden states on every rank, so the backward only takes its slice.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        return hidden[: layout.num_tokens, 0]

    @property
    def _use_eager_forward(self) -> bool:
        """On a CPU the forward pass without megatron's modules, wherever it computes the same: their Python and the
        passes over memory that they do not fuse took a third of a PPO iteration.
        """
        if self.mesh.device.type != "cpu" or (self.training and self._drops):
            return False
        alone = self.mesh.tensor_size == 1 and self.mesh.pipeline_size == 1
        return not torch.is_grad_enabled() or (alone and self.config.recompute_granularity is None)

    @property
    def _drops(self) -> bool:
        return (
            max(
                self.config.hidden_dropout,
                self.config.embedding_dropout,
                self.config.attention_dropout,
            )
            > 0
        )

    @property
    def _multiple(self) -> int:
        return self.mesh.tensor_size if self.mesh.sequence_parallel else 1

    def layout(self, batch: PackedInput | CachedInput) -> SequenceLayout:
        """Where the tokens of a micro-batch stand, with rotary tables if this model rotates."""
        layout = batch.layout if isinstance(batch, CachedInput) else SequenceLayout.of(batch)
        if self.model_config.position == "rope":
            layout.rope = rope_tables(
                layout.positions, self.config.kv_channels, self.model_config.rope_theta
            )
        return layout

    def lm_head(self) -> dict[str, Any]:
        """The arguments by which `ops.linear_*` reach the LM head (last stage): `ops.linear_logprobs(hidden, labels=…,
        **stage.lm_head())`.
        """
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return {"weight": weight, "vocab_size": self.vocab_size, "group": self.mesh.vocab_group}

    def parameter_boxes(self) -> Iterator[tuple[str, torch.nn.Parameter, list[ParameterBox]]]:
        """Yield each parameter's local name, its tensor, and the boxes that the tensor holds one after another.

        A gated projection holds two boxes of the whole parameter: its part of the gate above its part of the up matrix.
        """
        parameters = dict(self.named_parameters())
        for name, entry in self.sharded_state_dict(metadata={}).items():
            parameter = parameters.pop(name, None)
            if parameter is not None:  # anything else is megatron's empty "_extra_state"
                tensors = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
                yield name, parameter, [_parameter_box(tensor) for tensor in tensors]
        assert not parameters, f"megatron's sharded state lacks {sorted(parameters)}"

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        if self.head_kind == "lm":
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # LanguageModule would look for an output layer.
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)


def _parameter_box(tensor: ShardedTensor) -> ParameterBox:
    box = Box(
        tuple(tensor.global_shape),
        tuple(tensor.global_offset),
        (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
    )
    # The last number says which data-parallel replica this is.
    return ParameterBox(tensor.key, box, any(tensor.replica_id[:-1]), tensor.allow_shape_mismatch)


def build_model(
    model: ModelConfig,
    mesh: Mesh,
    vocab_size: int,
    *,
    head: Literal["lm", "scalar"] = "lm",
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> GPT:
    """This rank's stage on `device` (default: the mesh's). Weights are drawn from `seed`, or left unset for a load if
    None.
    """
    with torch.device(device or mesh.device):
        stage = GPT(model, mesh, vocab_size, head)
    _mark_shards(stage)
    body_dtype = DTYPES[model.dtype]
    for name, parameter in stage.named_parameters():
        if not name.startswith("score."):
            parameter.data = parameter.data.to(body_dtype)
    if seed is not None:
        initialize_weights(stage, seed)
    return stage


def _mark_shards(stage: GPT) -> None:
    """Sets the attributes by which megatron tells shards from replicas (gradient norm, checkpoints).

    megatron sets them only where it also initialises the weights, which `initialize_weights` does here.
    """
    for module in stage.modules():
        if isinstance(
            module, (tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding)
        ):
            dim = 0
        elif isinstance(module, tensor_parallel.RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def global_names(stage: GPT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model, parameter): layer numbers count from the first stage, a tied output layer is the
    embedding.
    """
    offset = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(stage.decoder.layers)}
    for name, parameter in stage.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{offset[local]}.{rest}"
        if name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


@torch.no_grad()
def initialize_weights(stage: GPT, seed: int, prefix: str = "") -> None:
    """GPT-2's initialisation: N(0, init_std), residual projections scaled by 1 / sqrt(2 * layers), norms 1, biases 0;
    of the parameters whose name begins with `prefix`.

    Each parameter is drawn whole from a generator seeded by (seed, name) and then sharded, so that the model does not
    depend on the parallel layout. Padding rows of the vocabulary are 0.
    """
    config = stage.model_config
    for name, parameter in global_names(stage):
        if not name.startswith(prefix):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            std = config.init_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * config.num_layers)
            if name == "score.weight":
                std = stage.score.init_std
            parameter.copy_(_draw_shard(stage, name, parameter, std, seed))


def _draw_shard(
    stage: GPT, name: str, parameter: torch.nn.Parameter, std: float, seed: int
) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor_size, tensor_rank = stage.mesh.tensor_size, stage.mesh.tensor_rank
    sharded = tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False)
    dim: int = getattr(parameter, "partition_dim", 0) if sharded else 0
    shape = list(parameter.shape)
    shape[dim] *= tensor_size if sharded else 1
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = torch.empty(stage.vocab_size, shape[1]).normal_(0.0, std, generator=generator)
        whole = F.pad(rows, (0, 0, 0, shape[0] - stage.vocab_size))
    else:
        whole = torch.empty(shape).normal_(0.0, std, generator=generator)
    if not sharded:
        return whole
    if stage.model_config.activation == "swiglu" and "linear_fc1" in name:
        # Gate and up projections stand one above the other; each rank holds its part of both.
        return torch.cat(
            [half.chunk(tensor_size, dim)[tensor_rank] for half in whole.chunk(2, dim)], dim
        )
    return whole.chunk(tensor_size, dim)[tensor_rank]


def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def _pad_to_multiple(row: Tensor, multiple: int) -> Tensor:
    return F.pad(row, (0, -row.numel() % multiple)) if row.numel() % multiple else row
