"""Runs of `data prepare`: configuration, resuming, and properties of any output."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared_records import OPEN, kept

from bench.prepare import check, write_corpus
from fastrlhf.config.yaml_file import load
from fastrlhf.data.prepare.prepare import prepare, prepare_all, run
from fastrlhf.data.prepare.rules import SPLITS, PrepareConfig, Rules
from fastrlhf.data.prepare.work_files import WorkFiles
from fastrlhf.errors import UserError


def test_a_configuration_prepares_every_kind_with_users_in_one_split(
    jsonl: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstrations = jsonl(
        *[{"prompt": f"d{i}", "response": "r", "user_id": str(i)} for i in range(60)],
        name="d.jsonl",
    )
    prompts = jsonl(*[{"prompt": f"p{i}", "user_id": str(i)} for i in range(60)], name="p.jsonl")
    path = tmp_path / "prepare.yaml"
    lines = [
        f"inputs:\n  demonstrations: {demonstrations}\n  prompts: [{prompts}]",
        "valid_fraction: 0.3",
    ]
    path.write_text("\n".join([f"out: {tmp_path / 'out'}", *lines]))
    run([str(path), "test_fraction=0.3"], None, "prompts")
    owners = [
        {
            split: {row["user_id"] for row in kept(tmp_path / "out" / kind, split)}
            for split in SPLITS
        }
        for kind in ("demonstrations", "prompts")
    ]
    assert owners[0] == owners[1]
    assert all(owners[0].values())
    run([str(prompts), "prefix=7"], tmp_path / "flat", "prompts")
    assert json.loads((tmp_path / "flat" / "manifest.json").read_text())["settings"]["prefix"] == 7


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "inputs: {prompts: p.jsonl}\nout: o\nprefx: 3",
            [],
            r"prepare\.yaml:3: unknown key prefx; did you mean prefix?",
        ),
        (
            "inputs: {prompts: p.jsonl}\nout: o\nprefix: 0",
            [],
            r"prepare\.yaml:3: prefix is 0, expected ",
        ),
        (
            "inputs: {prompts: p.jsonl}\nout: o",
            ["pii=hide"],
            r"override 'pii=hide': pii is 'hide', expected 'drop'",
        ),
        (
            "inputs: {}\nout: o",
            [],
            r"prepare\.yaml:1: inputs names no files; give demonstrations, rankings, prompts",
        ),
        ("inputs: {prompts: []}\nout: o", [], r"prepare\.yaml:1: inputs.prompts is \[\], expected"),
        ("out: o", [], "missing section inputs"),
        (
            "inputs: {prompts: p}\nout: o\nprefix_unit: tokens",
            [],
            r"yaml:3: prefix_unit counts tokens; set tokenizer",
        ),
        (
            "inputs: {prompts: p}\nout: o\ntest_fraction: 0.95",
            [],
            r"yaml:3: test_fraction and valid_fraction add up to",
        ),
        (
            "inputs: {prompts: p}\nout: o\nmin_chars: 30000",
            [],
            r"yaml:3: min_chars 30000 is above max_chars 20000",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prepare_all(load(PrepareConfig, path, overrides))
    assert "\n" not in str(error.value)


def test_the_configuration_of_the_documentation_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (tmp_path / "prepare.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    config = load(PrepareConfig, tmp_path / "prepare.yaml")
    assert config.inputs.rankings == {
        "oasst": ["raw/oasst.jsonl"],
        "summaries": ["raw/s1.jsonl", "raw/s2.jsonl"],
    }
    assert config.inputs.demonstrations == {
        "written": ["raw/written.jsonl.gz"],
        "chat": ["raw/chat.parquet"],
    }


def test_files_without_an_output_folder_are_rejected(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"expected CONFIG.yaml, or record files and --out FOLDER"):
        run([str(jsonl({"prompt": "p"}))], None, "prompts")


def test_an_interrupted_run_resumes_to_the_same_bytes(
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: list[Any] = [
        {"prompt": f"q {i % 90} {'me@corp.com' * (i % 9 == 0)}", "user_id": f"{i % 5}"}
        for i in range(150)
    ]
    rows[3], rows[77] = "{", {"prompt": ""}
    files = [jsonl(*rows[:70], name="a.jsonl"), jsonl(*rows[70:], name="b.jsonl")]
    rules = Rules(valid_fraction=0.3, test_fraction=0.3, max_per_user=7)
    expected = prepare(files, tmp_path / "whole", "prompts", rules, "quarantine")
    monkeypatch.setattr("fastrlhf.data.prepare.prepare._CHUNK", 20)
    monkeypatch.setattr("fastrlhf.data.prepare.prepare._SAVE_EVERY", 30)
    caplog.set_level("INFO", logger="fastrlhf")
    add = WorkFiles.add
    for stop_at in (10, 60, 40):  # appends; the second is past a resume point
        left = iter(range(stop_at))

        def stop(self: WorkFiles, *arguments: Any, left: Any = left, **row: int) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            add(self, *arguments, **row)

        monkeypatch.setattr(WorkFiles, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(files, tmp_path / "out", "prompts", rules, "quarantine")
        assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(WorkFiles, "add", add)
    caplog.clear()
    assert prepare(files, tmp_path / "out", "prompts", rules, "quarantine") == expected
    assert caplog.messages[0].startswith("resuming an interrupted run after ")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "rejected.jsonl" in names
    assert all(
        (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for name in names
    )


def test_work_files_of_other_settings_or_inputs_are_discarded(
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fastrlhf.data.prepare.prepare._CHUNK", 5)
    monkeypatch.setattr("fastrlhf.data.prepare.prepare._SAVE_EVERY", 5)
    path = jsonl(*[{"prompt": f"question {i}"} for i in range(30)], "{")
    with pytest.raises(UserError, match=r"data\.jsonl:31: malformed JSON"):
        prepare(path, tmp_path / "out", "prompts", OPEN)
    assert json.loads((tmp_path / "out" / ".work" / "state.json").read_text())["state"][
        "after"
    ] == [0, 30]
    caplog.set_level("INFO", logger="fastrlhf")
    manifest = prepare(path, tmp_path / "out", "prompts", OPEN, "quarantine")
    assert not any("resuming" in message for message in caplog.messages)
    assert (manifest["kept"], manifest["read"]) == (30, 31)
    assert not (tmp_path / "out" / ".work").exists()


PROMPTS = st.builds(
    lambda start, end, user, pii: {
        "prompt": f"{start} {end}" + (" a@corp.com" if pii else ""),
        **({"user_id": user} if user else {}),
    },
    st.sampled_from(["ask", "Ask", "tell me", "TELL  me", "long beginning", "x"]),
    st.sampled_from(["", "a", "b", "again", "Again and more", "much longer than that"]),
    st.sampled_from([None, "u", "v", "w", "x", "y", "z"]),
    st.booleans(),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.one_of(PROMPTS, st.just({"prompt": 3})), min_size=1, max_size=60),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("pii", ["drop", "redact"])
def test_the_rules_hold_for_any_records(
    tmp_path: Path, rows: list[dict[str, Any]], seed: int, pii: Any
) -> None:
    """No user is in two splits, no two kept prompts share a long prefix, and the counts add up."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = Rules(
        seed=seed, prefix=10, max_per_user=4, valid_fraction=0.3, test_fraction=0.3, pii=pii
    )
    manifest = prepare(path, tmp_path / "out", "prompts", rules, "quarantine")
    splits = {split: kept(tmp_path / "out", split) for split in SPLITS}
    everyone = [row for rows in splits.values() for row in rows]
    owners = [{row["user_id"] for row in rows if "user_id" in row} for rows in splits.values()]
    assert len(set().union(*owners)) == sum(map(len, owners))
    starts = sorted(" ".join(row["prompt"].casefold().split()) for row in everyone)
    for one, other in itertools.pairwise(starts):
        assert one[:10] != other[:10]
    assert (
        max(Counter(row["user_id"] for row in everyone if "user_id" in row).values(), default=0)
        <= 4
    )
    assert not any("@" in row["prompt"] for row in splits["train"])
    assert manifest["read"] == len(rows) == len(everyone) + sum(manifest["dropped"].values())
    assert manifest["dropped"]["malformed"] == sum(row["prompt"] == 3 for row in rows)


