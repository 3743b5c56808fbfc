"""Our stages equal transformers' models, forward and backward, and save the weights unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from fastrlhf.config import ModelConfig
from fastrlhf.data.batches import pack
from fastrlhf.models.gpt import GPT, build_model, global_names
from fastrlhf.models.hf import (
    LogitMismatch,
    head_from_hf,
    load_hf,
    model_config_from_hf,
    save_hf,
    verify_logits,
    vocab_size_from_hf,
)
from fastrlhf.models.hf.mapping import stored_tensors, tensor_map
from fastrlhf.parallel.mesh import Mesh

Folder = Callable[[str], Path]
Load = Callable[..., GPT]
Bound = Callable[[ModelConfig], float]


def logits_of(stage: GPT, sequences: list[list[int]]) -> torch.Tensor:
    hidden = stage(pack(sequences, [0] * len(sequences)))
    return (hidden @ stage.lm_head()["weight"].t())[:, : stage.vocab_size]


def test_packed_logits_equal_those_of_each_sequence_alone(
    variant: str,
    hf_folder: Folder,
    hf_model: Callable[..., Any],
    load: Load,
    sequences: list[list[int]],
    logit_bound: Bound,
    largest_logit: float,
) -> None:
    reference, stage = hf_model(variant), load(hf_folder(variant))
    with torch.no_grad():
        theirs = torch.cat([reference(torch.tensor([tokens])).logits[0] for tokens in sequences])
        ours = logits_of(stage, sequences)
    assert theirs.std() > 0.3  # not a comparison of zeros
    assert theirs.abs().max() < largest_logit
    torch.testing.assert_close(ours, theirs, atol=logit_bound(stage.model_config), rtol=0)


@pytest.mark.parametrize(
    "variant", ["gpt2", "gpt2-exact-gelu-untied", "llama", "qwen3", "llama3-rope", "qwen2-window"]
)
def test_gradients_of_a_cross_entropy_equal_those_of_transformers(
    variant: str,
    hf_folder: Folder,
    hf_model: Callable[..., Any],
    load: Load,
    sequences: list[list[int]],
) -> None:
    reference = hf_model(variant)
    count = sum(len(tokens) - 1 for tokens in sequences)
    for tokens in sequences:
        row = torch.tensor([tokens])
        loss = F.cross_entropy(reference(row).logits[0, :-1], row[0, 1:], reduction="sum") / count
        loss.backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}

    stage = load(hf_folder(variant))
    batch = pack(sequences, [0] * len(sequences))
    F.cross_entropy(logits_of(stage, sequences), batch.labels, ignore_index=-100).backward()
    rules = tensor_map(stage.model_config, stage.vocab_size, "lm")
    compared = set()
    for name, parameter in global_names(stage):
        assert parameter.grad is not None
        ours = stored_tensors(rules[name], [parameter.grad], stage.model_config.head_dim)
        for theirs_name, gradient in ours.items():
            expected = theirs[theirs_name]
            assert expected is not None
            assert (gradient - expected).abs().max() <= 2e-6 + 1e-4 * expected.abs().max(), (
                theirs_name
            )
            compared.add(theirs_name)
    assert compared == set(theirs)


def test_round_trip_is_bitwise(variant: str, hf_folder: Folder, load: Load, tmp_path: Path) -> None:
    stage = load(hf_folder(variant))
    save_hf(stage, tmp_path / "out")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (hf_folder(variant), tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert model_config_from_hf(tmp_path / "out") == model_config_from_hf(hf_folder(variant))
    config, saved = (
        json.loads((folder / "config.json").read_text())
        for folder in (hf_folder(variant), tmp_path / "out")
    )
    assert saved.get("rope_parameters") == config.get("rope_parameters")
    for option in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
        if config.get("sliding_window") is not None:
            assert saved.get(option) == config.get(option)


@pytest.mark.parametrize("variant", ["llama3-rope", "linear-rope"])
def test_rope_scaling_of_older_files(variant: str, hf_folder: Folder, tmp_path: Path) -> None:
    """transformers 4 writes rope_theta and rope_scaling, before 4.43 with "type"."""
    config = json.loads((hf_folder(variant) / "config.json").read_text())
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for key in ("rope_type", "type"):
        old = config | {"rope_theta": theta, "rope_scaling": {key: kind, **rope}}
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert model_config_from_hf(tmp_path) == model_config_from_hf(hf_folder(variant))


def test_bf16_round_trip_is_bitwise(
    hf_model: Callable[..., Any], load: Load, mesh: Mesh, tmp_path: Path, logit_bound: Bound
) -> None:
    hf_model("llama").bfloat16().save_pretrained(tmp_path / "in")
    stage = load(tmp_path / "in")
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    save_hf(stage, tmp_path / "out")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16
        for name in before
    )
    assert verify_logits(stage, tmp_path / "out", mesh) < logit_bound(stage.model_config)


def test_sharded_files_have_an_index_that_transformers_and_we_read(
    hf_folder: Folder,
    hf_model: Callable[..., Any],
    load: Load,
    tmp_path: Path,
    mesh: Mesh,
    logit_bound: Bound,
) -> None:
    stage = load(hf_folder("llama"))
    save_hf(stage, tmp_path / "out", max_file_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    for name in files:
        assert len(load_file(tmp_path / "out" / name)) == list(index["weight_map"].values()).count(
            name
        )
    assert verify_logits(load(tmp_path / "out"), tmp_path / "out", mesh) < logit_bound(
        stage.model_config
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in hf_model("llama").named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_published_gpt2_names_and_buffers_load(
    hf_folder: Folder, load: Load, tmp_path: Path, sequences: list[list[int]]
) -> None:
    """The published GPT-2 files lack the "transformer." prefix and contain causal masks."""
    from safetensors.torch import save_file

    tensors = load_file(hf_folder("gpt2") / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((hf_folder("gpt2") / "config.json").read_text())
    assert torch.equal(
        logits_of(load(tmp_path), sequences), logits_of(load(hf_folder("gpt2")), sequences)
    )


def test_verify_logits_detects_one_wrong_weight(
    hf_folder: Folder, load: Load, mesh: Mesh, logit_bound: Bound
) -> None:
    stage = load(hf_folder("llama"))
    assert verify_logits(stage, hf_folder("llama"), mesh) < logit_bound(stage.model_config)
    with torch.no_grad():
        stage.decoder.layers[1].self_attention.linear_qkv.weight[5, 3] += 0.5
    with pytest.raises(LogitMismatch, match="logits differ from transformers' by"):
        verify_logits(stage, hf_folder("llama"), mesh)


class TestRewardModels:
    """`...ForSequenceClassification` with one label is our scalar head."""

    @pytest.fixture(params=["gpt2", "llama"])
    def folder(
        self, request: pytest.FixtureRequest, hf_model: Callable[..., Any], tmp_path: Path
    ) -> Path:
        kind = transformers.AutoModelForSequenceClassification
        hf_model(request.param, kind, num_labels=1, pad_token_id=0).save_pretrained(
            tmp_path / "reward"
        )
        return tmp_path / "reward"

    def build(self, folder: Path, mesh: Mesh) -> GPT:
        assert head_from_hf(folder) == "scalar"
        stage = build_model(
            model_config_from_hf(folder), mesh, vocab_size_from_hf(folder), head="scalar", seed=1
        )
        load_hf(folder, stage)
        return stage.eval()

    def test_scores_equal_those_of_transformers(
        self, folder: Path, mesh: Mesh, sequences: list[list[int]], logit_bound: Bound
    ) -> None:
        stage = self.build(folder, mesh)
        reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch = pack(sequences, [0] * len(sequences))
        with torch.no_grad():
            ours = stage.score(stage(batch))[batch.cu_seqlens[1:].long() - 1]
            theirs = torch.stack(
                [reference(torch.tensor([tokens])).logits[0, 0] for tokens in sequences]
            )
        bound = logit_bound(stage.model_config)
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)
        assert verify_logits(stage, folder, mesh) < bound

    def test_bias_survives_a_round_trip(
        self,
        folder: Path,
        mesh: Mesh,
        tmp_path: Path,
        sequences: list[list[int]],
        logit_bound: Bound,
    ) -> None:
        stage = self.build(folder, mesh)
        assert stage.score.bias.item() == 0.0
        with torch.no_grad():
            stage.score.bias.fill_(-1.2345678)
        save_hf(stage, tmp_path / "out", extra={"score_statistics": {"mean": 0.5}})
        again = self.build(tmp_path / "out", mesh)
        batch = pack(sequences, [0] * len(sequences))
        with torch.no_grad():
            before, after = (model.score(model(batch)) for model in (stage, again))
        bound = logit_bound(stage.model_config)
        torch.testing.assert_close(after, before, atol=bound, rtol=0)
        if stage.model_config.family == "llama":  # RMSNorm cannot hold the bias
            assert torch.equal(again.score.bias, stage.score.bias)
        else:
            assert again.score.bias == 0.0
        assert torch.equal(again.score.weight, stage.score.weight)
        assert verify_logits(again, tmp_path / "out", mesh) < bound
        assert json.loads((tmp_path / "out" / "config.json").read_text())["score_statistics"] == {
            "mean": 0.5
        }

    def test_language_model_loads_without_the_scalar_head(
        self, hf_folder: Folder, mesh: Mesh
    ) -> None:
        model = model_config_from_hf(hf_folder("llama"))
        stage = build_model(
            model, mesh, vocab_size_from_hf(hf_folder("llama")), head="scalar", seed=1
        )
        head = stage.score.weight.clone()
        load_hf(hf_folder("llama"), stage)
        stored = load_file(hf_folder("llama") / "model.safetensors")
        assert torch.equal(stage.decoder.final_layernorm.weight, stored["model.norm.weight"])
        assert torch.equal(stage.score.weight, head) and head.std() > 0

    def test_reward_model_is_not_a_language_model(self, folder: Path, mesh: Mesh) -> None:
        from fastrlhf.errors import UserError

        stage = build_model(model_config_from_hf(folder), mesh, vocab_size_from_hf(folder))
        with pytest.raises(UserError, match="holds a reward model"):
            load_hf(folder, stage)
