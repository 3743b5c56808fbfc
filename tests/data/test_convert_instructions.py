"""Conversion of Alpaca, ShareGPT, PandaLM and KTO rows, and of .json arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.convert import Source, convert
from fastrlhf.data.export import export
from fastrlhf.data.records import Counts, Demonstration, Kind, Prompt, Ranking, read_records
from fastrlhf.errors import UserError


@pytest.fixture
def array(tmp_path: Path) -> Callable[..., Path]:
    """Return a function of rows that writes them as a .json array, as the projects do."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows, indent=4))
        return path

    return write


def converted(path: Path, source: Source, kind: Kind, **options: Any) -> list[Any]:
    out = path.parent / "new" / "folder" / "out.jsonl"  # is created
    convert(path, source, kind, out, **options)
    return list(read_records(out, kind))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_alpaca_arrays(array: Callable[..., Path]) -> None:
    path = array(
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"instruction": "Add.", "input": "1 + 2", "output": "3"},
        {
            "instruction": "And now?",
            "input": None,
            "output": "4",
            "system": "Be brief.",
            "history": [["1 + 2?", "3"]],
        },
    )
    turns = [turn("system", "Be brief."), turn("user", "1 + 2?"), turn("assistant", "3")]
    turns.append(turn("user", "And now?"))
    assert converted(path, "alpaca", "demonstrations") == [
        Demonstration("Name a colour.", "Blue."),
        Demonstration("Add.\n\n1 + 2", "3"),
        Demonstration(turns, "4"),
    ]
    assert converted(path, "alpaca", "prompts")[2] == Prompt(turns)
    assert converted(path, "pairs", "demonstrations")[1] == Demonstration("Add.\n\n1 + 2", "3")
    pairs = array({"instruction": "Add.", "input": "1", "chosen": "1", "rejected": "2"})
    assert converted(pairs, "alpaca", "rankings") == [Ranking("Add.\n\n1", ("1", "2"), (1, 2))]


def test_pandalm_has_one_ranking_for_each_annotator_with_a_preference(
    array: Callable[..., Path],
) -> None:
    # The layout of PandaLM's testset-v1.json; an input that is missing there is NaN.
    row = {
        "idx": 4,
        "motivation_app": "Google Search",
        "cmp_key": "cerebras-gpt-6.7B_pythia-6.9b",
        "instruction": "Come up with some search queries.",
        "input": float("nan"),
        "response1": "1. What is coding?",
        "response2": "1. how to code",
        "annotator1": 2,
        "annotator2": 0,
        "annotator3": 1,
    }
    responses = ("1. What is coding?", "1. how to code")
    path = array(row, {**row, "input": "About art.", "annotator1": 0, "annotator3": 0})
    assert converted(path, "pandalm", "rankings") == [
        Ranking("Come up with some search queries.", responses, (2, 1), labeler_id="annotator1"),
        Ranking("Come up with some search queries.", responses, (1, 2), labeler_id="annotator3"),
    ]
    assert converted(path, "pandalm", "prompts")[1] == Prompt(
        "Come up with some search queries.\n\nAbout art."
    )


def test_sharegpt_conversations(array: Callable[..., Path]) -> None:
    first = {"from": "human", "value": "Hello"}
    talk = [first, {"from": "gpt", "value": "Hi."}, {"from": "human", "value": "Tell me."}]
    path = array(
        {"id": "a", "conversations": [first, {"from": "gpt", "value": "Hi."}]},
        {"conversations": [*talk, {"from": "gpt", "value": "No."}], "system": "Be kind."},
    )
    prompt = [turn("user", "Hello"), turn("assistant", "Hi."), turn("user", "Tell me.")]
    assert converted(path, "sharegpt", "demonstrations") == [
        Demonstration([turn("user", "Hello")], "Hi."),
        Demonstration([turn("system", "Be kind."), *prompt], "No."),
    ]
    assert converted(path, "sharegpt", "prompts")[0] == Prompt([turn("user", "Hello")])
    pairs = array(
        {
            "conversations": talk,
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        }
    )
    assert converted(pairs, "sharegpt", "rankings") == [Ranking(prompt, ("Yes.", "No."), (1, 2))]


