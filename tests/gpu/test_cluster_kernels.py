"""backend="cuda", the cluster kernels, against Triton and float64 through the public ops."""

from __future__ import annotations

import pytest
import torch

import fastrlhf.ops as ops
from fastrlhf.ops.linear import linear_logprobs_ref
from fastrlhf.ops.linear_loss import linear_cross_entropy_ref, linear_ppo_loss_ref
from fastrlhf.ops.logprob import logprobs_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.backends()["cuda"]["available"], reason=str(ops.backends()["cuda"]["why_not"])
    ),
]
# Rounding of results and gradients to the dtype; in the linear ops also of logits and their
# gradients.
ROUNDINGS = 8


def data(vocab: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    n, width = 300, 64
    x = {
        "hidden": torch.randn(n, width, device="cuda").to(dtype),
        "weight": (2 * width**-0.5 * torch.randn(vocab, width, device="cuda")).to(dtype),
        "labels": torch.randint(vocab, (n,), device="cuda"),
        "mask": torch.rand(n, device="cuda") > 0.2,
        "advantages": torch.randn(n, device="cuda"),
    }
    now = linear_logprobs_ref(x["hidden"].double(), x["weight"].double(), x["labels"]).logprobs
    x["old"] = (
        now + 0.5 * torch.randint(-1, 2, (n,), device="cuda")
    ).float()  # no ratio near a border of the clip
    return x


def results(op: str, x: dict[str, torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Return [values, gradients]; backend "float64" is the plain torch reference."""
    exact = backend == "float64"
    h, w = leaves = [x[k].double() if exact else x[k].clone() for k in ("hidden", "weight")]
    for leaf in leaves:
        leaf.requires_grad_()
    labels, mask, options = x["labels"], x["mask"], {} if exact else {"backend": backend}
    if op == "linear_cross_entropy":
        call = linear_cross_entropy_ref if exact else ops.linear_cross_entropy
        values = [call(h, w, labels, mask, **options)]
    elif op == "linear_ppo_loss":
        call = linear_ppo_loss_ref if exact else ops.linear_ppo_loss
        values = [
            call(h, w, labels, x["old"], x["advantages"], mask, entropy_coef=0.1, **options).loss
        ]
    else:
        entropy = {} if exact else {"with_entropy": True}
        if op == "logprobs":  # the same logits for all: those of this dtype
            logits = (
                (x["hidden"] @ x["weight"].T).double() if exact else x["hidden"] @ x["weight"].T
            )
            leaves = [logits.requires_grad_()]
            tokens = (logprobs_ref if exact else ops.logprobs)(
                logits, labels, mask=mask, **entropy, **options
            )
        else:
            recompute = {} if exact else {"recompute": True}
            call = linear_logprobs_ref if exact else ops.linear_logprobs
            tokens = call(h, w, labels, mask=mask, **entropy, **recompute, **options)
        values = list(tokens[:3])
    upstream = [torch.ones_like(v) if v.dim() == 0 else x["advantages"].to(v.dtype) for v in values]
    return [v.detach() for v in values] + list(torch.autograd.grad(values, leaves, upstream))


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    gap = torch.linalg.vector_norm(ours.double() - exact) / torch.linalg.vector_norm(exact)
    assert not torch.isnan(gap)
    return float(gap)


@pytest.mark.parametrize(
    "op", ["logprobs", "linear_logprobs", "linear_cross_entropy", "linear_ppo_loss"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [507, 50257, 128256])
def test_as_exact_as_triton(op, dtype, vocab):
    x = data(vocab, dtype)
    exact, cuda, triton = (results(op, x, backend) for backend in ("float64", "cuda", "triton"))
    bound = max(ROUNDINGS * torch.finfo(dtype).eps, 1e-5)
    for truth, ours, other in zip(exact, cuda, triton, strict=True):
        assert ours.dtype == other.dtype
        assert error(ours, truth) <= 1.5 * error(other, truth) + bound / 4
        assert error(ours, truth) <= bound


def test_a_masked_row_is_never_read():
    x = data(1003, torch.bfloat16)
    x["hidden"][~x["mask"]] = torch.nan
    x["labels"][~x["mask"]] = -100
    for op in ("logprobs", "linear_cross_entropy", "linear_ppo_loss"):
        assert all(bool(t.isfinite().all()) for t in results(op, x, "cuda"))
