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

    # One entry per response; a response that did not stop has the length limit.
    for row in written:
        assert set(row) - {"user_id"} == {"prompt", "responses", "stopped", "tokens", "model"}
        assert len(row["stopped"]) == len(row["tokens"]) == len(row["responses"])
        assert row["model"] == ["the policy"] * len(row["responses"])
        for stopped, tokens in zip(row["stopped"], row["tokens"], strict=True):
            assert 1 <= tokens <= 6 and (stopped or tokens == 6)

    # The file can be ranked as it is.
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(
        "".join(
            json.dumps({**row, "ranks": list(range(len(row["responses"])))}) + "\n"
            for row in written
        )
    )
    rankings = list(read_records(ranked, "rankings"))
    assert len(rankings) == 4
    for ranking, row in zip(rankings, written, strict=True):
        assert ranking.columns == {name: row[name] for name in ("stopped", "tokens", "model")}


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
        {"prompt": "hello", "user_id": "u", "answer": [1, None], "ranks": [2, 1]},
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
    # Extra columns are kept, judgements of other responses are not.
    assert written[1]["answer"] == [1, None] and "ranks" not in written[1]
    assert written[0]["model"][0] == str(tmp_path / "policy")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    keys = ["prompts", "responses", "tokens_sampled", "prompt_tokens_shown"]
    assert list(summary) == [*keys, "prompt_tokens_computed", "seconds"]
    assert summary["prompts"] == 2
    assert summary["responses"] == sum(len(row["responses"]) for row in written)
    # Duplicates are sampled again, so there may be more than the file has.
    assert summary["tokens_sampled"] >= sum(sum(row["tokens"]) for row in written)
    tokenizer = load_tokenizer(settings["data"]["tokenizer"])
    shown = sum(len(row["responses"]) * len(tokenizer(row["prompt"]).input_ids) for row in written)
    assert summary["prompt_tokens_shown"] >= shown
    assert summary["prompt_tokens_computed"] == summary["prompt_tokens_shown"]
    assert summary["seconds"] > 0
    assert "1 were too long" in capsys.readouterr().out


def test_run_needs_a_model(settings: dict[str, Any]) -> None:
    try:
        with pytest.raises(UserError, match=r"set model.load to a run's folder"):
            run(Config(**settings))
    finally:
        meshes.finalize()


def test_a_prompt_that_cannot_be_tokenized_names_its_line(
    cases: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    world = meshes.initialize(ParallelConfig(), seed=1)
    save_model(tmp_path / "policy", policy(cases, world), tokenizer=settings["data"]["tokenizer"])
    meshes.finalize()
    settings["model"]["load"] = str(tmp_path / "policy")
    (path,) = settings["data"]["prompts"]
    folder = Path(path).parent / "chat"
    tokenizer = load_tokenizer(settings["data"]["tokenizer"])
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    tokenizer.save_pretrained(folder)
    settings["data"]["tokenizer"] = str(folder)
    turns = json.dumps({"prompt": [{"role": "user", "content": "hello"}]})
    Path(path).write_text(Path(path).read_text() + turns + "\n")
    try:
        with pytest.raises(UserError, match=rf"^{path}:4: .*no such role"):
            run(Config(**settings))
    finally:
        meshes.finalize()
