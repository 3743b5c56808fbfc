"""`fastrlhf sample`: distinct responses per prompt, and a file that is reproducible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrlhf.checkpoint.model_folder import save_model
from fastrlhf.commands.sample import run, sample
from fastrlhf.config import Config, ParallelConfig
from fastrlhf.data.records import Prompt, read_records
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
from fastrlhf.errors import UserError
from fastrlhf.generation import SamplingParams
from fastrlhf.models.gpt import GPT
from fastrlhf.parallel import mesh as meshes
from fastrlhf.parallel.mesh import Mesh

PROMPTS = [
    Prompt("the cat"),
    Prompt("a dog ran", user_id="u1"),
    Prompt([{"role": "user", "content": "hello"}], user_id="u2"),
    Prompt("on the mat. "),
]
PARAMS = SamplingParams(max_new_tokens=6, seed=3)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(
        ["the cat sat on the mat. a dog ran after the cat.\nuser: hello\nassistant: hi\n"] * 4,
        290,
        folder,
    )
    return folder


@pytest.fixture
def world() -> Iterator[Mesh]:
    """Return a new mesh for each test, because `run` initializes one itself."""
    yield meshes.initialize(ParallelConfig(), seed=1)
    meshes.finalize()


def policy(cases: ModuleType, world: Mesh, head: str = "lm") -> GPT:
    config = cases.ModelConfig(**{**cases.MODEL, "family": "gpt"})
    return cases.build_model(config, world, 290, head=head, seed=5)


def rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at characters that a response may contain, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_file(cases: ModuleType, world: Mesh, tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(tokenizer_folder), policy(cases, world)
    out = tmp_path / "made" / "samples.jsonl"
    counts = sample(model, tokenizer, PROMPTS, (2, 5), PARAMS, mesh=world, out=out)
    written = rows(out)
    assert [row["prompt"] for row in written] == [prompt.prompt for prompt in PROMPTS]
    assert [row.get("user_id") for row in written] == [None, "u1", "u2", None]
    sizes = [len(row["responses"]) for row in written]
    assert len(set(sizes)) > 1
    assert all(2 <= size <= 5 for size in sizes)
    assert all(len(set(row["responses"])) == len(row["responses"]) for row in written)
    assert (counts.prompts, counts.responses, counts.short, counts.unusable) == (
        4,
        sum(sizes),
        0,
        0,
    )
    assert not list(out.parent.glob("*.partial"))

    again = tmp_path / "again.jsonl"
    sample(model, tokenizer, PROMPTS, (2, 5), PARAMS, mesh=world, out=again, slots=2)
    assert again.read_text() == out.read_text()

    # The file can be ranked as it is.
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(
        "".join(
            json.dumps({**row, "ranks": list(range(len(row["responses"])))}) + "\n"
            for row in written
        )
    )
    assert len(list(read_records(ranked, "rankings"))) == 4


def test_duplicates_are_sampled_again_up_to_a_limit(
    cases: ModuleType, world: Mesh, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """With two likely one-token responses, three distinct ones are never found, but two are."""
    tokenizer, model = load_tokenizer(tokenizer_folder), policy(cases, world)
    params = SamplingParams(max_new_tokens=1, top_k=2, seed=4)
    prompts = [Prompt("the cat " * n) for n in range(1, 13)]
    counts = sample(model, tokenizer, prompts, 3, params, mesh=world, out=tmp_path / "a.jsonl")
    assert counts.short == 12
    counts = sample(model, tokenizer, prompts, 2, params, mesh=world, out=tmp_path / "b.jsonl")
    assert counts.prompts >= 9
    assert counts.unusable == counts.short == 12 - counts.prompts
    assert all(len(set(row["responses"])) == 2 for row in rows(tmp_path / "b.jsonl"))


def test_stop_string_is_cut_off(
    cases: ModuleType, world: Mesh, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer, model = load_tokenizer(tokenizer_folder), policy(cases, world)
    sample(model, tokenizer, PROMPTS, 2, PARAMS, mesh=world, out=tmp_path / "free.jsonl")
    stop = rows(tmp_path / "free.jsonl")[0]["responses"][0][3:5]
    params = SamplingParams(max_new_tokens=6, seed=3, stop=(stop,))
    sample(model, tokenizer, PROMPTS, 2, params, mesh=world, out=tmp_path / "cut.jsonl")
    free, cut = (
        rows(tmp_path / "free.jsonl")[0]["responses"],
        rows(tmp_path / "cut.jsonl")[0]["responses"],
    )
    assert cut[0] == free[0][: free[0].index(stop)]
    assert not any(stop in response for response in cut)


def test_greedy_is_rejected(
    cases: ModuleType, world: Mesh, tokenizer_folder: Path, tmp_path: Path
) -> None:
    greedy = SamplingParams(temperature=0.0, max_new_tokens=2)
    with pytest.raises(UserError, match="temperature above 0"):
        tokenizer = load_tokenizer(tokenizer_folder)
        sample(policy(cases, world), tokenizer, PROMPTS, 2, greedy, mesh=world, out=tmp_path / "x")


@pytest.fixture
def settings(tokenizer_folder: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "the cat"},
        {"prompt": "a dog ran " * 20},
        {"prompt": "hello", "user_id": "u"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "max_positions": 256,
        "dtype": "fp32",
    }
    return {
        "model": {"family": "gpt", **shape},
        "data": {
            "tokenizer": str(tokenizer_folder),
            "prompts": [str(prompts)],
            "max_prompt_tokens": 20,
        },
        "optimizer": {"lr": 1e-3},
        "generation": {"max_new_tokens": 5, "slots": 4},
        "output_dir": str(tmp_path / "out"),
    }


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_run(
    cases: ModuleType,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    head: str,
) -> None:
    world = meshes.initialize(ParallelConfig(), seed=1)
    save_model(
        tmp_path / "policy", policy(cases, world, head), tokenizer=settings["data"]["tokenizer"]
    )
    meshes.finalize()
    settings["model"]["load"] = str(tmp_path / "policy")
    try:
        if head == "scalar":
            with pytest.raises(UserError, match="reward or value model"):
                run(Config(**settings))
            return
        run(Config(**settings))
    finally:
        meshes.finalize()
    written = rows(tmp_path / "out" / "samples.jsonl")
    assert [(row["prompt"], row.get("user_id")) for row in written] == [
        ("the cat", None),
        ("hello", "u"),
    ]
    assert all(4 <= len(row["responses"]) <= 9 for row in written)
    assert "1 were too long" in capsys.readouterr().out


def test_run_needs_a_model(settings: dict[str, Any]) -> None:
    try:
        with pytest.raises(UserError, match=r"set model.load to a run's folder"):
            run(Config(**settings))
    finally:
        meshes.finalize()
