"""Unsupported options and unsafe or incomplete files raise errors that name them and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrlhf.config import ModelConfig
from fastrlhf.errors import UserError
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.hf import head_from_hf, load_hf, model_config_from_hf, save_hf
from fastrlhf.parallel.mesh import Mesh

Copy = Callable[..., Path]


@pytest.fixture
def copy(hf_folder: Callable[[str], Path], tmp_path: Path) -> Copy:
    """Return `copy(variant, **changes)`: copies a model folder and changes its config.json."""

    def make(variant: str, **changes: Any) -> Path:
        folder = shutil.copytree(hf_folder(variant), tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling = dynamic .* expected linear, llama3, or none",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_scaling = yarn",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None}},
            "rope_scaling without factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -1.0}},
            "rope_factor .* greater than 0",
        ),
        (
            "llama",
            {"attention_bias": True},
            "attention_bias = True .* expected the same as mlp_bias",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu .* expected silu"),
        ("llama", {"dtype": "float64"}, "dtype = torch.float64"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads"),
        ("llama", {"sliding_window": 32}, "sliding_window = 32 .* model_type mistral"),
        (
            "mistral",
            {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
            "model_type ministral is not supported",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types = .* expected sliding_attention in all layers but some of the first",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = relu"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True",
        ),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        (
            "gpt2",
            {"model_type": "gpt_neox"},
            "model_type gpt_neox is not supported; supported are gpt2, llama",
        ),
        ("gpt2", {"model_type": "of-tomorrow"}, "of-tomorrow"),
    ],
)
def test_unsupported_options(
    copy: Copy, variant: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model_config_from_hf(copy(variant, **changes))


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": None,
                "max_window_layers": 3,
            },
        ),
    ],
)
def test_windows_that_mask_nothing_load(copy: Copy, variant: str, changes: dict[str, Any]) -> None:
    assert model_config_from_hf(copy(variant, **changes)).num_layers == 2


def test_heads(copy: Copy) -> None:
    folder = copy("llama", architectures=["LlamaForSequenceClassification"], num_labels=2)
    with pytest.raises(UserError, match=r"num_labels = 2 .* one number"):
        head_from_hf(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaModel"]})
    )
    with pytest.raises(UserError, match="architectures = LlamaModel"):
        head_from_hf(folder)


@pytest.fixture
def stage(mesh: Mesh, hf_folder: Callable[[str], Path]) -> GPT:
    return build_model(model_config_from_hf(hf_folder("llama")), mesh, 101)


class TestFiles:
    """Every tensor is used once, every parameter is loaded, files are complete, no pickles."""

    def change(self, folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    def test_missing_tensor(self, copy: Copy, stage: GPT) -> None:
        folder = self.change(
            copy("llama"), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")
        )
        with pytest.raises(
            UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight \[48, 32\] is missing"
        ):
            load_hf(folder, stage)

    def test_tensor_without_a_place(self, copy: Copy, stage: GPT) -> None:
        folder = self.change(
            copy("llama"),
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        )
        with pytest.raises(
            UserError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias has no place"
        ):
            load_hf(folder, stage)

    def test_wrong_shape(self, copy: Copy, stage: GPT) -> None:
        folder = self.change(
            copy("llama"), lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})
        )
        with pytest.raises(
            UserError, match=r"tensor model\.norm\.weight is \[31\], but config\.json says \[32\]"
        ):
            load_hf(folder, stage)

    def test_integer_weights(self, copy: Copy, stage: GPT) -> None:
        edit = {"model.norm.weight": torch.ones(32, dtype=torch.int8)}
        folder = self.change(copy("llama"), lambda tensors: tensors.update(edit))
        with pytest.raises(UserError, match=r"tensor model\.norm\.weight is I8"):
            load_hf(folder, stage)

    def test_truncated_file(self, copy: Copy, stage: GPT) -> None:
        folder = copy("llama")
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
            load_hf(folder, stage)

    def test_shard_that_is_missing_or_repeats_a_tensor(self, copy: Copy, stage: GPT) -> None:
        folder = copy("llama")
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        index = {
            "weight_map": dict.fromkeys(tensors, "a.safetensors")
            | {"model.norm.weight": "b.safetensors"}
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(tensors, folder / "a.safetensors")
        with pytest.raises(
            UserError,
            match=r"b\.safetensors: missing, but model\.safetensors\.index\.json names it",
        ):
            load_hf(folder, stage)
        save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
        with pytest.raises(UserError, match=r"tensor model\.norm\.weight is in another file"):
            load_hf(folder, stage)
        (folder / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(UserError, match="not a safetensors index"):
            load_hf(folder, stage)

    def test_pickles_are_never_opened(
        self, copy: Copy, stage: GPT, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = copy("llama")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
        with pytest.raises(
            UserError, match=r"no safetensors, only \.bin weights: .*save_pretrained"
        ):
            load_hf(folder, stage)

    def test_no_weights_and_no_model(self, copy: Copy, stage: GPT, tmp_path: Path) -> None:
        folder = copy("llama")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"no weights; expected model\.safetensors"):
            load_hf(folder, stage)
        with pytest.raises(UserError, match="no Hugging Face model here"):
            model_config_from_hf(tmp_path / "nowhere")

    def test_tied_model_may_repeat_its_embedding_only_if_equal(
        self, copy: Copy, mesh: Mesh
    ) -> None:
        folder = copy("smollm")
        stage = build_model(model_config_from_hf(folder), mesh, 101)
        embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        load_hf(
            self.change(
                folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()})
            ),
            stage,
        )
        other = embedding.clone()
        other[100, 31] += 1
        self.change(folder, lambda tensors: tensors.update({"lm_head.weight": other}))
        with pytest.raises(
            UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
        ):
            load_hf(folder, stage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, r"num_layers 2, not 4; set model\.num_layers=2"),
        ({"rope_theta": 1e4}, r"rope_theta 500\.0, not 10000\.0"),
        ({"norm_eps": 1e-5}, "norm_eps 1e-06"),
        ({"tie_embeddings": True}, "tie_embeddings False, not True"),
        ({"sliding_window": 8}, r"sliding_window null, not 8; set model\.sliding_window=null"),
        ({"rope_scaling": "linear", "rope_factor": 2.0}, "rope_scaling none, not linear"),
    ],
)
def test_stage_of_another_shape(
    hf_folder: Callable[[str], Path], mesh: Mesh, changes: dict[str, Any], message: str
) -> None:
    model = model_config_from_hf(hf_folder("llama")).model_copy(update=changes)
    with pytest.raises(UserError, match=message):
        load_hf(hf_folder("llama"), build_model(model, mesh, 101))


def test_stage_of_another_vocabulary(hf_folder: Callable[[str], Path], mesh: Mesh) -> None:
    stage = build_model(model_config_from_hf(hf_folder("llama")), mesh, 99)
    with pytest.raises(UserError, match=r"vocab_size 101, not 99; set model\.vocab_size=101"):
        load_hf(hf_folder("llama"), stage)


def test_saving_rejects_unsupported_shapes_and_used_folders(
    mesh: Mesh, stage: GPT, tmp_path: Path
) -> None:
    odd = ModelConfig(
        family="gpt",
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        max_positions=8,
        norm="rmsnorm",
        dtype="fp32",
    )
    with pytest.raises(
        UserError, match=r"no Hugging Face architecture computes this model \(position=learned"
    ):
        save_hf(build_model(odd, mesh, 101, seed=1), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        save_hf(stage, tmp_path)
