"""The time model against published tables, and against its own identities."""

from __future__ import annotations

import statistics

import pytest
from published_speeds import KORTHIKANTI, LENGTH, NARAYANAN, VOCABULARY, Row

from fastrlhf.plan.hardware import load_hardware, names
from fastrlhf.plan.layout import Layout
from fastrlhf.plan.timing import Recompute, Shape, Timing


def seconds(row: Row, recompute: Recompute, *, sequence: bool) -> float:
    """Return the predicted seconds of an iteration on the papers' A100s; no flash attention."""
    shape = Shape(
        row.layers,
        row.hidden,
        row.heads,
        row.heads,
        row.hidden // row.heads,
        4 * row.hidden,
        gated=False,
        vocab=VOCABULARY,
    )
    data = row.gpus // (row.tensor * row.pipeline)
    layout = Layout(row.tensor, row.pipeline, data, sequence, row.chunks)
    timing = Timing(shape, layout, load_hardware("a100-80gb"), flash=False)
    tokens, count = row.micro_batch * LENGTH, row.batch // (data * row.micro_batch)
    return timing.training(tokens, LENGTH, count, recompute) + timing.optimizer(is_sharded=False)


def operations(row: Row) -> float:
    """Return the operations of an iteration with recomputation: equation 3 of Narayanan et al."""
    h, layers = row.hidden, row.layers
    inner = 1 + LENGTH / (6 * h) + VOCABULARY / (16 * layers * h)
    return 96 * row.batch * LENGTH * layers * h**2 * inner


def test_narayanan_2021():
    errors = [
        operations(row) / seconds(row, "full", sequence=False) / row.gpus / 1e12 / reached - 1
        for row, reached in NARAYANAN
    ]
    assert statistics.fmean(map(abs, errors)) < 0.08, errors
    assert max(map(abs, errors)) < 0.17, errors


def test_korthikanti_2022():
    errors = []
    for row, full, selective in KORTHIKANTI:
        errors.append(seconds(row, "full", sequence=False) / full - 1)
        errors.append(seconds(row, "selective", sequence=True) / selective - 1)
    assert statistics.fmean(map(abs, errors)) < 0.08, errors
    assert max(map(abs, errors)) < 0.17, errors


def test_bubble():
    """(p - 1) / (m v + p - 1) of the time: Narayanan et al. 2021, section 2.2."""
    shape = Shape(16, 64, 4, 4, 16, 256, gated=False, vocab=100)
    timing = Timing(shape, Layout(1, 16, 1, False), load_hardware("h200"))
    assert timing.bubble(8) == pytest.approx(15 / 23)
    chunks = Timing(shape, Layout(1, 16, 1, False, virtual=5), load_hardware("h200"))
    assert chunks.bubble(8) == pytest.approx(3 / 11)


def test_decode_is_bound_by_reading_weights_and_cache():
    """A large model with few rows takes what its bytes take at the reached bandwidth."""
    gpu = load_hardware("h100-80gb")
    shape = Shape(40, 8192, 64, 64, 128, 32768, gated=False, vocab=50257)
    timing = Timing(shape, Layout(1, 1, 1, False), gpu)
    cached = 2 * 40 * 16 * 1000 * 8192
    bound = 2 * (shape.weights + cached) / (gpu.memory_gb_s * 1e9)
    assert bound < timing.decode_step(16, 1000) < 1.5 * bound


@pytest.mark.parametrize("name", names())
def test_hardware_files_have_sources(name):
    gpu = load_hardware(name)
    assert 0.1 < gpu.memory_gb_s / gpu.peak_tflops < 20
