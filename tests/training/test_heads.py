"""Reward models need a trained head; a value function may start from a language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrlhf.checkpoint.model_folder import save_model
from fastrlhf.errors import UserError
from fastrlhf.models import initialization
from fastrlhf.models.loading import find_model, load_saved
from fastrlhf.parallel.mesh import Mesh


@pytest.fixture
def language_model(tmp_path: Path, training: Callable[..., Any]) -> Path:
    save_model(tmp_path / "lm", training().stage, tokenizer="")
    return tmp_path / "lm"


def test_a_language_model_is_no_reward_model(language_model: Path, mesh: Mesh) -> None:
    with pytest.raises(UserError, match=r"lm is a language model: .*give a reward model"):
        load_saved(find_model(language_model), mesh, "scalar", "fp32")


def test_a_value_function_from_a_language_model_has_a_drawn_head(
    language_model: Path, mesh: Mesh
) -> None:
    saved = find_model(language_model)
    one, same, other = (load_saved(saved, mesh, "scalar", "fp32", seed=seed) for seed in (1, 1, 2))
    body = load_saved(saved, mesh, "lm", "fp32")
    heads = [dict(stage.named_parameters())["score.weight"] for stage in (one, same, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(
        one.decoder.layers[0].mlp.linear_fc1.weight, body.decoder.layers[0].mlp.linear_fc1.weight
    )


def test_a_reward_model_keeps_its_head(
    tmp_path: Path, training: Callable[..., Any], mesh: Mesh
) -> None:
    stage = training(head="scalar").stage
    save_model(tmp_path / "rm", stage, tokenizer="")
    loaded = load_saved(find_model(tmp_path / "rm"), mesh, "scalar", "fp32", seed=5)
    for name, parameter in stage.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name


def test_only_the_head_is_drawn_if_the_rest_is_loaded(
    language_model: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing billions of weights takes minutes."""
    drawn: list[str] = []
    draw = initialization.draw_shard
    monkeypatch.setattr(
        initialization,
        "draw_shard",
        lambda stage, name, *rest: drawn.append(name) or draw(stage, name, *rest),
    )
    load_saved(find_model(language_model), mesh, "scalar", "fp32", seed=1)
    assert drawn == ["score.weight"]
