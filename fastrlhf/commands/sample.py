"""The command `fastrlhf sample`: K distinct responses per prompt as JSONL, for labelers to rank.

samples.jsonl has one line per prompt: {"prompt", "responses": [K], "stopped": [K] bool, "tokens":
[K] int, "model": [K] str} and the other columns of the prompt's record. summary.json has totals.

    torchrun --nproc-per-node 4 -m fastrlhf sample CONFIG model.load=runs/sft

Out of scope: ranking (done by labelers) and scoring (see evaluation).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastrlhf.checkpoint.checkpointer import rename_unused
from fastrlhf.checkpoint.soundness import check_policy_finite
from fastrlhf.config import Config
from fastrlhf.data.files import make_folder
from fastrlhf.data.records import Prompt
from fastrlhf.data.tokenize import encode_prompts, load_tokenizer, read_prefix, stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.evaluation.page import write_json
from fastrlhf.generation.engine import PrefillCount, generate_all
from fastrlhf.generation.responses import (
    Response,
    find_policy,
    fitting_prompts,
    gather_by_prompt,
    response_text,
)
from fastrlhf.generation.sampling import SamplingParams
from fastrlhf.models.checks import check_saved
from fastrlhf.models.gpt import GPT
from fastrlhf.models.loading import load_saved, with_tokenizer_of
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.run.start import start as start_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run(config: Config) -> None:
    """Sample from the policy of `model.load` or `model.hf` into `output_dir`.

    Writes samples.jsonl and summary.json. An existing samples.jsonl (a PPO run's, or one that
    labelers are ranking) is renamed first.
    """
    out = Path(config.output_dir) / "samples.jsonl"
    make_folder(out.parent)
    saved = find_policy(config.model.load or config.model.hf, "sample")
    config = with_tokenizer_of(config, saved)
    tokenizer = load_tokenizer(config.data.tokenizer, add_bos=config.data.add_bos)
    mesh = start_ranks("sample", config)
    with Watchdog(config.parallel) as watchdog, phase("sampling"):
        key = "model.load" if config.model.load else "model.hf"
        check_saved(saved, key, config.parallel, tokenizer, config.data.tokenizer)
        prompts, too_long = fitting_prompts(config, tokenizer, mesh)
        params = SamplingParams.from_config(config.generation, config.train.seed)
        model = load_saved(saved, mesh, "lm", config.model.dtype)
        check_policy_finite(str(saved.path), model)
        watchdog.end_start_up()
        slots = config.generation.slots
        prefix = read_prefix(config.data.prompt_prefix)
        counts = sample(
            model,
            tokenizer,
            prompts,
            config.sample.k,
            params,
            mesh=mesh,
            out=out,
            slots=slots,
            prefix=prefix,
            name=str(saved.path),
        )
    if mesh.rank == 0:
        write_json(out.with_name("summary.json"), counts.summary())
        print(
            f"{out}: {counts.responses} responses to {counts.prompts} prompts ({counts.short} got "
            f"fewer than sample.k, {counts.unusable} with fewer than two were dropped, {too_long} "
            "were too long)"
        )
    dist.barrier()


ROUNDS = 4
"""Sampling rounds per prompt: blank responses and duplicates are sampled again."""


@dataclass
class SampleCounts:
    """Numbers of prompts and responses in a samples file."""

    prompts: int = 0
    responses: int = 0
    short: int = 0
    """Prompts with fewer responses than requested."""
    unusable: int = 0
    """Prompts with fewer than two responses; they are not written, as there is nothing to rank."""
    tokens_sampled: int = 0
    """Of all responses, those that were sampled again and are not in the file too."""
    prompt_tokens_shown: int = 0
    """Prompt tokens of all sampled responses; a prompt counts once per response."""
    prompt_tokens_computed: int = 0
    """Prompt tokens that went through the model."""
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """Return the contents of summary.json."""
        return {
            "prompts": self.prompts,
            "responses": self.responses,
            "tokens_sampled": self.tokens_sampled,
            "prompt_tokens_shown": self.prompt_tokens_shown,
            "prompt_tokens_computed": self.prompt_tokens_computed,
            "seconds": round(self.seconds, 3),
        }


_OF_RESPONSES = ("responses", "stopped", "tokens", "model")
_JUDGEMENTS = ("ranks", "ratings", "flags", "labeler_id", "seconds", "item_id")
"""Columns of a prompt file that speak of other responses than those sampled here."""


def sample(
    model: GPT,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    k: int | tuple[int, int],
    params: SamplingParams,
    *,
    mesh: Mesh,
    out: str | Path,
    slots: int = 64,
    prefix: str = "",
    name: str = "the policy",
) -> SampleCounts:
    """Write K responses to each prompt to `out`, one line per prompt, in order.

    A line is {"prompt", "responses", "stopped", "tokens", "model"} with `name` as the model of each
    response, and the other columns of the prompt's record, without judgements of other responses.
    K is `k`, or sampled per prompt from least .. most if `k` is a pair. Responses do not include
    the stop token or string. The data-parallel ranks share the prompts; the file depends neither
    on their number nor on `slots`. The model sees `prefix` before each prompt; the file does not
    include it.

    Raises UserError if the temperature is 0 and more than one response is requested; ValueError if
    `k` is below 1 or the pair is not ascending.
    """
    least, most = (k, k) if isinstance(k, int) else k
    if not 1 <= least <= most:
        raise ValueError(
            f"k is {k}; expected a number >= 1 or a pair (least, most) with 1 <= least"
        )
    if most > 1 and params.temperature == 0:
        raise UserError(
            "sample needs generation.temperature above 0: greedy responses are identical"
        )
    start, prefilled, sampled, shown = time.perf_counter(), PrefillCount(), 0, 0
    encoded = encode_prompts(tokenizer, [prompt.prompt for prompt in prompts], prefix)
    mine = range(mesh.data_rank, len(prompts), mesh.data_size)
    wanted = {i: random.Random(f"{params.seed} {i}").randint(least, most) for i in mine}
    found: dict[int, dict[str, Response]] = {i: {} for i in mine}
    for attempt in range(ROUNDS):
        missing = {i: wanted[i] - len(found[i]) for i in mine}
        # One id per prompt, round and copy, independent of the rank that samples it.
        requests = [(i, (i * ROUNDS + attempt) * most + j) for i in mine for j in range(missing[i])]
        responses = generate_all(
            model,
            [encoded[i] for i, _ in requests],
            params,
            mesh=mesh,
            eos=stop_token_ids(tokenizer),
            slots=slots,
            tokenizer=tokenizer,
            ids=[identity for _, identity in requests],
            prefilled=prefilled,
        )
        for (i, _), response in zip(requests, responses, strict=True):
            sampled, shown = sampled + len(response.tokens), shown + len(encoded[i])
            text = response_text(tokenizer, response, params.stop)
            if text.strip():
                found[i].setdefault(text, Response(text, len(response.tokens), response.stopped))
    gathered = gather_by_prompt(mesh, {i: list(by_text.values()) for i, by_text in found.items()})
    counts = _write(
        Path(out),
        prompts,
        gathered,
        gather_by_prompt(mesh, wanted),
        name,
        is_writer=mesh.rank == 0,
    )
    totals = torch.tensor([sampled, shown, prefilled.tokens], device=mesh.device)
    tokens = mesh.sum_over_data(totals).tolist()
    counts.tokens_sampled, counts.prompt_tokens_shown, counts.prompt_tokens_computed = tokens
    counts.seconds = time.perf_counter() - start
    return counts


def _write(
    out: Path,
    prompts: Sequence[Prompt],
    found: dict[int, list[Response]],
    wanted: dict[int, int],
    name: str,
    *,
    is_writer: bool,
) -> SampleCounts:
    counts, lines = SampleCounts(), []
    for i, prompt in enumerate(prompts):
        responses = found[i]
        counts.short += len(responses) < wanted[i]
        if len(responses) < min(2, wanted[i]):
            counts.unusable += 1
            continue
        counts.prompts += 1
        counts.responses += len(responses)
        line = {"prompt": prompt.prompt, **_columns(responses, name)}
        line |= {
            key: value
            for key, value in prompt.other_columns.items()
            if key not in (*_OF_RESPONSES, *_JUDGEMENTS)
        }
        # default: values of parquet files that JSON has no form for, such as dates
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    if is_writer:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        if out.exists():
            rename_unused(out)
        partial.replace(out)  # atomic: readers never see a partial file
    return counts


def _columns(responses: Sequence[Response], model: str) -> dict[str, object]:
    """Return the columns of a line that have one entry per response."""
    return {
        "responses": [response.text for response in responses],
        "stopped": [response.stopped for response in responses],
        "tokens": [response.tokens for response in responses],
        "model": [model] * len(responses),
    }