def test_kto_rows_with_a_bad_label_are_no_demonstrations(jsonl: Callable[..., Path]) -> None:
    good = {"prompt": "p", "completion": "good", "label": True}
    for label in (False, 0, "false", "False", 0.0):
        path = jsonl(good, {"prompt": "q", "completion": "bad", "label": label})
        with pytest.raises(UserError, match=rf'^{path}:2: "label" is .*not a demonstration'):
            converted(path, "pairs", "demonstrations")
        options: dict[str, Any] = {"on_error": "quarantine"}
        assert converted(path, "pairs", "demonstrations", **options) == [Demonstration("p", "good")]
        assert len(converted(path, "pairs", "prompts")) == 2  # the prompt itself is not bad
    chat = [turn("user", "p"), turn("assistant", "bad")]
    with pytest.raises(UserError, match="not a demonstration"):
        converted(jsonl({"messages": chat, "label": False}), "pairs", "demonstrations")
    other = jsonl({"prompt": "p", "completion": "c", "label": "math"})
    assert converted(other, "pairs", "demonstrations") == [Demonstration("p", "c")]


BAD: list[tuple[Source, Kind, Any, str]] = [
    ("sharegpt", "demonstrations", {"conversations": [{"from": "cat", "value": "x"}]}, "'cat'"),
    ("sharegpt", "demonstrations", {"conversations": ["x"]}, "from None"),
    ("sharegpt", "demonstrations", {"conversations": 5}, 'no "conversations"'),
    (
        "sharegpt",
        "demonstrations",
        {"conversations": [{"from": "human", "value": "x"}]},
        "does not end in a reply",
    ),
    ("sharegpt", "rankings", {"conversations": [{"from": "human", "value": "x"}]}, "from None"),
    ("alpaca", "demonstrations", {"output": "x"}, '"prompt" is empty'),
    ("alpaca", "demonstrations", {"instruction": "x"}, '"response" is null'),
    ("alpaca", "demonstrations", {"instruction": "x", "history": [1]}, "not laid out as alpaca"),
    ("alpaca", "rankings", {"instruction": "x", "chosen": "y"}, '"rejected" is missing'),
    ("pandalm", "rankings", {"instruction": "x"}, 'no "annotator1"'),
    ("pandalm", "rankings", {"instruction": "x", "annotator1": 3}, '"annotator1" is 3'),
    (
        "trees",
        "rankings",
        {"prompt": {"role": "prompter", "text": "x", "replies": [1]}},
        "laid out",
    ),
]


@pytest.mark.parametrize(("source", "kind", "row", "reason"), BAD)
def test_rows_that_do_not_fit_are_one_line(
    array: Callable[..., Path], source: Source, kind: Kind, row: Any, reason: str
) -> None:
    path = array(row)
    with pytest.raises(UserError, match=rf"^{path}:1: .*{reason}") as error:
        converted(path, source, kind)
    assert "\n" not in str(error.value)
    rejected = path.parent / "rejected.jsonl"
    counts = convert(path, source, kind, path.parent / "out.jsonl", "quarantine", rejected)
    assert (counts.kept, counts.rejected) == (0, 1)
    assert json.loads(rejected.read_text())["source"] == f"{path}:1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "x"},\n{"prompt": "y"', r"rows\.json:2: malformed JSON"),
        ("[1]", r"rows\.json:1: the array holds other values"),
        ("[]", r"rows\.json:1: the file has no record"),
        ("[" * 100_000, r"rows\.json:1: is nested too deeply"),
        ("{", r"rows\.json:1: malformed JSON"),
    ],
)
def test_damaged_arrays_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_records(tmp_path / "rows.json", "prompts"))
    counts = Counts()
    list(read_records(tmp_path / "rows.json", "prompts", "quarantine", counts=counts))
    assert counts.rejected == 1


def test_jsonl_that_is_named_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert list(read_records(tmp_path / "rows.json", "prompts")) == [Prompt("x"), Prompt("y")]


def test_records_are_not_written_in_these_layouts(jsonl: Callable[..., Path]) -> None:
    path = jsonl({"prompt": "x"})
    for layout in ("sharegpt", "alpaca", "pandalm"):
        with pytest.raises(UserError, match=r"choose --to pairs, transcripts or trees"):
            export(path, layout, "prompts", path.parent / "out.jsonl")
    with pytest.raises(UserError, match="pandalm hold no demonstrations"):
        converted(path, "pandalm", "demonstrations")
