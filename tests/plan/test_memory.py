"""Memory of a plan against real allocations and against arithmetic."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from fastrlhf.config import load_config
from fastrlhf.models.gpt import build_model
from fastrlhf.parallel import mesh as meshes
from fastrlhf.plan.layout import Layout
from fastrlhf.plan.memory import count_rank, kinds
from fastrlhf.plan.meter import metered
from fastrlhf.plan.roles import roles
from fastrlhf.training.optimizer import Learner

CONFIGS = Path(__file__).parents[2] / "configs"


def living_bytes() -> int:
    """Return the bytes of the storages of all real tensors of this process."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_static_memory_equals_real_allocations():
    """A learner built for real holds the bytes that were counted on fake tensors."""
    source = CONFIGS / "debug" / "sft.yaml"
    config = load_config(source, ["model.dtype=bf16", "model.vocab_size=512"])
    found, notes = roles(config, "sft", source)
    assert not notes
    layout = Layout.of(config.parallel, 1)
    ((kind, stage),) = kinds(layout)
    counted = count_rank(config, found, layout, kind, stage, tokens=64)
    mesh = meshes.initialize(config.parallel, seed=1)
    try:
        before = living_bytes()
        model = build_model(config.model, mesh, 512)
        learner = Learner(mesh, model, config.optimizer, config.schedule, total_steps=1)
        real = living_bytes() - before
        assert learner.model is model
    finally:
        meshes.finalize()
    # Tables of a few hundred bytes (learning rate, steps) differ.
    assert counted.weights["model"] == pytest.approx(real, rel=2e-3)


def test_meter_counts_what_is_alive():
    with metered() as meter:
        a = torch.empty(1000, dtype=torch.float32)
        assert meter.held == 4000
        b = a + 1
        assert meter.held == 8000
        del b
        c = a[:10].view(2, 5)  # a view holds nothing of its own
        assert meter.held == 4000
        assert meter.peak == 8000
        del a
        assert meter.held == 4000  # the view keeps the storage
        del c
        assert meter.held == 0
        assert meter.mark() == 0
        assert meter.peak == 0


def test_activations_of_a_layer():
    """34 T H bytes a layer without attention scores: Korthikanti et al. 2022, equation 2.

    Their count has dropout masks (2 T H), which are off here, and flash attention adds an fp32
    statistic for each head.
    """
    source = CONFIGS / "instructgpt" / "1.3b" / "sft.yaml"
    off = [f"model.{kind}_dropout=0" for kind in ("residual", "embedding", "attention")]
    config = load_config(source, ["model.recompute=none", "model.dtype=bf16", *off])
    found, _ = roles(config, "sft", source)
    layout = Layout.of(config.parallel, config.parallel.tensor * config.parallel.pipeline)
    kind, stage = kinds(layout)[0]
    counted = count_rank(config, found, layout, kind, stage, tokens=2048)
    model = config.model
    per_layer = counted.training["model"].kept / (model.num_layers * 2048 * model.hidden_size)
    assert 30 < per_layer * layout.tensor < 40


def test_recomputation_keeps_only_inputs():
    source = CONFIGS / "instructgpt" / "6b" / "sft.yaml"
    kept = {}
    for recompute in ("none", "full"):
        config = load_config(source, [f"model.recompute={recompute}"])
        found, _ = roles(config, "sft", source)
        layout = Layout.of(config.parallel, 8)
        counted = count_rank(config, found, layout, *kinds(layout)[0], tokens=2048)
        kept[recompute] = counted.training["model"].kept
    assert kept["full"] < 0.2 * kept["none"]
