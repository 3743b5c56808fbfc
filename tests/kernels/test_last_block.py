"""The counters of launches that end with a sum over all blocks: their sharing and memory."""

from __future__ import annotations

import importlib
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
last_block = importlib.import_module("fastrlhf.kernels.last_block")
LIKE = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))


@pytest.fixture
def streams(monkeypatch):
    """Fake a GPU: .now is the current stream, .capturing whether a graph is captured on it."""
    state = SimpleNamespace(now="first", capturing=False, threads=[])

    def zero(like):
        state.threads.append(threading.get_ident())
        return torch.zeros(1, dtype=torch.int32)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(last_block, "_COUNTERS", {})
    monkeypatch.setattr(last_block, "_zero", zero)
    return state


def test_a_stream_keeps_its_counter_and_shares_it_with_no_other(streams):
    first = last_block.arrivals(LIKE)
    assert last_block.arrivals(LIKE) is first
    streams.now = "second"
    assert last_block.arrivals(LIKE) is not first


def test_a_graph_has_its_own_counter(streams):
    """A counter made during a capture is zeroed by that graph's replay only: none may share it."""
    streams.capturing = True
    first, second = last_block.arrivals(LIKE), last_block.arrivals(LIKE)
    assert first is not second
    streams.capturing = False
    assert all(last_block.arrivals(LIKE) is not t for t in (first, second))


def test_counters_that_stay_are_allocated_by_another_thread(streams):
    """The warm-up of a CUDA graph takes this thread's allocations from the graph's memory pool.

    torch.compile raises for those that are still alive afterwards.
    """
    last_block.arrivals(LIKE)
    assert streams.threads and threading.get_ident() not in streams.threads
