"""Conversion of every foreign format by a small example; rows that do not fit are reported."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.convert import Source, convert
from fastrlhf.data.export import export
from fastrlhf.data.records import Demonstration, Kind, Prompt, Ranking, read_records
from fastrlhf.errors import UserError


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def assistant(text: str) -> Any:
    return {"role": "assistant", "content": text}


def converted(path: Path, source: Source, kind: Kind, **options: Any) -> list[Any]:
    out = path.parent / "out.jsonl"
    convert(path, source, kind, out, **options)
    return list(read_records(out, kind))


def test_preference_rows_of_trl_and_openrlhf(jsonl: Callable[..., Path]) -> None:
    path = jsonl(
        {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2, "labeler_id": "l"},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
            "user_id": "u",
        },
    )
    assert converted(path, "pairs", "rankings") == [
        Ranking("p", ("good", "bad"), (1, 2), None, "l"),
        Ranking([user("q")], ("good", "bad"), (1, 2)),
        Ranking([user("q")], ("good", "bad"), (1, 2), "u"),
    ]


def test_instruction_rows(jsonl: Callable[..., Path]) -> None:
    system: Any = {"role": "system", "content": "s"}
    path = jsonl(
        {"messages": [system, user("q"), assistant("a")]},
        {"prompt": "p", "completion": " c"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"instruction": "add", "input": "1 and 2", "output": "3"},
        {"instruction": "sing", "input": "", "output": "la"},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
    )
    assert converted(path, "pairs", "demonstrations") == [
        Demonstration([system, user("q")], "a"),
        Demonstration("p", " c"),
        Demonstration([user("q")], "a"),
        Demonstration("add\n\n1 and 2", "3"),
        Demonstration("sing", "la"),
        Demonstration([user("q")], "good"),
    ]
    assert converted(path, "pairs", "prompts")[2:4] == [
        Prompt([user("q")]),
        Prompt("add\n\n1 and 2"),
    ]


def test_transcripts(jsonl: Callable[..., Path]) -> None:
    start = (
        "\n\nHuman: hi there\n\nHuman: me again\n\nAssistant: hello"
        "\n\nHuman: why?\n\nbecause\n\nAssistant:"
    )
    path = jsonl({"chosen": start + " so", "rejected": start + " no\n\nreally"})
    prompt = [user("hi there\n\nme again"), assistant("hello"), user("why?\n\nbecause")]
    assert converted(path, "transcripts", "rankings") == [
        Ranking(prompt, ("so", "no\n\nreally"), (1, 2))
    ]
    assert converted(path, "transcripts", "demonstrations") == [Demonstration(prompt, "so")]
    assert converted(path, "transcripts", "prompts") == [Prompt(prompt)]


def message(role: str, text: str, *replies: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), "user_id": "u-" + text, **extra}


def test_trees(jsonl: Callable[..., Path]) -> None:
    deeper = message("prompter", "more", message("assistant", "only"))
    tree = message(
        "prompter",
        "root",
        message("assistant", "second", rank=1),
        message("assistant", "first", deeper, rank=0),
        message("assistant", "third", rank=2),
        message("assistant", "gone", message("prompter", "lost"), rank=3, deleted=True),
        message("assistant", "spam", rank=4, review_result=False),
        message("assistant", "unranked", rank=None),
    )
    path = jsonl({"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": tree})
    follow_up = [user("root"), assistant("first"), user("more")]
    assert converted(path, "trees", "rankings") == [
        Ranking([user("root")], ("second", "first", "third"), (1, 0, 2), "u-root")
    ]
    assert converted(path, "trees", "demonstrations") == [
        Demonstration([user("root")], "first", "u-root"),
        Demonstration(follow_up, "only", "u-more"),
    ]
    assert converted(path, "trees", "prompts") == [
        Prompt([user("root")], "u-root"),
        Prompt(follow_up, "u-more"),
    ]


BAD_ROWS: list[tuple[Source, Kind, Any, str]] = [
    (
        "pairs",
        "rankings",
        {"prompt": "p", "chosen": "a"},
        '"rejected" is missing or neither text nor turns',
    ),
    (
        "pairs",
        "rankings",
        {"chosen": "a", "rejected": "b"},
        'there is no "prompt"; add one, or use source transcripts',
    ),
    (
        "pairs",
        "rankings",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "differ before their last message",
    ),
    ("pairs", "rankings", {"prompt": "p", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
    (
        "pairs",
        "rankings",
        {"prompt": "p", "chosen": [user("a")], "rejected": "b"},
        "a response is not a single assistant message; expected exactly one",
    ),
    (
        "pairs",
        "demonstrations",
        {"text": "t"},
        r"no known keys \(found text\); expected messages",
    ),
    ("pairs", "demonstrations", {"messages": [user("a")]}, '"messages" has fewer than two entries'),
    (
        "transcripts",
        "rankings",
        {"chosen": "plain", "rejected": "text"},
        "not a transcript; expected text beginning",
    ),
    (
        "transcripts",
        "demonstrations",
        {"chosen": "\n\nHuman: alone"},
        "does not end in an assistant's reply",
    ),
    (
        "trees",
        "rankings",
        {"prompt": "text"},
        '"prompt" is no message with "replies"; expected one OpenAssistant tree',
    ),
    ("trees", "prompts", {"prompt": {"text": "x"}}, 'a message lacks "text" or a "role"'),
]


@pytest.mark.parametrize(("source", "kind", "row", "reason"), BAD_ROWS)
def test_rows_that_do_not_fit(
    jsonl: Callable[..., Path], source: Source, kind: Kind, row: Any, reason: str
) -> None:
    path = jsonl(row)
    with pytest.raises(UserError, match=rf"data\.jsonl:1: .*{reason}") as error:
        converted(path, source, kind)
    assert "\n" not in str(error.value)
    convert(
        path,
        source,
        kind,
        path.parent / "out.jsonl",
        on_error="quarantine",
        rejected=path.parent / "rejected.jsonl",
    )
    assert (path.parent / "out.jsonl").read_bytes() == b""
    assert json.loads((path.parent / "rejected.jsonl").read_text())["source"] == f"{path}:1"


def test_gzipped_output_is_the_same_bytes_each_time(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = jsonl({"prompt": "p", "chosen": "a", "rejected": "b"})
    counts = convert(path, "pairs", "rankings", tmp_path / "one.jsonl.gz")
    convert(path, "pairs", "rankings", tmp_path / "two.jsonl.gz")
    assert (counts.read, counts.kept) == (1, 1)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "one.jsonl.gz").read_bytes()))["responses"] == [
        "a",
        "b",
    ]


def test_wrong_output_name_and_kind(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = jsonl({"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"expected an output name ending in \.jsonl"):
        convert(path, "pairs", "rankings", tmp_path / "out.csv")
    with pytest.raises(
        UserError, match=r"data\.jsonl: cannot be written \((File exists|Not a directory)\)"
    ):
        convert(path, "pairs", "rankings", path / "out.jsonl")
    with pytest.raises(
        UserError, match="trees hold no text; choose one of rankings, demonstrations, prompts"
    ):
        convert(path, "trees", "text", tmp_path / "out.jsonl")


def test_neither_the_input_nor_an_earlier_output_is_lost(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p"})
    before, out = path.read_bytes(), tmp_path / "out.jsonl"
    out.write_text("earlier")
    with pytest.raises(UserError, match="the input would be overwritten"):
        convert(path, "pairs", "rankings", path)
    with pytest.raises(UserError, match=r"data\.jsonl:2: "):
        convert(path, "pairs", "rankings", out)
    assert (path.read_bytes(), out.read_text()) == (before, "earlier")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "out.jsonl"}


def exported(path: Path, target: Source, kind: Kind, **options: Any) -> list[Any]:
    out = path.parent / "exported.jsonl"
    export(path, target, kind, out, **options)
    return [json.loads(line) for line in out.read_text().splitlines()]


CHAT = [user("q"), assistant("a"), user("more")]


def test_records_as_rows_of_trl(jsonl: Callable[..., Path]) -> None:
    path = jsonl(
        {
            "prompt": "p",
            "responses": ["worst", "good", "fine"],
            "ranks": [3, 1, 1],
            "user_id": 7,
            "labeler_id": "l",
        },
        {"prompt": CHAT, "chosen": "yes", "rejected": "no"},
    )
    assert exported(path, "pairs", "rankings") == [
        {"prompt": "p", "chosen": "good", "rejected": "worst", "user_id": "7", "labeler_id": "l"},
        {"prompt": "p", "chosen": "fine", "rejected": "worst", "user_id": "7", "labeler_id": "l"},
        {"prompt": CHAT, "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    ]
    rows = [{"prompt": "p", "response": "r"}, {"prompt": CHAT, "response": "r", "user_id": "u"}]
    assert exported(jsonl(*rows), "pairs", "demonstrations") == [
        {"prompt": "p", "completion": "r"},
        {"prompt": CHAT, "completion": [assistant("r")], "user_id": "u"},
    ]
    assert exported(jsonl({"prompt": "p", "user_id": "u"}), "pairs", "prompts") == [
        {"prompt": "p", "user_id": "u"}
    ]


@pytest.mark.parametrize("layout", ["pairs", "transcripts", "trees"])
def test_what_is_exported_is_converted_back(jsonl: Callable[..., Path], layout: Source) -> None:
    rankings = [
        Ranking(CHAT, ("one", "two\n\nlines"), (1, 2), "u"),
        Ranking([user("other")], ("b", "a"), (1, 2), "v"),
    ]
    path = jsonl(
        *[{key: value for key, value in vars(r).items() if value is not None} for r in rankings]
    )
    export(path, layout, "rankings", path.parent / "there.jsonl")
    assert converted(path.parent / "there.jsonl", layout, "rankings") == rankings
    if layout != "transcripts":
        rows = [{"prompt": [user("q")], "response": "r", "user_id": "u"}]
        export(jsonl(*rows), layout, "demonstrations", path.parent / "there.jsonl")
        back = converted(path.parent / "there.jsonl", layout, "demonstrations")
        assert back == [Demonstration([user("q")], "r", "u")]
        export(jsonl({"prompt": [user("q")]}), layout, "prompts", path.parent / "there.jsonl")
        assert converted(path.parent / "there.jsonl", layout, "prompts") == [Prompt([user("q")])]


def test_a_tree_holds_a_complete_ranking(jsonl: Callable[..., Path]) -> None:
    ranking = Ranking([user("q")], ("a", "b", "c", "d"), (2, 1, 2, 0), "u")
    path = jsonl({key: value for key, value in vars(ranking).items() if value is not None})
    (tree,) = exported(path, "trees", "rankings")
    assert tree["tree_state"] == "ready_for_export"
    assert [reply["rank"] for reply in tree["prompt"]["replies"]] == [2, 1, 2, 0]
    assert converted(path.parent / "exported.jsonl", "trees", "rankings") == [ranking]


@pytest.mark.parametrize(
    ("target", "prompt", "reason"),
    [
        (
            "transcripts",
            [{"role": "system", "content": "s"}, user("q")],
            'a transcript has no turns of "system"',
        ),
        (
            "transcripts",
            "say\n\nHuman: hi",
            "begins with Human: or Assistant:, which a transcript would split",
        ),
        (
            "trees",
            [{"role": "system", "content": "s"}, user("q")],
            'a tree has no messages of "system"',
        ),
        (
            "trees",
            [user("q"), assistant("a")],
            "the prompt does not begin and end with a user's turn, as a tree must",
        ),
    ],
)
def test_what_a_layout_cannot_hold(
    jsonl: Callable[..., Path], target: Source, prompt: Any, reason: str
) -> None:
    path = jsonl({"prompt": prompt, "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=rf"data\.jsonl:1: .*{reason}"):
        exported(path, target, "rankings")
    assert exported(path, target, "rankings", on_error="quarantine") == []
    with pytest.raises(UserError, match="transcripts hold no prompts; choose one of rankings"):
        exported(path, "transcripts", "prompts")
