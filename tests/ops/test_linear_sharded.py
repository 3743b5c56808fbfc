"""Sharded vocabularies in many small chunks, on 2, 3 and 4 gloo ranks: the linear losses equal those of one process.

test_sharded.py covers every op in one chunk; here the statistics of a chunk travel while the next one is made. Run as
`python test_linear_sharded.py RANK STORE_FILE OUT_FILE`, this file is one of the four ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastrlhf.ops import linear_cross_entropy, linear_logprobs, linear_ppo_loss

VOCAB, HIDDEN, TOKENS = 53, 5, 17  # 53 divides by no group size
SIZES, OPS, KINDS = (2, 3, 4), ("cross_entropy", "ppo_loss", "logprobs"), ("uneven", "padded")
CHECKS = [f"{size}-{op}-{kind}" for size in SIZES for op in OPS for kind in KINDS]

pytestmark = pytest.mark.usefixtures("torch_only")


def loss(op: str, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    labels, x = torch.randint(0, VOCAB, (TOKENS,), generator=g), torch.randn(TOKENS, generator=g)
    mask = torch.rand(TOKENS, generator=g) > 0.2
    if op == "cross_entropy":
        return linear_cross_entropy(h, w, labels, mask, bias=b, temperature=0.8, **options)
    if op == "ppo_loss":
        return linear_ppo_loss(h, w, labels, x - 4, x, mask, bias=b, entropy_coef=0.1, **options).loss
    tokens = linear_logprobs(h, w, labels, bias=b, mask=mask, with_entropy=True, recompute=True, **options)
    return (tokens.logprobs * x + tokens.entropy).sum()


def check(op: str, kind: str, group: dist.ProcessGroup) -> None:
    g = torch.Generator().manual_seed(1)
    whole = [torch.randn(*s, generator=g).requires_grad_() for s in ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))]
    size, rank = group.size(), group.rank()
    if kind == "padded":  # the budget allows 3 rows, counted at ceil(53 / size) columns on every rank
        edges = [i * (-(-VOCAB // size) + 2) for i in range(size + 1)]
        options = {"group": group, "vocab_size": VOCAB}
        os.environ["FASTRLHF_LINEAR_BUDGET_MB"] = str(3 * -(-VOCAB // size) * 4 / 2**20)
    else:  # no rank knows the others' widths: CPU_ROWS decides
        edges = [VOCAB * i // size - (i % size > 0) for i in range(size + 1)]
        options = {"group": group, "vocab_start": edges[rank]}
        os.environ["FASTRLHF_LINEAR_BUDGET_MB"] = ""
    width = edges[rank + 1] - edges[rank]
    real = max(0, min(width, VOCAB - edges[rank]))

    def cut(x: torch.Tensor) -> torch.Tensor:
        mine = x.detach()[edges[rank] : edges[rank] + width]
        return torch.cat([mine, mine.new_full((width - len(mine), *mine.shape[1:]), 77.0)])

    shard = [whole[0].detach().clone().requires_grad_(), *(cut(t).requires_grad_() for t in whole[1:])]
    expected, ours = loss(op, *whole), loss(op, *shard, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
    wanted, grads = torch.autograd.grad(expected, whole), torch.autograd.grad(ours, shard)
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-5, atol=2e-6)
    for grad, full in zip(grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(grad[:real], cut(full)[:real], rtol=1e-5, atol=2e-6)
        assert not bool(grad[real:].any())


def main(rank: int, store: str, out: str) -> None:
    from fastrlhf.ops import linear_chunks

    torch.set_num_threads(1)
    linear_chunks.CPU_ROWS = 3
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    errors: dict[str, str | None] = {}
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        for op in OPS if rank < size else ():
            for kind in KINDS:
                try:
                    check(op, kind, group)
                    errors[f"{size}-{op}-{kind}"] = None
                except (AssertionError, RuntimeError, ValueError):
                    errors[f"{size}-{op}-{kind}"] = traceback.format_exc()
    Path(out).write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("linear_sharded")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(r), str(folder / "store"), str(folder / f"{r}.json")], env=env)
        for r in range(4)
    ]
    try:
        codes = [p.wait(timeout=180) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert codes == [0, 0, 0, 0]
    found: dict[str, list[str]] = {}
    for r in range(4):
        for name, error in json.loads((folder / f"{r}.json").read_text()).items():
            found.setdefault(name, []).extend([f"rank {r}: {error}"] if error else [])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_small_chunks_on_shards_equal_the_whole(name, errors):
    assert errors[name] == [], "\n".join(errors[name])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
