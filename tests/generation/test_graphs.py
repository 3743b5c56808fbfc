"""Decode steps as graphs, with a CPU stand-in for CUDA graphs.

The stand-in records torch calls and repeats them on the same tensors. Like a CUDA graph it does not
see Python values, and it rejects calls that synchronize with the device.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrlhf.generation import SamplingParams, generate_all, graphs
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel.mesh import Mesh

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave")
CASES = {
    "greedy": SamplingParams(max_new_tokens=20, temperature=0.0),
    "sampled": SamplingParams(max_new_tokens=20, temperature=1.2, seed=4),
    "held back": SamplingParams(max_new_tokens=20, min_new_tokens=9, temperature=1.2, seed=4),
    "truncated": SamplingParams(max_new_tokens=20, top_k=40, top_p=0.9, seed=4),
}


class Recorded(TorchDispatchMode):
    """`Graph` on a CPU. Its capture runs the step once, which the protocol allows."""

    made: list[Recorded]

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        Recorded.made.append(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device: a capture would fail"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def capture(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self:
            return step()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self.calls:
            for old, new in zip(
                tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                # Views and in-place results share memory with the recorded tensor already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    Recorded.made = []
    monkeypatch.setattr(graphs, "CudaGraph", Recorded)
    monkeypatch.setattr(graphs, "can_capture", lambda mesh: True)
    monkeypatch.setattr(graphs, "MIN_CACHE_LENGTH", 16)
    return Recorded


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_replays_sample_the_same_tokens_as_steps(
    cases: ModuleType, mesh: Mesh, recorded: type[Recorded], family: str, case: str
) -> None:
    """Slots are refilled, rows move and buckets change during the run."""
    model: GPT = cases.build(family, mesh)
    prompts, params = cases.prompts(model.vocab_size), CASES[case]
    expected = generate_all(model, prompts, params, eos=cases.EOS[family], slots=5)
    assert not recorded.made
    captured = SamplingParams(**{**vars(params), "cuda_graphs": True})
    out = generate_all(model, prompts, captured, eos=cases.EOS[family], slots=5)
    assert [response.tokens for response in out] == [response.tokens for response in expected]
    for ours, eager in zip(out, expected, strict=True):
        assert ours.logprobs == pytest.approx(eager.logprobs, abs=1e-5)
        assert ours.stopped == eager.stopped
    assert len(recorded.made) >= 3  # of rows 5, 4, 2, 1 and lengths 16, 32, 51
    assert sum(graph.replays for graph in recorded.made) > 2 * len(recorded.made)


def test_a_graph_of_python_values_would_be_caught(mesh: Mesh, recorded: type[Recorded]) -> None:
    """The stand-in replays with the Python number that it captured, as a CUDA graph does."""
    number, total = [1.0], torch.zeros(())
    graph = recorded()
    graph.capture(lambda: total.add_(number[0]))
    number[0] = 10.0
    graph.replay()
    assert total.item() == 2.0
    with pytest.raises(AssertionError, match="waits for the device"):
        recorded().capture(lambda: total * total.item())