def test_planted_records_of_a_large_corpus_are_found_in_any_order(tmp_path: Path) -> None:
    """Run the check of bench/prepare.py, which plants the records, at a hundredth of its size."""
    cap = 50
    corpus, shuffled = tmp_path / "corpus.jsonl", tmp_path / "shuffled.jsonl"
    write_corpus(corpus, prompts=12_000, users=1000, cap=cap)
    manifest = prepare(corpus, tmp_path / "out", "prompts", Rules(max_per_user=cap))
    found = check(corpus, tmp_path / "out", manifest, cap)
    assert found.pop("users_in_two_splits") == found.pop("unaccounted") == 0
    assert found == dict.fromkeys(found, 1.0)
    assert manifest["dropped"]["duplicates"] > 300
    assert len(manifest["personal_data"]) == 7
    lines = corpus.read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    shuffled.write_text("".join(lines))
    again = prepare(shuffled, tmp_path / "again", "prompts", Rules(max_per_user=cap))
    assert again["outputs"] == manifest["outputs"]


def test_every_path_is_checked_before_the_first_record_is_read(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Inputs and outputs, of the last kind too: each kind may take an hour."""
    rows = jsonl({"prompt": "p", "response": "r", "user_id": "u"}, name="d.jsonl")
    prompts = jsonl({"prompt": "p", "user_id": "u"}, name="p.jsonl")
    out = tmp_path / "out"
    inputs = {"demonstrations": str(rows), "prompts": str(tmp_path / "pp.jsonl")}
    config = PrepareConfig.model_validate({"inputs": inputs, "out": str(out)})
    with pytest.raises(UserError, match=r"pp\.jsonl: no such file"):
        prepare_all(config)
    assert not (out / "demonstrations" / "manifest.json").exists()
    out.mkdir(exist_ok=True)
    (out / "prompts").write_text("a file in the place of the folder")
    config = PrepareConfig.model_validate(
        {"inputs": inputs | {"prompts": str(prompts)}, "out": str(out)}
    )
    with pytest.raises(UserError, match=r"prompts: cannot be written"):
        prepare_all(config)
    assert not (out / "demonstrations" / "manifest.json").exists()
