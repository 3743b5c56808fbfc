"""megatron-core's configuration and layer specification of a ModelConfig."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from fastrlhf.config import ModelConfig
from fastrlhf.models.attention import CoreAttention
from fastrlhf.models.stage import StageConfig
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.schedule import finalize_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Norm:
    """LayerNorm or RMSNorm with the parameter attribute that sequence parallelism needs.

    The attribute tells megatron that the norm's input is sharded, so its gradients must be summed.
    """

    def __new__(  # type: ignore[misc]
        cls, config: StageConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> torch.nn.Module:
        kind = torch.nn.LayerNorm if config.normalization == "LayerNorm" else torch.nn.RMSNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def stage_config(model: ModelConfig, mesh: Mesh) -> StageConfig:
    """Return megatron's configuration of `model` on `mesh`."""
    dtype = DTYPES[model.dtype]
    on_gpu = mesh.device.type == "cuda"
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
        **_activation_fields(model, on_gpu=on_gpu),
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        hidden_dropout=model.residual_dropout,
        embedding_dropout=model.embedding_dropout,
        attention_dropout=model.attention_dropout,
        attention_kernel=model.attention,
        full_attention_layers=model.full_attention_layers,
        **_recompute_fields(model),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        fp16=model.dtype == "fp16",
        tensor_model_parallel_size=mesh.tensor_size,
        pipeline_model_parallel_size=mesh.pipeline_size,
        sequence_parallel=mesh.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable lengths, even without experts
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_gradients,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=on_gpu
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        use_cpu_initialization=True,  # allocate on torch's default device, set by the builder
        perform_initialization=False,  # initialize_weights does it, equally for every layout
    )


def _activation_fields(model: ModelConfig, *, on_gpu: bool) -> dict[str, object]:
    # The fused (torch.compile'd) functions are faster on a GPU; on a CPU they would start a
    # compiler. megatron's fused GELU adds a bias and is the tanh approximation, but it is selected
    # by the name of the exact GELU.
    fused_gelu = on_gpu and model.activation == "gelu_tanh" and model.bias
    gelu = partial(F.gelu, approximate="tanh" if model.activation == "gelu_tanh" else "none")
    gated = model.activation == "swiglu"
    return {
        "gated_linear_unit": gated,
        "activation_func": F.silu if gated else F.gelu if fused_gelu else gelu,
        "bias_activation_fusion": fused_gelu or (on_gpu and gated),
    }


def _recompute_fields(model: ModelConfig) -> dict[str, object]:
    if model.recompute != "full":
        return {"recompute_granularity": None if model.recompute == "none" else model.recompute}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": model.recompute_layers or model.num_layers,
    }


def layer_spec(config: StageConfig, mesh: Mesh) -> TransformerBlockSubmodules:
    """Return the specification of this pipeline stage's layers and final norm."""
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
