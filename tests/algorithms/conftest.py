"""Runs of one process and one launch of four ranks, shared by all tests of the algorithms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

import run_layouts
import tiny_ppo

from fastrlhf.parallel import mesh as meshes

SCRIPT = Path(__file__).with_name("run_layouts.py")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, four_ranks: Callable[..., None]) -> Path:
    """A folder with data/, start/ (pretrained, SFT and reward model) and the metrics of every layout."""
    folder = tmp_path_factory.mktemp("algorithms")
    run_layouts.one_process(folder)
    four_ranks(SCRIPT, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and the random reward model rm/ of tiny_ppo.config."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_ppo.make_data(folder)
    tiny_ppo.save_reward_model(folder, tiny_ppo.mesh_of(tiny_ppo.config(folder)))
    return folder


@pytest.fixture
def build(tiny: Path) -> Iterator[Callable[..., Any]]:
    """build(section={...}) -> the PPO object of a tiny run, its prompts in `first_prompts`."""

    def make(**sections: dict[str, Any]) -> Any:
        chosen = tiny_ppo.config(tiny, **sections)
        ppo, prompts = tiny_ppo.build(tiny_ppo.mesh_of(chosen), chosen)
        ppo.first_prompts = [prompt for micro_batch in prompts for prompt in micro_batch]
        return ppo

    yield make
    meshes.finalize()  # groups of processes keep threads
