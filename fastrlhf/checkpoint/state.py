"""State of a checkpoint in addition to weights: optimizer state, counts, and random generators.

Adam's moments and fp32 masters go into the shard files by parameter, whichever form of optimizer
holds them; the rest is small enough for JSON. Hyperparameters are not stored: a resumed run takes
those of its configuration.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import torch
from safetensors.torch import load_file

from fastrlhf.checkpoint.shards import SavedStage, Values
from fastrlhf.parallel.generators import set_tracker_states, tracker_states
from fastrlhf.parallel.mesh import Mesh

Tensor = torch.Tensor
_TRACKER = "tracker."


class LearnerState(TypedDict):
    """State of a model in training in addition to its tensors, for JSON."""

    updates: int
    """Updates made; overflows of fp16 do not count."""
    loss_scale: dict[str, float] | None
    """State of the fp16 loss scale; None in other dtypes."""


class SavedLearner(Protocol):
    """A model in training that can be saved."""

    @property
    def model(self) -> SavedStage:
        """This rank's stage of the model."""
        ...

    @property
    def is_sharded_over_data(self) -> bool:
        """Whether every data-parallel rank keeps its own part of the optimizer state."""
        ...

    def optimizer_values(self) -> Values:
        """Return the optimizer state of each parameter, as `shards.parts_of` takes it."""
        ...

    def state_dict(self) -> LearnerState:
        """Return the number of updates made and the fp16 loss scale."""
        ...

    def load_state_dict(self, state: LearnerState) -> None:
        """Restore what `state_dict` returned."""
        ...


def generator_states(mesh: Mesh) -> dict[str, Tensor]:
    """Return the states of torch's, megatron's, NumPy's and Python's random generators."""
    states = {_TRACKER + name: state for name, state in tracker_states().items()}
    states["cpu"] = torch.get_rng_state()
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states["numpy.keys"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    states["numpy.rest"] = torch.tensor([position, has_gauss, gauss], dtype=torch.float64)
    version, words, gauss_next = random.getstate()
    states["python.words"] = torch.tensor(words, dtype=torch.int64)
    has_next = gauss_next is not None
    states["python.rest"] = torch.tensor(
        [version, has_next, gauss_next if has_next else 0.0], dtype=torch.float64
    )
    return {name: state.clone() for name, state in states.items()}


def restore_generators(path: Path, mesh: Mesh) -> None:
    """Restore every random generator of this process from its file."""
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if mesh.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    set_tracker_states({n[len(_TRACKER) :]: s for n, s in states.items() if n.startswith(_TRACKER)})
    position, has_gauss, gauss = states["numpy.rest"].tolist()
    keys = states["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, has_next, gauss_next = states["python.rest"].tolist()
    random.setstate(
        (int(version), tuple(states["python.words"].tolist()), gauss_next if has_next else None)
    )
