"""Evaluation of policies: the entry points of `fastrlhf eval winrate` and `fastrlhf eval select`.

Both run under torchrun in any layout, which changes no response and no figure beyond rounding. Models are in memory one
at a time beside the judge's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fastrlhf.algorithms.judging import finite_scores
from fastrlhf.algorithms.reward_function import call_reward_function, load_reward_function
from fastrlhf.algorithms.rewards import raise_on_any_rank
from fastrlhf.checkpoint.integrity import replace_text
from fastrlhf.checkpoint.model_folder import SavedModel
from fastrlhf.checkpoint.names import step_folders
from fastrlhf.checkpoint.soundness import check_policy_finite
from fastrlhf.config import Config, require
from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.data.files import make_folder
from fastrlhf.data.tokenize import (
    encode_plain,
    encode_prompts,
    load_tokenizer,
    prompt_text,
    read_prefix,
)
from fastrlhf.errors import UserError
from fastrlhf.evaluation.comparison import (
    Judged,
    compare,
    pair_records,
    write_comparison,
    write_selection,
)
from fastrlhf.evaluation.report import read_metrics, write_json
from fastrlhf.evaluation.winrate import between
from fastrlhf.generation.responses import Response, find_policy, fitting_prompts, respond
from fastrlhf.generation.sampling import SamplingParams
from fastrlhf.models.loading import check_vocabulary, find_reward_model, is_hugging_face, load_saved
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase


def winrate(config: Config) -> dict[str, Any]:
    """Compares the policy of model.load (or model.hf) with eval.baseline on data.prompts; returns what it writes to
    output_dir/winrate.json, beside winrate.html and pairs.jsonl.
    """
    require(config, "eval winrate")
    assert config.eval.baseline is not None
    policy = find_policy(config.model.load or config.model.hf, "eval winrate")
    baseline = find_policy(config.eval.baseline, "eval winrate")
    out = make_folder(config.output_dir)
    mesh = meshes.initialize(config.parallel, config.train.seed)
    with Watchdog(config.parallel.timeout_s), phase("evaluation"):
        evaluation = _Evaluation(config, mesh)
        ours = evaluation.judged(policy, read_prefix(config.data.prompt_prefix))
        theirs = evaluation.judged(baseline, read_prefix(config.eval.baseline_prefix))
    results = {**evaluation.described(), **compare(ours, theirs, config.eval.tie_margin)}
    if mesh.rank == 0:
        pairs = pair_records([prompt.prompt for prompt in evaluation.prompts], ours, theirs)
        write_json(out / "winrate.json", results)
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (out / "pairs.jsonl").write_text(lines, encoding="utf-8")
        page = write_comparison(out / "winrate.html", results, pairs)
        rate = results["win_rate"]
        print(
            f"{page}: {ours.name} won {rate['rate']:.3f} ({between(rate['low'], rate['high'])}) against "
            f"{theirs.name}: {results['won']} won, {results['tied']} tied, {results['lost']} lost"
        )
    dist.barrier()
    return results


def select(config: Config) -> dict[str, Any]:
    """Judges the responses of every checkpoint of the run in output_dir to data.prompts, and names the one with the
    highest mean score in output_dir/checkpoints/best; returns what it writes to output_dir/select.json.

    InstructGPT chose its SFT models so (section 3.5), because their validation loss rises after the first epoch.
    """
    require(config, "eval select")
    out = Path(config.output_dir)
    steps = step_folders(out / "checkpoints")
    if not steps:
        raise UserError(
            f"{out / 'checkpoints'}: no checkpoint; give the configuration of a run that has some (checkpoint.interval "
            "and checkpoint.keep_every or keep_last say which it keeps)"
        )
    policies = [find_policy(str(path), "eval select") for path in steps]
    losses = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else {}
    valid_loss = dict(zip(*losses.get("valid_loss", ([], [])), strict=True))
    mesh = meshes.initialize(config.parallel, config.train.seed)
    rows: list[dict[str, Any]] = []
    with Watchdog(config.parallel.timeout_s), phase("evaluation"):
        evaluation, prefix = _Evaluation(config, mesh), read_prefix(config.data.prompt_prefix)
        for path, policy in zip(steps, policies, strict=True):
            step = int(path.name.removeprefix("step_"))
            loss = {"valid_loss": valid_loss[step]} if step in valid_loss else {}
            rows.append({"step": step, **evaluation.judged(policy, prefix).summary(), **loss})
            if mesh.rank == 0:
                print(_line(rows[-1]), flush=True)
    best = max(rows, key=lambda row: row["score"])["step"]
    results = {"run": str(out), "best": best, **evaluation.described(), "checkpoints": rows}
    if mesh.rank == 0:
        write_json(out / "select.json", results)
        replace_text(out / "checkpoints" / "best", f"step_{best:08d}")
        page = write_selection(out / "select.html", results)
        print(
            f"{page}: step {best} is best; model.load={out / 'checkpoints' / 'best'} starts from it"
        )
    dist.barrier()
    return results


class _Evaluation:
    """The prompts, and a judge that scores any policy's responses to them."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.prompts, self.too_long = fitting_prompts(config, self.tokenizer, mesh)
        self.params = SamplingParams.from_config(config.generation, config.train.seed)
        self.function = (
            load_reward_function(config.eval.judge, "eval.judge") if config.eval.judge else None
        )
        self.reward = None
        if config.eval.reward_model is not None:
            saved = find_reward_model(config.eval.reward_model, "eval.reward_model")
            check_vocabulary(saved, self.tokenizer, config.data.tokenizer)
            self.reward = load_saved(saved, mesh, "scalar", config.model.dtype)

    def described(self) -> dict[str, Any]:
        """What the results of all policies share."""
        judge = self.config.eval.reward_model or self.config.eval.judge
        files = ", ".join(self.config.data.prompts or [])
        return {"judge": judge, "prompts": files, "prompts_too_long": self.too_long}

    def judged(self, saved: SavedModel, prefix: str = "") -> Judged:
        """The policy's responses, sampled as the configuration's generation section says, and their scores."""
        tokenizer, folder = self.tokenizer, self.config.data.tokenizer
        if is_hugging_face(saved.path) and saved.tokenizer:
            tokenizer, folder = load_tokenizer(saved.tokenizer), saved.tokenizer
        check_vocabulary(saved, tokenizer, folder)
        stage = load_saved(saved, self.mesh, "lm", self.config.model.dtype)
        check_policy_finite(str(saved.path), stage)
        encoded = encode_prompts(tokenizer, [prompt.prompt for prompt in self.prompts], prefix)
        slots, copies = self.config.generation.slots, self.config.eval.responses
        responses = respond(
            stage, tokenizer, encoded, self.params, mesh=self.mesh, slots=slots, copies=copies
        )
        return Judged(
            name=str(saved.path),
            responses=[[response.text for response in row] for row in responses],
            tokens=np.array([[response.tokens for response in row] for row in responses]),
            stopped=np.array([[response.stopped for response in row] for row in responses]),
            scores=np.array(self._scores(responses), dtype=np.float64),
        )

    def _scores(self, responses: Sequence[Sequence[Response]]) -> list[list[float]]:
        if self.function is not None:
            return self._by_function(responses)
        rows = zip(
            encode_prompts(self.tokenizer, [p.prompt for p in self.prompts]), responses, strict=True
        )
        answered = [
            TokenizedRanking(prompt, self._tokens(row), [0] * len(row)) for prompt, row in rows
        ]
        assert self.reward is not None
        scores = finite_scores(
            self.config, self.mesh, self.reward, answered, str(self.config.eval.reward_model)
        )
        return [row.tolist() for row in scores]

    def _tokens(self, row: Sequence[Response]) -> list[list[int]]:
        """As the judge reads them: a response that was cut has no stop token. An empty one is its stop token."""
        encoded = encode_plain(self.tokenizer, [response.text for response in row])
        eos = self.tokenizer.eos_token_id
        return [
            [*tokens, eos] if response.stopped or not tokens else tokens
            for tokens, response in zip(encoded, row, strict=True)
        ]

    def _by_function(self, responses: Sequence[Sequence[Response]]) -> list[list[float]]:
        """Called once, so that a function that is not deterministic gives all ranks one answer."""
        assert self.function is not None and self.config.eval.judge is not None
        told: list[Any] = [None]
        problem = ""
        if self.mesh.rank == 0:
            prompts = [
                prompt_text(p.prompt)
                for p, row in zip(self.prompts, responses, strict=True)
                for _ in row
            ]
            texts = [response.text for row in responses for response in row]
            name, limit = f"eval.judge {self.config.eval.judge}", self.config.parallel.timeout_s
            try:
                told = [call_reward_function(self.function, prompts, texts, name, limit)]
            except UserError as error:
                problem = str(error)
        raise_on_any_rank(self.mesh, problem)
        dist.broadcast_object_list(told, src=0)
        scores, copies = told[0], self.config.eval.responses
        return [scores[i : i + copies] for i in range(0, len(scores), copies)]


def _line(row: dict[str, Any]) -> str:
    loss = f"  valid loss {row['valid_loss']:.3f}" if "valid_loss" in row else ""
    return (
        f"step {row['step']:>8}  score {row['score']:7.3f} ({between(*row['score_ci95'])})  {row['tokens']:.1f} tokens"
        f"  {row['cut_off']:.1%} cut off{loss}"
    )
