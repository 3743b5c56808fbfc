"""Evaluation of policies: the commands `fastrlhf eval winrate` and `fastrlhf eval select`.

Both run under torchrun with any layout; the responses are the same and the numbers are equal up to
rounding. In memory are the judge's model and one policy at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from fastrlhf.algorithms.judging import finite_scores
from fastrlhf.algorithms.reward_function import call_reward_function, load_reward_function
from fastrlhf.algorithms.rewards import raise_on_any_rank
from fastrlhf.checkpoint.integrity import replace_text
from fastrlhf.checkpoint.model_folder import SavedModel
from fastrlhf.checkpoint.names import step_folders
from fastrlhf.config import Config, require
from fastrlhf.data.batches import TokenizedRanking
from fastrlhf.data.files import make_folder
from fastrlhf.data.records import PromptLike
from fastrlhf.data.tokenize import (
    encode_plain,
    encode_prompts,
    end_marker,
    load_tokenizer,
    prompt_text,
    read_prefix,
)
from fastrlhf.errors import UserError
from fastrlhf.evaluation.comparison import (
    JudgedResponses,
    compare,
    pair_records,
    write_comparison,
    write_selection,
)
from fastrlhf.evaluation.page import write_json
from fastrlhf.evaluation.report import read_metrics
from fastrlhf.evaluation.winrate import interval_text
from fastrlhf.generation.responses import Response, find_policy, fitting_prompts, respond
from fastrlhf.generation.sampling import SamplingParams
from fastrlhf.models.checks import check_saved
from fastrlhf.models.loading import (
    find_reward_model,
    is_hugging_face,
    load_saved,
    with_tokenizer_of,
)
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.run.start import start as start_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def winrate(config: Config) -> dict[str, Any]:
    """Compare the policy of model.load (or model.hf) with eval.baseline on data.prompts.

    Writes winrate.json, winrate.html and pairs.jsonl to output_dir; returns the contents of
    winrate.json.
    """
    require(config, "eval winrate")
    assert config.eval.baseline is not None
    policy = find_policy(config.model.load or config.model.hf, "eval winrate")
    baseline = find_policy(config.eval.baseline, "eval winrate")
    out = make_folder(config.output_dir)
    mesh = start_ranks("eval winrate", config)
    with Watchdog(config.parallel), phase("evaluation"):
        models = {"the policy": policy, "eval.baseline": baseline}
        evaluation = _Evaluation(with_tokenizer_of(config, policy), mesh, models)
        ours = evaluation.judge(policy, read_prefix(config.data.prompt_prefix))
        theirs = evaluation.judge(baseline, read_prefix(config.eval.baseline_prefix))
    results = {**evaluation.description(), **compare(ours, theirs, config.eval.tie_margin)}
    if mesh.rank == 0:
        pairs = pair_records([prompt.prompt for prompt in evaluation.prompts], ours, theirs)
        write_json(out / "winrate.json", results)
        kept = [prompt.other_columns for prompt in evaluation.prompts]
        lines = "".join(
            json.dumps(
                {**kept[i // config.eval.responses], **pair}, ensure_ascii=False, default=str
            )
            + "\n"
            for i, pair in enumerate(pairs)
        )
        (out / "pairs.jsonl").write_text(lines, encoding="utf-8")
        page = write_comparison(out / "winrate.html", results, pairs)
        rate = results["win_rate"]
        interval = interval_text(rate["low"], rate["high"], rate["clusters"])
        print(
            f"{page}: {ours.name} won {rate['rate']:.3f} ({interval}) "
            f"against {theirs.name}: "
            f"{results['won']} won, {results['tied']} tied, {results['lost']} lost"
        )
    dist.barrier()
    return results


def select(config: Config) -> dict[str, Any]:
    """Select the checkpoint of the run in output_dir whose responses have the highest mean score.

    Judges the responses of every checkpoint to data.prompts. Writes select.json, select.html and
    the name of the best checkpoint to checkpoints/best; returns the contents of select.json.

    InstructGPT selected its SFT models by reward-model score too (section 3.5), because their
    validation loss rises after the first epoch.
    """
    require(config, "eval select")
    out = Path(config.output_dir)
    steps = step_folders(out / "checkpoints")
    if not steps:
        raise UserError(
            f"{out / 'checkpoints'}: no checkpoint; give the configuration of a run that has some "
            "(checkpoint.interval and checkpoint.keep_every or keep_last decide which it keeps)"
        )
    policies = [find_policy(str(path), "eval select") for path in steps]
    losses = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else {}
    valid_loss = dict(zip(*losses.get("valid_loss", ([], [])), strict=True))
    mesh = start_ranks("eval select", config)
    rows: list[dict[str, Any]] = []
    with Watchdog(config.parallel), phase("evaluation"):
        checked = {
            f"checkpoint {path.name}": saved for path, saved in zip(steps, policies, strict=True)
        }
        evaluation = _Evaluation(with_tokenizer_of(config, policies[-1]), mesh, checked)
        prefix = read_prefix(config.data.prompt_prefix)
        for path, policy in zip(steps, policies, strict=True):
            step = int(path.name.removeprefix("step_"))
            loss = {"valid_loss": valid_loss[step]} if step in valid_loss else {}
            rows.append({"step": step, **evaluation.judge(policy, prefix).summary(), **loss})
            if mesh.rank == 0:
                print(_line(rows[-1]), flush=True)
    best = max(rows, key=lambda row: row["score"])["step"]
    results = {"run": str(out), "best": best, **evaluation.description(), "checkpoints": rows}
    if mesh.rank == 0:
        write_json(out / "select.json", results)
        replace_text(out / "checkpoints" / "best", f"step_{best:08d}")
        page = write_selection(out / "select.html", results)
        path = out / "checkpoints" / "best"
        print(f"{page}: step {best} is best; start from it with model.load={path}")
    dist.barrier()
    return results


class _Evaluation:
    """The prompts of an evaluation and its judge: a reward model or a Python function."""

    def __init__(self, config: Config, mesh: Mesh, policies: Mapping[str, SavedModel]) -> None:
        """Check every model, then read the prompts and load the judge.

        `policies` are those that `judge` will be given, by their role in messages.
        """
        self.config = config
        self.mesh = mesh
        self.tokenizer = load_tokenizer(config.data.tokenizer, add_bos=config.data.add_bos)
        for role, policy in policies.items():
            check_saved(policy, role, config.parallel, *self._tokenizer_of(policy))
        judge = None
        if config.eval.reward_model is not None:
            judge = find_reward_model(config.eval.reward_model, "eval.reward_model")
            folder = config.data.tokenizer
            check_saved(judge, "eval.reward_model", config.parallel, self.tokenizer, folder)
        self.prompts, self.too_long = fitting_prompts(config, self.tokenizer, mesh)
        self.params = SamplingParams.from_config(config.generation, config.train.seed)
        self.function = (
            load_reward_function(config.eval.judge, "eval.judge") if config.eval.judge else None
        )
        self.reward = (
            load_saved(judge, mesh, "scalar", config.model.dtype) if judge is not None else None
        )

    def _tokenizer_of(self, saved: SavedModel) -> tuple[PreTrainedTokenizerFast, str]:
        """Return the tokenizer of a policy and its folder: a Hugging Face model has its own."""
        if is_hugging_face(saved.path) and saved.tokenizer:
            return load_tokenizer(saved.tokenizer), saved.tokenizer
        return self.tokenizer, self.config.data.tokenizer

    def description(self) -> dict[str, Any]:
        """Return the judge and the prompts, which the results of all policies share."""
        judge = self.config.eval.reward_model or self.config.eval.judge
        files = ", ".join(self.config.data.prompts or [])
        return {"judge": judge, "prompts": files, "prompts_too_long": self.too_long}

    def judge(self, saved: SavedModel, prefix: str = "") -> JudgedResponses:
        """Sample the policy's responses by the configuration's generation section, and score them.

        `prefix` is prepended to each prompt.
        """
        tokenizer, _ = self._tokenizer_of(saved)
        model = load_saved(saved, self.mesh, "lm", self.config.model.dtype)
        encoded = encode_prompts(tokenizer, [prompt.prompt for prompt in self.prompts], prefix)
        slots, copies = self.config.generation.slots, self.config.eval.responses
        responses = respond(
            model,
            tokenizer,
            encoded,
            self.params,
            mesh=self.mesh,
            slots=slots,
            copies=copies,
            name=str(saved.path),
        )
        return JudgedResponses(
            name=str(saved.path),
            responses=[[response.text for response in row] for row in responses],
            tokens=np.array([[response.tokens for response in row] for row in responses]),
            stopped=np.array([[response.stopped for response in row] for row in responses]),
            scores=np.array(self._scores(responses), dtype=np.float64),
        )

    def _scores(self, responses: Sequence[Sequence[Response]]) -> list[list[float]]:
        if self.function is not None:
            return self._function_scores(responses)
        assert self.reward is not None
        encoded = encode_prompts(self.tokenizer, [prompt.prompt for prompt in self.prompts])
        answered = [
            TokenizedRanking(tokens, self._tokens(prompt.prompt, row), [0] * len(row))
            for prompt, tokens, row in zip(self.prompts, encoded, responses, strict=True)
        ]
        scores = finite_scores(
            self.config, self.mesh, self.reward, answered, str(self.config.eval.reward_model)
        )
        return [row.tolist() for row in scores]

    def _tokens(self, prompt: PromptLike, row: Sequence[Response]) -> list[list[int]]:
        """Return the responses' tokens for the judge.

        A response that was cut off has no end marker. An empty response is an end marker alone.
        """
        encoded = encode_plain(self.tokenizer, [response.text for response in row])
        end = end_marker(self.tokenizer, prompt)
        return [
            [*tokens, *end] if response.stopped or not tokens else tokens
            for tokens, response in zip(encoded, row, strict=True)
        ]

    def _function_scores(self, responses: Sequence[Sequence[Response]]) -> list[list[float]]:
        """Call the judge's function on rank 0 and broadcast its scores.

        So all ranks have the same scores even if the function is not deterministic.
        """
        assert self.function is not None and self.config.eval.judge is not None
        message: list[list[float]] = [[]]
        problem = ""
        if self.mesh.rank == 0:
            prompts = [
                prompt_text(p.prompt)
                for p, row in zip(self.prompts, responses, strict=True)
                for _ in row
            ]
            texts = [response.text for row in responses for response in row]
            records = [
                prompt.other_columns
                for prompt, row in zip(self.prompts, responses, strict=True)
                for _ in row
            ]
            name, limit = f"eval.judge {self.config.eval.judge}", self.config.parallel.timeout_s
            try:
                scores = call_reward_function(
                    self.function, prompts, texts, name, limit, records=records
                )
                message = [scores]
            except UserError as error:
                problem = str(error)
        raise_on_any_rank(self.mesh, problem)
        dist.broadcast_object_list(message, src=0)
        (scores,), copies = message, self.config.eval.responses
        return [scores[i : i + copies] for i in range(0, len(scores), copies)]


def _line(row: dict[str, Any]) -> str:
    low, high = row["score_ci95"] or (None, None)
    interval = interval_text(low, high, row["prompts"])
    loss = f"  valid loss {row['valid_loss']:.3f}" if "valid_loss" in row else ""
    return (
        f"step {row['step']:>8}  score {row['score']:7.3f} ({interval})"
        f"  {row['tokens']:.1f} tokens  {row['cut_off']:.1%} cut off{loss}"
    )
