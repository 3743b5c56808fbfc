"""Runs of one process and of four ranks that all tests of the algorithms share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from algorithms_support import run_layouts, tiny_ppo

from fastrlhf.algorithms.ppo import PPO
from fastrlhf.parallel import mesh as meshes


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, four_ranks: Callable[..., None]) -> Path:
    """Return a folder with data/, start/ (pretrained, SFT and reward model) and all runs' metrics.

    The runs are those of run_layouts.py, a folder NAME/COMMAND each.
    """
    folder = tmp_path_factory.mktemp("algorithms")
    run_layouts.one_process(folder)
    four_ranks(Path(run_layouts.__file__), folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data/ and the random reward model rm/ of tiny_ppo.config."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_ppo.make_data(folder)
    tiny_ppo.save_reward_model(folder, tiny_ppo.mesh_of(tiny_ppo.config(folder)))
    return folder


@pytest.fixture
def build(tiny: Path) -> Iterator[Callable[..., PPO]]:
    """Return `build(section={...})`, which builds the PPO object of a tiny run.

    Its attribute `first_prompts` has the prompts of the first iteration.
    """

    def make(**sections: dict[str, Any]) -> PPO:
        chosen = tiny_ppo.config(tiny, **sections)
        ppo, prompts = tiny_ppo.build(tiny_ppo.mesh_of(chosen), chosen)
        first = [prompt for micro_batch in prompts for prompt in micro_batch]
        ppo.first_prompts = first  # type: ignore[attr-defined]
        ppo.first_tokens = [prompt.tokens for prompt in first]  # type: ignore[attr-defined]
        return ppo

    yield make
    meshes.finalize()  # process groups keep threads
