"""Tokens per second of rollouts, compared with Hugging Face `generate` with left padding.

    python -m bench generation --threads 2

Both sides have the same weights, prompts and limits, sample at temperature 1 and decode --slots
sequences at the same time. Responses end at random, as in RLHF: the final norm and the stop token's
row are set so that each step stops with probability 1 / --mean, so lengths are geometric up to
--max-new-tokens. Ours refills a slot when its sequence ends; Hugging Face runs a batch until its
longest response ends. Response tokens up to the stop token are counted. The two run in turn, so
that a busy machine disturbs both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrlhf.config import ModelConfig, ParallelConfig
from fastrlhf.generation import SamplingParams, generate_all
from fastrlhf.models.gpt import GPT, build_model
from fastrlhf.models.hf import save_hf
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh

EOS, PAD = 0, 1


@torch.no_grad()
def build(args: argparse.Namespace, mesh: Mesh) -> GPT:
    model = ModelConfig(
        family="gpt",
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.hidden // 64 if args.hidden >= 256 else 4,
        max_positions=args.max_prompt + args.max_new_tokens,
        dtype="fp32",
    )
    stage = build_model(model, mesh, args.vocab, seed=1).eval()
    # logit(stop) = scale * (x_0 + 10), where x_0 ~ N(0, 1) is the normalised hidden state: nearly
    # the constant wanted.
    logit = math.log(args.vocab / (args.mean - 1))
    stage.decoder.final_layernorm.bias[0] = 10.0
    embedding = stage.embedding.word_embeddings.weight
    embedding[:, 0] = 0.0
    embedding[EOS] = 0.0
    embedding[EOS, 0] = logit / 10.0
    return stage


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        args.max_prompt // 8, args.max_prompt + 1, (args.prompts,), generator=generator
    ).tolist()
    return [torch.randint(2, args.vocab, (n,), generator=generator).tolist() for n in lengths]


def ours(
    stage: GPT, mesh: Mesh, prompts: list[list[int]], args: argparse.Namespace
) -> Callable[[int], list[int]]:
    def run(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=args.max_new_tokens, seed=seed)
        out = generate_all(stage, prompts, params, mesh=mesh, eos=EOS, slots=args.slots)
        return [len(response.tokens) for response in out]

    return run


def hugging_face(
    stage: GPT, prompts: list[list[int]], args: argparse.Namespace
) -> Callable[[int], list[int]]:
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_hf(stage, Path(folder) / "model")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model"
        ).eval()

    def run(seed: int) -> list[int]:
        torch.manual_seed(seed)
        counts = []
        for start in range(0, len(prompts), args.slots):
            batch = prompts[start : start + args.slots]
            longest = max(map(len, batch))
            tokens = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor(
                [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
            )
            with torch.no_grad():
                out = model.generate(
                    tokens,
                    attention_mask=mask,
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=args.max_new_tokens,
                    eos_token_id=EOS,
                    pad_token_id=PAD,
                )[:, longest:]
            stops = (out == EOS).int()
            counts += torch.where(stops.any(1), stops.argmax(1) + 1, out.shape[1]).tolist()
        return counts

    return run


def measure(run: Callable[[int], list[int]], seed: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = sum(run(seed))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": tokens, "wall": tokens / wall, "cpu": tokens / cpu}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench generation", description=str(__doc__).splitlines()[0]
    )
    defaults = {
        "threads": 2,
        "slots": 16,
        "prompts": 96,
        "layers": 4,
        "hidden": 256,
        "vocab": 8192,
        "mean": 64,
    }
    for name, default in {
        **defaults,
        "max-prompt": 64,
        "max-new-tokens": 256,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    stage, prompts = build(args, mesh), make_prompts(args)
    runs = {
        "fastrlhf": ours(stage, mesh, prompts, args),
        "transformers": hugging_face(stage, prompts, args),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in range(args.repeats + 1):
        for name, run in runs.items():
            result = measure(run, seed)
            if seed:  # the first is the warm-up
                results[name].append(result)
    print(
        f"{args.layers} layers x {args.hidden}, vocabulary {args.vocab}, {args.prompts} prompts,"
        f" {args.slots} slots"
    )
    for name, rows in results.items():
        wall = sorted(row["wall"] for row in rows)
        cpu = statistics.median(row["cpu"] for row in rows)
        mean = statistics.mean(row["tokens"] for row in rows) / args.prompts
        print(
            f"{name:12}  {statistics.median(wall):7.0f} tokens/s (median;"
            f" {wall[0]:.0f}..{wall[-1]:.0f}), {cpu:.0f} tokens/CPU-s, mean response {mean:.0f}"
            " tokens"
        )
    for kind in ("wall", "cpu"):
        ratios = sorted(a[kind] / b[kind] for a, b in zip(*results.values(), strict=True))
        print(
            f"ratio by {kind:4}  {statistics.median(ratios):.2f} ({ratios[0]:.2f} .."
            f" {ratios[-1]:.2f})"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {**vars(args), "json": str(args.json)}, "results": results})
        )
    meshes.finalize()
    return 0
