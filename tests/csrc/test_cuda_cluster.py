"""The sm_90 cluster kernels against torch in float64; needs a GPU and fastrlhf._C_cuda."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fastrlhf.ops import logprob_kernels as logprob_op
from fastrlhf.ops.layouts import SoftmaxStatistic

pytestmark = pytest.mark.gpu
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def cuda() -> ModuleType:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a GPU of compute capability 9.0 or more")
    pytest.importorskip("fastrlhf._C_cuda", reason="the extension fastrlhf._C_cuda is not built")
    return torch.ops.fastrlhf_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("v", "columns"), [(1, 1), (7, 7), (252, 252), (513, 507), (50257, 50257), (128256, 128000)]
)
@pytest.mark.parametrize("inplace", [True, False])
def test_one_pass_gives_the_statistics_and_the_gradient(
    cuda: ModuleType, v: int, columns: int, inplace: bool, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(v)
    whole = (torch.randn(2, 4, v, generator=g) * 3).to(dtype)
    whole[0, 1, : columns // 3] = -torch.inf
    rows = whole[:, 1:]  # rows begin at any alignment
    labels = torch.randint(0, columns, (6,), generator=g)
    labels[3] = -100
    mask = torch.tensor([True, True, True, False, True, True])
    grads = [torch.randn(6, generator=g) for _ in range(3)]
    temperature = 0.7

    wide = rows.double()
    want = logprob_op._statistics_torch(wide, labels, mask, temperature, 0, columns)
    _, entropy, _ = logprob_op.finish_statistics(want, mask, temperature)
    truth = torch.empty_like(wide)
    saved = logprob_op.SavedRow(
        want[SoftmaxStatistic.ROW_MAX], want[SoftmaxStatistic.ROW_SUM], entropy
    )
    upstream = logprob_op.TokenGrads(*(t.double() for t in grads))
    logprob_op._backward_torch(wide, labels, mask, saved, upstream, temperature, 0, columns, truth)

    device_rows = whole.cuda()[:, 1:]
    out = device_rows if inplace else torch.full_like(rows, torch.nan, device="cuda")
    there = [t.cuda() for t in (labels, mask, *grads)]
    alone = cuda.logprob_statistics(device_rows, *there[:2], temperature, 0, columns)
    stats = cuda.logprob_forward_backward(device_rows, *there, temperature, 0, columns, out)
    assert torch.equal(alone, stats)
    stats = stats.double().cpu()
    torch.testing.assert_close(stats[:, mask], want[:, mask], rtol=16 * EPS, atol=64 * EPS)
    error = (out.double().cpu() - truth).abs()
    assert (
        error <= torch.finfo(dtype).eps * truth.abs() + 256 * EPS + torch.finfo(dtype).tiny
    ).all()
    assert (out.reshape(6, v)[3] == 0).all() and (out[..., columns:] == 0).all()
