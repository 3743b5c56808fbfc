"""A reward model's step with its prompt encoded once, compared with one sequence per response.

    python -m bench shared-prompt --threads 2

One prompt with K ranked responses, the same weights and tokens on both sides; both are packed
micro-batches as the trainer makes them and end in the pairwise loss. Losses and gradients are
compared before timing. The two run in turn, so that a busy machine disturbs both, and ratios are of
neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.machine import timed
from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.data.batches import RankingBatch, TokenizedRanking, pack_rankings
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.ops import pairwise_ranking_loss
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh


def build(args: argparse.Namespace, mesh: Mesh) -> GPT:
    model = ModelConfig(
        family=args.family,
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=max(args.hidden // 64, 1),
        ffn_size=4 * args.hidden,
        max_positions=args.prompt + args.response,
        dtype=args.dtype,
    )
    return build_model(model, mesh, args.vocab, head="scalar", seed=1)


def make_batch(args: argparse.Namespace, mesh: Mesh, shared_prompt: bool) -> RankingBatch:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(args.vocab, (length,), generator=generator).tolist()

    ranking = TokenizedRanking(
        draw(args.prompt), [draw(args.response) for _ in range(args.k)], list(range(args.k))
    )
    return pack_rankings([ranking], shared_prompt=shared_prompt).to(mesh.device)


def step_of(stage: GPT, batch: RankingBatch) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        stage.zero_grad()
        scores = stage.score(stage(batch)[batch.last_index])
        loss = pairwise_ranking_loss(scores, batch.ranks, batch.prompt_offsets).loss
        loss.backward()
        return loss.detach()

    return step


def check(stage: GPT, steps: dict[str, Callable[[], torch.Tensor]]) -> float:
    """Return the largest gradient difference relative to the parameter's largest gradient."""
    gradients = []
    for step in steps.values():
        step()
        gradients.append([p.grad.float().clone() for p in stage.parameters() if p.grad is not None])
    return max(
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(*gradients, strict=True)
        if b.abs().max() > 1e-6
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench shared-prompt", description=str(__doc__).splitlines()[0]
    )
    sizes = {"prompt": 512, "k": 9, "response": 64, "layers": 4, "hidden": 256, "vocab": 8192}
    for name, default in {**sizes, "threads": 2, "repeats": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--family", choices=("gpt", "llama"), default="gpt")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    stage = build(args, mesh).train()
    batches = {name: make_batch(args, mesh, name == "shared") for name in ("shared", "separate")}
    steps = {name: step_of(stage, batch) for name, batch in batches.items()}
    difference = check(stage, steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(timed(step, mesh.device)[1])
    ratios = sorted(b / a for a, b in zip(times["shared"], times["separate"], strict=True))
    print(
        f"prompt {args.prompt}, K = {args.k} responses of {args.response}; {args.family},"
        f" {args.layers} layers x",
        end=" ",
    )
    print(
        f"{args.hidden}, {args.dtype}, {mesh.device.type}, {args.threads} threads; gradients differ"
        f" by {difference:.1e}"
    )
    for name, batch in batches.items():
        median = statistics.median(times[name])
        print(
            f"{name:9} {batch.tokens.numel():6} tokens  {1e3 * median:8.1f} ms a step "
            f"({1e3 * min(times[name]):.1f} .. {1e3 * max(times[name]):.1f})"
        )
    tokens = batches["separate"].tokens.numel() / batches["shared"].tokens.numel()
    print(
        f"ratio     {statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}); of the"
        f" tokens {tokens:.2f}"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {**vars(args), "json": str(args.json)}, "seconds": times})
        )
    meshes.finalize()
    return 0
