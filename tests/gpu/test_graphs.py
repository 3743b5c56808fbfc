"""The ops in graphs of torch.compile, compiled for the GPU, and in CUDA graphs, replayed."""

from __future__ import annotations

import pytest
import torch

import fastrlhf.ops as ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
N, V, H, B, T = 96, 1003, 64, 8, 12


def batch() -> dict[str, torch.Tensor]:
    """Return tokens as [B, T] and as [N]; all leaves fp32, so that both ways round alike."""
    x = {
        "logits": 2 * torch.randn(B, T, V, device=CUDA),
        "hidden": torch.randn(B, T, H, device=CUDA),
        "weight": torch.randn(V, H, device=CUDA) * H**-0.5,
        "values": torch.randn(B, T, device=CUDA),
        "old": -3 - torch.rand(B, T, device=CUDA),
        "scores": torch.randn(B, device=CUDA),
        "labels": torch.randint(V, (B, T), device=CUDA),
        "mask": torch.rand(B, T, device=CUDA) > 0.2,
        "ranks": torch.randint(4, (B,), device=CUDA),
        "offsets": torch.arange(0, B + 1, 4, device=CUDA),
    }
    return {k: v.requires_grad_() if k in LEAVES else v for k, v in x.items()}


LEAVES = ("logits", "hidden", "weight", "values")


def step(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return one loss, the sum of every op."""
    mask, labels = x["mask"], x["labels"]
    token = ops.logprobs(x["logits"], labels, mask=mask, with_entropy=True, ref_logprobs=x["old"])
    linear = ops.linear_logprobs(
        x["hidden"], x["weight"], labels, mask=mask, with_entropy=True, recompute=True
    )
    targets = ops.rollout_targets(
        x["scores"], x["old"], x["old"] - 0.1, x["values"], mask, kl_coef=0.1
    )
    advantages, returns = ops.gae(x["old"], x["values"], mask)
    loss = ops.ppo_loss(
        token.logprobs,
        x["old"],
        targets.advantages,
        mask,
        values=x["values"],
        old_values=x["values"].detach() + 0.1,
        returns=returns,
        entropy=token.entropy,
        entropy_coef=0.01,
    ).loss
    loss = (
        loss
        + ops.linear_ppo_loss(x["hidden"], x["weight"], labels, x["old"], advantages, mask).loss
    )
    loss = loss + ops.linear_cross_entropy(x["hidden"], x["weight"], labels, mask) + token.kl.mean()
    loss = (
        loss
        + ops.logits_kl(x["logits"], x["logits"].detach() * 0.5, mask=mask).mean()
        + linear.entropy.mean()
    )
    return loss + ops.pairwise_ranking_loss(token.logprobs[:, 0], x["ranks"], x["offsets"]).loss


def loss_and_gradients(function, x):
    loss = function(x)
    return [loss.detach(), *torch.autograd.grad(loss, [x[n] for n in LEAVES])]


def test_compiled_for_the_gpu():
    torch._dynamo.reset()
    x = batch()
    eager = loss_and_gradients(step, x)
    compiled = loss_and_gradients(torch.compile(step, fullgraph=True), x)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_captured_once_and_replayed_on_other_data():
    static = batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_and_gradients(step, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(step, static)
    for _ in range(2):
        fresh = batch()
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(fresh[name])
        for tensor in captured:
            tensor.fill_(float("nan"))  # what the replay does not write stays wrong
        graph.replay()
        for a, b in zip(captured, loss_and_gradients(step, fresh), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("repeat", [20])
def test_results_do_not_change_from_run_to_run(repeat):
    """No atomic additions of floats, no race: the same bits each time."""
    x = batch()
    first = loss_and_gradients(step, x)
    for _ in range(repeat):
        for a, b in zip(loss_and_gradients(step, x), first, strict=True):
            assert torch.equal(a, b)


def scalar_losses(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of the ops that end with a sum over the blocks of their launch."""
    logp = torch.log_softmax(x["logits"], -1)[..., 0]
    ranking = ops.pairwise_ranking_loss(logp[:, 0], x["ranks"], x["offsets"])
    return ops.ppo_loss(logp, x["old"], x["values"].detach(), x["mask"]).loss + ranking.loss


def test_graphs_of_torch_compile():
    """mode="reduce-overhead" warms up in a graph's memory pool, where ops may keep no memory."""
    torch._dynamo.reset()
    x = batch()
    compiled = torch.compile(scalar_losses, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        expected = scalar_losses(x)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), expected)


def test_graphs_replayed_in_another_order_than_captured():
    x = batch()
    with torch.no_grad():
        expected = scalar_losses(x)
        graphs, results = [torch.cuda.CUDAGraph() for _ in range(2)], []
        for graph in graphs:
            with torch.cuda.graph(graph):
                results.append(scalar_losses(x))
        for graph, result in reversed(list(zip(graphs, results, strict=True))):
            for _ in range(2):
                result.fill_(float("nan"))
                graph.replay()
                torch.testing.assert_close(result, expected)
