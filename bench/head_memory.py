"""python -m bench head-memory: memory of the LM head's losses in a trainer.

One micro-batch of SFT and one of PPO, forward and backward of a model on packed sequences, once as
the trainers run them and once with `ops.linear_*` replaced by plain torch on [T, V] logits. Losses
and gradients of the two are compared. Memory is the peak of torch's allocator above its level
before the step (weights, gradient buffers).
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Candidate, peak_extra_bytes
from fastrlhf import ops
from fastrlhf.algorithms.sft import language_loss
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.data.batches import PackedBatch, pack
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.ops.logprob import TokenLogprobs
from fastrlhf.ops.ppo import PPOLoss, ppo_loss_ref
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh


def _tokens(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Any = None,
    num_counted: int | None = None,
) -> TokenLogprobs:
    """Return log-probs and entropies from whole logits; the vocabulary must be in one process."""
    if group is not None:
        raise ValueError(
            "group: got a process group, expected None: whole logits are made in one process only"
        )
    logp = torch.log_softmax(F.linear(hidden, weight[:vocab_size]).float() / temperature, -1)
    chosen = logp.gather(-1, torch.where(mask, labels, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    chosen, entropy = (torch.where(mask, t, 0.0) for t in (chosen, entropy))
    return TokenLogprobs(chosen, entropy, torch.zeros_like(chosen), None)


def _cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, denominator: Tensor, **head: Any
) -> Tensor:
    return -_tokens(hidden, weight, labels, mask, **head).logprobs.sum() / denominator


def _ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor,
    clip: float,
    entropy_coef: float,
    **head: Any,
) -> PPOLoss:
    tokens = _tokens(hidden, weight, labels, mask, **head)
    return ppo_loss_ref(
        tokens.logprobs,
        old_logprobs,
        advantages,
        mask,
        clip=clip,
        entropy=tokens.entropy,
        entropy_coef=entropy_coef,
        denominator=denominator,
    )


@contextlib.contextmanager
def materialising() -> Iterator[None]:
    """Replace the linear ops by whole logits inside the block."""
    plain = {
        "linear_logprobs": _tokens,
        "linear_cross_entropy": _cross_entropy,
        "linear_ppo_loss": _ppo_loss,
    }
    with mock.patch.multiple(ops, **plain):
        yield


def make_batch(args: argparse.Namespace, mesh: Mesh) -> PackedBatch:
    """Return sequences of `length` tokens, the first half of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    count = args.tokens // args.length
    sequences = torch.randint(args.vocab, (count, args.length), generator=generator).tolist()
    return pack(sequences, [args.length // 2] * count).to(mesh.device)


def losses(stage: GPT, batch: PackedBatch) -> dict[str, Callable[[], Tensor]]:
    """Return, for each trainer, a function that runs forward and backward and returns the loss."""
    generator = torch.Generator().manual_seed(1)
    count = batch.loss_mask.sum().float()
    noise = torch.randn(2, batch.tokens.numel(), generator=generator).to(batch.tokens.device)
    with torch.no_grad():
        old = ops.linear_logprobs(
            stage(batch), labels=batch.labels, mask=batch.loss_mask, **stage.lm_head()
        ).logprobs
    old = old + 0.1 * noise[0]

    def sft() -> Tensor:
        return language_loss(stage, stage(batch), batch, count)

    def ppo() -> Tensor:
        return ops.linear_ppo_loss(
            stage(batch),
            labels=batch.labels,
            old_logprobs=old,
            advantages=noise[1],
            mask=batch.loss_mask,
            clip=0.2,
            entropy_coef=0.0,
            denominator=count,
            **stage.lm_head(),
        ).loss

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = loss_of()
            loss.backward()
            return loss.detach()

        return run

    return {"SFT": step(sft), "PPO": step(ppo)}


def measure(
    stage: GPT, step: Callable[[], Tensor], device: torch.device
) -> tuple[float, Tensor, int]:
    """Return (loss, gradient norms by parameter, bytes) of one step.

    Gradient buffers exist beforehand, as in the trainers.
    """
    for parameter in stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = float(step())
    norms = torch.stack([p.grad.double().norm() for p in stage.parameters() if p.grad is not None])
    return loss, norms, peak_extra_bytes(Candidate("", lambda: None, lambda _: step()), device)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench head-memory", description=str(__doc__).splitlines()[0]
    )
    sizes = {
        "tokens": 2048,
        "length": 256,
        "layers": 2,
        "hidden": 256,
        "vocab": 50257,
        "threads": 2,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    model = ModelConfig(
        family="gpt",
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=max(args.hidden // 64, 1),
        max_positions=args.length,
        dtype=args.dtype,
    )
    stage = build_model(model, mesh, args.vocab, seed=1).train()
    batch = make_batch(args, mesh)
    logits = args.tokens * args.vocab * (4 if args.dtype == "fp32" else 2)
    shape = f"{args.tokens} tokens, half of them counted; {args.layers} layers x {args.hidden}"
    print(
        f"{shape}, vocabulary {args.vocab}, {args.dtype}; whole logits would be"
        f" {logits / 1e6:.0f} MB"
    )
    for name, step in losses(stage, batch).items():
        ours = measure(stage, step, mesh.device)
        with materialising():
            whole = measure(stage, step, mesh.device)
        off = abs(ours[0] - whole[0]) / abs(whole[0])
        off_gradients = float(((ours[1] - whole[1]).abs() / whole[1].clamp(min=1e-12)).max())
        print(
            f"{name}: {ours[2] / 1e6:.0f} MB with the linear ops, {whole[2] / 1e6:.0f} MB with"
            f" whole logits; loss {ours[0]:.6f}, relative difference {off:.1e}, of a gradient's"
            f" norm at most {off_gradients:.1e}"
        )
    meshes.finalize()
    return 0
