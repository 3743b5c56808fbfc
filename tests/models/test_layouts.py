"""Every parallel layout has the weights, scores, gradients and saved files of one rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastrlhf.config import ModelConfig
from fastrlhf.models.hf import model_config_from_hf
from fastrlhf.parallel.mesh import Mesh

SCRIPT = Path(__file__).with_name("run_layouts.py")
VARIANTS = ["gpt2", "llama-biases", "qwen2-tied", "qwen3"]
VARIANTS_BOTH = ["llama", "mistral", "qwen2", "smollm", "llama3-rope", "qwen2-window"]
LAYOUTS = {"tensor": [2, 1, 2], "sequence": [2, 1, 2], "pipeline": [1, 2, 2], "both": [2, 2, 1]}


@pytest.fixture(scope="module")
def script(imported: Callable[[Path], ModuleType]) -> ModuleType:
    return imported(SCRIPT)


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory,
    hf_model: Callable[..., Any],
    four_ranks: Callable[..., None],
) -> Path:
    """Return the folder of the four ranks' results."""
    folder = tmp_path_factory.mktemp("layouts")
    for variant in VARIANTS:
        hf_model(variant).save_pretrained(folder / "hf" / variant)
    for variant in VARIANTS_BOTH:
        hf_model(variant).save_pretrained(folder / "hf-both" / variant)
    kind = transformers.AutoModelForSequenceClassification
    hf_model("gpt2", kind, num_labels=1, pad_token_id=0).save_pretrained(folder / "hf" / "reward")
    hf_model("llama", kind, num_labels=1, pad_token_id=0).save_pretrained(
        folder / "hf-both" / "llama-reward"
    )
    four_ranks(SCRIPT, folder)
    return folder


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, ran: Path) -> Path:
    """Return the folder of one layout's results."""
    assert (
        json.loads((ran / request.param / "results.json").read_text())["place"]
        == LAYOUTS[request.param]
    )
    return ran / request.param


def results(layout: Path) -> dict[str, Any]:
    return json.loads((layout / "results.json").read_text())


@pytest.mark.parametrize("variant", [*VARIANTS, "reward"])
def test_hugging_face_folders_load_verify_and_come_back_bitwise(
    variant: str, layout: Path, logit_bound: Callable[..., float]
) -> None:
    assert_back_bitwise(layout, layout.parent / "hf" / variant, logit_bound)


@pytest.mark.parametrize("variant", [*VARIANTS_BOTH, "llama-reward"])
def test_every_family_comes_back_bitwise_from_tensor_and_pipeline_parallel(
    variant: str, ran: Path, logit_bound: Callable[..., float]
) -> None:
    assert_back_bitwise(ran / "both", ran / "hf-both" / variant, logit_bound)


def assert_back_bitwise(layout: Path, source: Path, logit_bound: Callable[..., float]) -> None:
    assert results(layout)["logits"][source.name] < logit_bound(model_config_from_hf(source))
    before = load_file(source / "model.safetensors")
    files = list((layout / "hf" / source.name).glob("*.safetensors"))
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1 and before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_scalar_head_equals_one_rank(
    family: str, layout: Path, script: ModuleType, mesh: Mesh, rounding: Callable[..., float]
) -> None:
    model = ModelConfig(**(script.GPT2 if family == "gpt" else script.LLAMA), dtype="fp32")
    loss, gradients = script.scalar_head_gradients(mesh, model)
    batches = script.micro_batches()
    longest, tokens = (
        max(batch.max_seqlen for batch in batches),
        sum(batch.tokens.numel() for batch in batches),
    )
    # The loss is a sum of squares, whose relative error is twice that of the scores.
    assert results(layout)[f"scalar.{family}"] == pytest.approx(
        loss, rel=2 * rounding(model, longest, tokens)
    )
    bound = rounding(model, longest, tokens, backward=True)
    theirs = load_file(layout / f"scalar.{family}.safetensors")
    assert theirs.keys() == gradients.keys() and "score.bias" in theirs
    for name, gradient in gradients.items():
        assert (theirs[name] - gradient).abs().max() <= bound * gradient.abs().max(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_initial_weights_are_those_of_one_rank(
    family: str, layout: Path, script: ModuleType, mesh: Mesh
) -> None:
    fields = script.GPT2 if family == "gpt" else script.LLAMA
    expected = script.initial_weights(mesh, ModelConfig(**fields, dtype="fp32"))
    weights = load_file(layout / f"initial.{family}.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_four_ranks_convert_there_and_back(ran: Path, logit_bound: Callable[..., float]) -> None:
    source = ran / "hf" / "qwen2-tied"
    assert max(json.loads((ran / "converted.json").read_text())) < logit_bound(
        model_config_from_hf(source)
    )
    before = load_file(source / "model.safetensors")
    after = load_file(ran / "converted" / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


@pytest.mark.parametrize("name", ["tensor", "sequence"])
def test_dropout_masks_differ_only_where_activations_are_sharded(name: str, ran: Path) -> None:
    """Tensor-parallel ranks share the embeddings of tokens; sequence-parallel ranks shard them."""
    assert results(ran / name)["dropout"] == {"hidden": True, "masks": name == "tensor"}
