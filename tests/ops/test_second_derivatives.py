"""Second derivatives of the ops raise: their gradients are constants to autograd, not zeros."""

from __future__ import annotations

import pytest
import torch

from fastrlhf import ops
from fastrlhf.ops.collectives import _all_reduce_sum

LABELS, MASK = torch.tensor([1, 4, 6]), torch.tensor([True, True, False])


def _linear(call, *constants, **options):
    return lambda x: call(x, x.new_ones(7, x.shape[-1]), LABELS, *constants, MASK, **options)


CASES = {
    "token_logprobs": lambda x: ops.logprobs(x, LABELS).logprobs.square().sum(),
    "inplace": lambda x: ops.logprobs(x * 1, LABELS, inplace_backward=True).logprobs.square().sum(),
    "entropy": lambda x: ops.logprobs(x, LABELS, with_entropy=True).entropy.sum(),
    "logits_kl": lambda x: ops.logits_kl(x, x.detach().flip(0)).sum(),
    "linear_logprobs": lambda x: ops.linear_logprobs(x, x.new_ones(7, 7), LABELS).logprobs.sum(),
    "linear_cross_entropy": _linear(ops.linear_cross_entropy),
    "linear_ppo_loss": lambda x: (
        _linear(ops.linear_ppo_loss, x.new_zeros(3), x.new_ones(3))(x).loss
    ),
    "ppo_loss": lambda x: ops.ppo_loss(x[:, 0], x[:, 0].detach(), x[:, 1].detach(), MASK).loss,
    "ranking_loss": lambda x: (
        ops.pairwise_ranking_loss(x[:, 0], torch.arange(3), torch.tensor([0, 3])).loss
    ),
    "all_reduce_sum": lambda x: _all_reduce_sum(x.square(), "").sum(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused(name, torch_only):
    x = torch.randn(3, 7, requires_grad=True)
    expected = torch.autograd.grad(CASES[name](x), x)[0]
    (gradient,) = torch.autograd.grad(CASES[name](x), x, create_graph=True)
    assert torch.equal(gradient, expected)
    # with a term that has one, as in a gradient penalty: a constant would count as zero there
    with pytest.raises(RuntimeError, match=r"fastrlhf::\w+ has no second derivative"):
        (gradient.square().sum() + x.square().sum()).backward()


def test_each_registered_gradient_is_tried():
    """Except ops without a gradient, and linear_loss, which both linear losses call."""
    library = torch.ops.fastrlhf
    differentiable = {
        n
        for n in dir(library)
        if not n.startswith("_") and not n.endswith(("_backward", "_backward_"))
    }
    assert differentiable - {"gae", "shaped_gae", "linear_loss", "name"} <= set(CASES)


def test_ops_differentiated_by_autograd_have_one(torch_only):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask, ref = torch.rand(3, 4) > 0.3, torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda t: ops.masked_whiten(t, mask), (x,))
    assert torch.autograd.gradgradcheck(lambda t: ops.token_kl(t, ref, "k2"), (x,))


def test_other_second_derivatives_may_share_the_graph(torch_only):
    """create_graph is harmless: only the path through an op raises."""
    x, y = torch.randn(3, 7, requires_grad=True), torch.randn(3, requires_grad=True)
    loss = ops.logprobs(x, LABELS).logprobs.sum() + y.pow(3).sum()
    _, gradient = torch.autograd.grad(loss, (x, y), create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), y)[0], 6 * y)
