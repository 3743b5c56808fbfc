"""A PPO iteration (rollout, scoring, update) compared with TRL's `PPOTrainer` on the same weights.

    python -m bench ppo-iteration --venv /tmp/trl-venv

The same work on both sides: prompts and responses of fixed length (no stop token is sampled), one
inner epoch, the same number of updates, plain PPO (no pretraining term, no moving average). TRL
runs in a separate virtual environment, made at --venv if it does not exist, with its logging,
samples and gradient checkpointing off; --tune searches for its best batch sizes. Iterations
alternate between the two processes; the one that waits reads from a pipe and computes nothing. The
rate of a large matrix product, measured in the same run, gives the time of the arithmetic alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import machine, results

TRL = "1.12.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastrlhf" / f"trl-{TRL}"
HERE = Path(__file__).resolve().parent
FIELDS = (
    "side",
    "pair",
    "seconds",
    "cpu_seconds",
    "ratio",
    "matmul_tflop_s",
    "limit_seconds",
    "episodes",
    "prompt",
    "response",
    "minibatches",
    "ours_micro",
    "trl_micro",
    "trl_rollout",
    "threads",
    "torch",
    "trl",
    "device",
    "commit",
    "time",
    "load",
)


# ---- the task, in a folder ---------------------------------------------------------------------


def write_task(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Write tokenizer, policy, reward model and prompts for both sides.

    Returns the fingerprint that TRL must reproduce.
    """
    from fastrlhf import ops
    from fastrlhf.checkpoint.model_folder import save_model
    from fastrlhf.config import ModelConfig, ParallelConfig
    from fastrlhf.data.batches import pack
    from fastrlhf.models.gpt import build_model
    from fastrlhf.models.hf import save_hf
    from fastrlhf.parallel import mesh as meshes

    tokenizer = _write_tokenizer(folder / "tokenizer", args.vocab)
    mesh = meshes.initialize(ParallelConfig(), seed=1)
    model = ModelConfig(**_shape(args))
    policy = build_model(model, mesh, args.vocab, seed=1).eval()
    reward = build_model(model, mesh, args.vocab, head="scalar", seed=2).eval()
    # Without the tokenizer, to which an export would add a pad token and a row.
    ids = {"eos_token_id": tokenizer.eos_token_id}
    save_hf(policy, folder / "policy", generation=ids)
    save_hf(reward, folder / "reward", generation=ids)
    save_model(folder / "reward_ours", reward, tokenizer=str(folder / "tokenizer"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, args.vocab, (64 * args.episodes, args.prompt), generator=generator)
    prompts = [" ".join(f"w{token}" for token in row) for row in rows.tolist()]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    half = args.prompt // 2
    batch = pack(rows[:8].tolist(), [half] * 8)
    with torch.no_grad():
        tokens = ops.linear_logprobs(
            policy(batch), labels=batch.labels, mask=batch.loss_mask, **policy.lm_head()
        )
        ends = reward(batch)[batch.cu_seqlens[1:].long() - 1]
        expected = {
            "logprob": tokens.logprobs[batch.loss_mask].mean().item(),
            "score": reward.score(ends).mean().item(),
        }
    meshes.finalize()
    return expected


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "family": "gpt",
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "num_heads": args.hidden // 64,
        "max_positions": args.prompt + args.response,
        "dtype": "fp32",
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _write_tokenizer(path: Path, vocab: int) -> Any:
    """Write a tokenizer whose token n is the word "wn"; token 0 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0} | {f"w{n}": n for n in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(str(path))
    return fast


def matmul_flops(args: argparse.Namespace) -> float:
    """Return the operations of the matrix products that an iteration needs.

    LM heads at response positions only, prompts prefilled once, attention over whole squares (the
    part that a causal kernel skips is not subtracted).
    """
    H, prompt, response = args.hidden, args.prompt, args.response
    length = prompt + response
    body = 2 * 12 * H * H * args.layers  # a token's forward
    head = 2 * args.vocab * H
    square = 4 * args.layers * H  # a query's forward, for each key
    rollout = (
        (length - 1) * body
        + response * head
        + square * (prompt**2 + sum(range(prompt + 1, length)))
    )
    forward = length * (body + square * length)
    scoring = 3 * forward + response * head  # reference, value, reward
    update = (
        2 * 3 * forward + 3 * response * head
    )  # policy and value: forward, and twice that backward
    return float(args.episodes * (rollout + scoring + update))


# ---- our side ----------------------------------------------------------------------------------


def ours(folder: Path, options: dict[str, Any]) -> None:
    """Run our worker: one iteration per line on stdin, built as the `ppo` command builds it."""
    from fastrlhf.config import load_config
    from fastrlhf.parallel import mesh as meshes
    from fastrlhf.run import builder, jobs

    torch.set_num_threads(options["threads"])
    (folder / "ppo.json").write_text(json.dumps(_our_config(folder, options)))  # JSON is YAML
    config = load_config(folder / "ppo.json", [])
    mesh = meshes.initialize(config.parallel, config.train.seed)
    job = jobs.ppo_job(builder.RunBuilder(config, mesh))  # what the command hands to its loop
    batches = iter(job.batches)
    say(ready=1)
    while sys.stdin.readline():
        wall, cpu = time.perf_counter(), time.process_time()
        metrics = job.algorithm.step(next(batches))
        say(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, **metrics)
    meshes.finalize()


def _our_config(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {**options["model"], "hf": str(folder / "policy")},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "prompts": str(folder / "prompts.jsonl"),
            "max_prompt_tokens": options["prompt"],
            "max_response_tokens": options["response"],
        },
        "optimizer": {"lr": options["lr"]},
        "schedule": {"decay": "constant", "warmup_steps": 0},
        "train": {"steps": 1000, "micro_batch_size": options["ours_micro"], "seed": 1},
        "ppo": {
            "reward_model": str(folder / "reward_ours"),
            "batch_size": options["episodes"],
            "minibatch_size": options["episodes"] // options["minibatches"],
            "gamma_ptx": 0.0,
            "ema_decay": None,
            "no_stop_penalty": None,
            "value_lr": options["lr"],
        },
        "generation": {
            "max_new_tokens": options["response"],
            "min_new_tokens": options["response"],
            "slots": options["episodes"],
        },
        "output_dir": str(folder / "ours"),
    }


def say(**message: Any) -> None:
    print("@" + json.dumps(message), flush=True)


# ---- the race ----------------------------------------------------------------------------------


class Worker:
    """A process that runs one iteration for each line it receives."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self.hear()

    def hear(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(
            f"{' '.join(self.process.args[:3])} ended with status {self.process.wait()}"
        )  # type: ignore[index]

    def iterate(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(600)  # its interpreter's exit


def make_venv(path: Path) -> Path:
    """Return the Python of a virtual environment with TRL.

    It has the same versions of torch and transformers as this process.
    """
    python = path / "bin" / "python"
    if not python.exists():
        import transformers

        print(f"installing TRL {TRL} in {path}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
        wanted = [
            f"trl=={TRL}",
            f"torch=={torch.__version__}",
            f"transformers=={transformers.__version__}",
        ]
        index = (
            ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
            if "+cpu" in torch.__version__
            else []
        )
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted, *index], check=True)
    return python


def start(side: str, folder: Path, args: argparse.Namespace) -> Worker:
    names = ("threads", "episodes", "prompt", "response", "minibatches", "ours_micro", "lr")
    options = {name: getattr(args, name) for name in names}
    options |= {"model": _shape(args), "micro": args.trl_micro, "rollout": args.trl_rollout}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if side == "ours":
        command = [sys.executable, "-m", "bench.ppo_iteration", "--worker"]
        environment["PYTHONPATH"] = str(HERE.parent)
    else:
        command = [str(make_venv(args.venv)), str(HERE / "trl_worker.py")]
        environment.pop("PYTHONPATH", None)
    return Worker([*command, str(folder), json.dumps(options)], environment)


def tune(folder: Path, args: argparse.Namespace) -> None:
    """Set TRL's batch sizes to the fastest found, first the rollout's, then the update's."""
    choices = {
        "trl_rollout": (16, 32, 64),
        "trl_micro": (4, 8, 16, 32, 64) if args.minibatches == 1 else (),
    }
    for name, sizes in choices.items():
        seconds = {}
        for size in (n for n in sizes if args.episodes % n == 0):
            setattr(args, name, size)
            worker = start("trl", folder, args)
            seconds[size] = min([worker.iterate()["wall"] for _ in range(3)][1:])
            worker.close()
            print(f"{name} {size}: {seconds[size]:.2f} s", flush=True)
        if seconds:
            setattr(args, name, min(seconds, key=seconds.__getitem__))


def race(
    folder: Path, args: argparse.Namespace, expected: dict[str, float]
) -> list[dict[str, Any]]:
    workers = {side: start(side, folder, args) for side in ("trl", "ours")}
    for name, value in expected.items():
        if abs(workers["trl"].ready[name] - value) > 1e-4 * max(1.0, abs(value)):
            raise SystemExit(
                f"not the same weights: {name} is {value} here, {workers['trl'].ready[name]} in TRL"
            )
    shared = machine.describe(torch.device("cpu"), args.threads) | {"trl": TRL}
    shared |= {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    rows: list[dict[str, Any]] = []
    for pair in range(-args.warmup, args.pairs):
        order = ("trl", "ours") if pair % 2 == 0 else ("ours", "trl")
        out = {side: workers[side].iterate() for side in order}
        if pair == -args.warmup:
            _check_first(out, args)
        if pair < 0:
            continue
        limits = machine.measure_limits(torch.device("cpu"), (torch.float32,), quick=True)
        rate = limits.matmul_tflop_s[torch.float32]
        ratio = out["trl"]["wall"] / out["ours"]["wall"]
        limit = matmul_flops(args) / rate / 1e12
        common = {"pair": pair, "ratio": ratio, "matmul_tflop_s": rate, "limit_seconds": limit}
        for side in order:
            times = {"side": side, "seconds": out[side]["wall"], "cpu_seconds": out[side]["cpu"]}
            rows.append({**shared, **common, **times, "load": machine.load()})
        phases = ", ".join(
            f"{k[8:]} {v:.2f}" for k, v in out["ours"].items() if k.startswith("seconds_")
        )
        seconds = " ".join(f"{side} {out[side]['wall']:.2f} s" for side in ("trl", "ours"))
        print(f"pair {pair}: {seconds} ({phases}), {ratio:.2f}x", flush=True)
    for worker in workers.values():
        worker.close()
    return rows


def _check_first(out: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Check that the first policy equals the reference, and that no response is short."""
    assert abs(out["trl"]["kl"]) < 1e-2 and abs(out["ours"]["kl"]) < 1e-2, out
    assert out["ours"]["response_length"] == args.response and out["ours"]["no_stop"] > 0.9, out
    assert out["ours"]["ratio_deviation"] < 1e-4, out


def summary(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    seconds = {
        side: sorted(row["seconds"] for row in rows if row["side"] == side)
        for side in ("trl", "ours")
    }
    cpu = {
        side: statistics.median(row["cpu_seconds"] for row in rows if row["side"] == side)
        for side in seconds
    }
    ratios = sorted(row["ratio"] for row in rows if row["side"] == "ours")
    best = max(row["matmul_tflop_s"] for row in rows)
    limit = matmul_flops(args) / best / 1e12
    lines = [
        f"{args.episodes} episodes of {args.prompt} + {args.response} tokens, {args.minibatches}"
        f" update(s), {args.layers} layers x {args.hidden}, vocabulary {args.vocab}, {args.threads}"
        " threads"
    ]
    for side, times in seconds.items():
        name = f"TRL {TRL}" if side == "trl" else "fastrlhf"
        median = statistics.median(times)
        spread = f"{times[0]:.2f} .. {times[-1]:.2f}"
        share = f"{100 * limit / median:.0f} % of the matmul limit"
        lines.append(
            f"{name:10}  {median:.2f} s an iteration ({spread}), {cpu[side]:.2f} CPU-s, {share}"
        )
    lines.append(f"{matmul_flops(args) / 1e9:.0f} GFLOP at {best:.3f} TFLOP/s: {limit:.2f} s")
    lines.append(
        f"ratio of wall times {statistics.median(ratios):.2f} (median of {len(ratios)} pairs; "
        f"{ratios[0]:.2f} .. {ratios[-1]:.2f}), of CPU times {cpu['trl'] / cpu['ours']:.2f}"
    )
    return lines


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench ppo-iteration", description=(__doc__ or "").splitlines()[0]
    )
    sizes = {
        "threads": 2,
        "episodes": 64,
        "prompt": 48,
        "response": 48,
        "layers": 4,
        "hidden": 256,
        "vocab": 8192,
    }
    batches = {"minibatches": 4, "ours_micro": 16, "trl_micro": 16, "trl_rollout": 64}
    for name, default in {**sizes, **batches, "pairs": 7, "warmup": 2}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument(
        "--venv",
        type=Path,
        default=CACHE,
        help="TRL's virtual environment, made if it is not there",
    )
    parser.add_argument(
        "--tune", action="store_true", help="look for TRL's fastest batch sizes first"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "ppo_iteration.csv")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = write_task(folder, args)
        if args.tune:
            tune(folder, args)
        rows = race(folder, args, expected)
    results.append_table(args.out, FIELDS, rows)
    print("\n".join(summary(rows, args)))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        ours(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
