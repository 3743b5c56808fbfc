"""The counters agree with torch's, with the tensors of a real model, and with hand counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import flops
from bench.flops import Work
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.data.batches import TokenizedRanking, pack, pack_rankings
from fastrlhf.generation.memory import row_bytes
from fastrlhf.models.gpt import build_model
from fastrlhf.parallel import mesh as meshes

V = 256  # a multiple of 128: no columns of padding, which the counters leave out
SHAPES = {
    "gpt": {"family": "gpt"},
    "llama": {"family": "llama", "ffn_size": 96, "num_kv_heads": 2},
}


def model(family: str) -> ModelConfig:
    return ModelConfig(
        **SHAPES[family], num_layers=2, hidden_size=64, num_heads=4, max_positions=32, dtype="fp32"
    )


@pytest.fixture(scope="module")
def mesh():
    yield meshes.initialize(ParallelConfig(), seed=1)
    meshes.finalize()


@pytest.mark.parametrize("family", list(SHAPES))
def test_a_training_step_as_torch_counts_it(mesh, family):
    stage = build_model(model(family), mesh, V, seed=1).train()
    B, T, prompt = 3, 16, 5
    batch = pack(torch.randint(V, (B, T)).tolist(), [prompt] * B)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = stage(batch)
        forward = counter.get_total_flops()
        (hidden[batch.loss_mask] @ stage.lm_head()["weight"].T).sum().backward()
    work = flops.work_of(batch)
    assert work == Work(B * T, B * T * (T + 1) // 2, B * (T - prompt))
    whole = Work(
        work.tokens, B * T * T, work.counted
    )  # torch's product of scores makes the masked ones too
    assert forward == flops.forward_flops(model(family), Work(whole.tokens, whole.pairs), V)
    assert counter.get_total_flops() == flops.training_flops(model(family), whole, V)


def test_decoding_reads_the_weights_and_the_cache(mesh):
    stage = build_model(model("llama"), mesh, V, seed=1)
    weights = (
        sum(p.numel() for p in stage.decoder.parameters() if p.dim() == 2)
        + stage.lm_head()["weight"].numel()
    )
    assert flops.matrix_entries(model("llama")) + 64 * V == weights
    prompts, response = [3, 7], 4
    cache = sum(row_bytes(stage, P + step) for P in prompts for step in range(1, response))
    assert flops.decode_bytes(model("llama"), prompts, response, V) == 3 * 4 * weights + cache


def test_a_rollout_is_one_pass_over_what_it_read():
    P, R = 6, 5
    whole = flops.prefill([P]) + flops.decode([P], R)
    assert whole == Work(P + R - 1, (P + R - 1) * (P + R) // 2, R)
    assert flops.decode([P, 2 * P], R) == flops.decode([P], R) + flops.decode([2 * P], R)
    assert flops.prefill([P]) * 3 == flops.prefill([P] * 3)


def test_a_prompt_that_is_shared_counts_once():
    rankings = [
        TokenizedRanking([1] * 5, [[2] * 3, [3] * 4], [0, 1]),
        TokenizedRanking([1], [[2], [3], [4] * 2], [0, 1, 2]),
    ]
    shared, repeated = (
        flops.work_of(pack_rankings(rankings, shared_prompt=s)) for s in (True, False)
    )
    assert shared == Work(
        5 + 3 + 4 + 1 + 1 + 1 + 2, 15 + (15 + 6) + (20 + 10) + 1 + 2 + 2 + (2 + 3)
    )
    assert repeated == Work(8 + 9 + 2 + 2 + 3, 36 + 45 + 3 + 3 + 6)
