"""The command `fastrlhf sample`: K distinct responses per prompt as JSONL, for labelers to rank.

    torchrun --nproc-per-node 4 -m fastrlhf sample CONFIG model.load=runs/sft

Out of scope: ranking (done by labelers) and scoring (see evaluation).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from fastrlhf.checkpoint.checkpointer import rename_unused
from fastrlhf.checkpoint.soundness import check_policy_finite
from fastrlhf.config import Config
from fastrlhf.data.files import make_folder
from fastrlhf.data.records import Prompt
from fastrlhf.data.tokenize import encode_prompts, load_tokenizer, read_prefix, stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import generate_all
from fastrlhf.generation.responses import (
    find_policy,
    fitting_prompts,
    gather_by_prompt,
    response_text,
)
from fastrlhf.generation.sampling import SamplingParams
from fastrlhf.models.gpt import GPT
from fastrlhf.models.loading import check_vocabulary, load_saved
from fastrlhf.parallel.mesh import Mesh
from fastrlhf.parallel.watchdog import Watchdog, phase
from fastrlhf.run.start import start as start_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run(config: Config) -> None:
    """Sample from the policy of `model.load` or `model.hf` and write `output_dir`/samples.jsonl.

    An existing samples.jsonl (a PPO run's, or one that labelers are ranking) is renamed first.
    """
    out = Path(config.output_dir) / "samples.jsonl"
    make_folder(out.parent)
    tokenizer = load_tokenizer(config.data.tokenizer, add_bos=config.data.add_bos)
    mesh = start_ranks("sample", config)
    with Watchdog(config.parallel) as watchdog, phase("sampling"):
        prompts, too_long = fitting_prompts(config, tokenizer, mesh)
        params = SamplingParams.from_config(config.generation, config.train.seed)
        saved = find_policy(config.model.load or config.model.hf, "sample")
        check_vocabulary(saved, tokenizer, config.data.tokenizer)
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
        )
    if mesh.rank == 0:
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
) -> SampleCounts:
    """Write one line {"prompt", "responses": [K], "user_id"?} per prompt to `out`, in order.

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
    encoded = encode_prompts(tokenizer, [prompt.prompt for prompt in prompts], prefix)
    mine = range(mesh.data_rank, len(prompts), mesh.data_size)
    wanted = {i: random.Random(f"{params.seed} {i}").randint(least, most) for i in mine}
    found: dict[int, list[str]] = {i: [] for i in mine}
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
        )
        for (i, _), response in zip(requests, responses, strict=True):
            text = response_text(tokenizer, response, params.stop)
            if text.strip() and text not in found[i]:
                found[i].append(text)
    return _write(
        Path(out),
        prompts,
        gather_by_prompt(mesh, found),
        gather_by_prompt(mesh, wanted),
        is_writer=mesh.rank == 0,
    )


def _write(
    out: Path,
    prompts: Sequence[Prompt],
    found: dict[int, list[str]],
    wanted: dict[int, int],
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
        user = {} if prompt.user_id is None else {"user_id": prompt.user_id}
        lines.append(
            json.dumps(
                {"prompt": prompt.prompt, "responses": responses, **user}, ensure_ascii=False
            )
            + "\n"
        )
    if is_writer:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        if out.exists():
            rename_unused(out)
        partial.replace(out)  # atomic: readers never see a partial file
    return counts
