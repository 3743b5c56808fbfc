"""Preparing prompts: the rules by example, independence of the input order, no leaks."""

from __future__ import annotations

import hashlib
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

from fastrlhf.data.prepare.prepare import prepare
from fastrlhf.data.prepare.rules import SPLITS, Rules
from fastrlhf.data.records import read_records
from fastrlhf.errors import UserError


def test_prompts_that_share_a_long_prefix_are_one(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    long = "Translate the following sentence to French, and keep names: "
    path = jsonl(
        {"prompt": long + "one"},
        {"prompt": long.upper() + "  two"},
        {"prompt": long.replace(" ", "  ") + "three"},
        {"prompt": long[:20]},
        {"prompt": long[:21]},
        {"prompt": " " + long[:20].upper()},
    )
    manifest = prepare(
        path, tmp_path / "out", "prompts", Rules(prefix=40, valid_fraction=0.0, test_fraction=0.0)
    )
    prompts = sorted(
        " ".join(row["prompt"].casefold().split())[:40] for row in kept(tmp_path / "out")
    )
    assert prompts == sorted(
        [" ".join(long.casefold().split())[:40], long[:20].casefold().strip(), long[:21].casefold()]
    )
    assert manifest["dropped"]["duplicates"] == 3


def test_a_shared_system_turn_makes_no_duplicates(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    system = {"role": "system", "content": "You are a kind assistant. " * 20}
    rows = [{"prompt": [system, {"role": "user", "content": f"question {i}"}]} for i in range(3)]
    assert prepare(jsonl(*rows, rows[0]), tmp_path / "out", "prompts", OPEN)["kept"] == 3


def test_a_user_keeps_at_most_the_cap_whoever_comes_first(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{user} asks {i}", "user_id": user} for user in ("a", "b") for i in range(10)
    ]
    rows += [{"prompt": f"nobody asks {i}"} for i in range(10)]
    capped = Rules(max_per_user=4, valid_fraction=0.0, test_fraction=0.0)
    manifest = prepare(jsonl(*rows), tmp_path / "out", "prompts", capped)
    users = Counter(row.get("user_id") for row in kept(tmp_path / "out"))
    assert users == {"a": 4, "b": 4, None: 10}
    assert manifest["dropped"]["over_user_cap"] == 12
    other = prepare(
        jsonl(*rows),
        tmp_path / "other",
        "prompts",
        Rules(seed=5, max_per_user=4, valid_fraction=0, test_fraction=0),
    )
    assert other["outputs"] != manifest["outputs"]


def test_personal_data_is_dropped_counted_and_written_nowhere(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    secrets = ["jane@corp.com", "415-555-0132", "4111 1111 1111 1111"]
    path = jsonl(
        {"prompt": f"mail {secrets[0]} or call {secrets[1]}"},
        {"prompt": "clean"},
        {"prompt": "the id tells", "user_id": "jim@corp.com"},
        {"prompt": [{"role": "user", "content": f"pay with {secrets[2]}"}]},
    )
    manifest = prepare(path, tmp_path / "out", "prompts", OPEN)
    assert manifest["dropped"]["personal_data"] == 3
    assert manifest["personal_data"] == {"card": 1, "email": 2, "phone": 1}
    report = [
        json.loads(line) for line in (tmp_path / "out" / "pii.jsonl").read_text().splitlines()
    ]
    assert [(hit["kind"], hit["source"], hit["split"], hit["action"]) for hit in report] == [
        (kind, f"{path}:{line}", "train", "dropped")
        for kind, line in (("email", 1), ("phone", 1), ("email", 3), ("card", 4))
    ]
    assert kept(tmp_path / "out") == [{"prompt": "clean"}]
    written = "".join(file.read_text() for file in (tmp_path / "out").iterdir())
    assert not any(secret in written for secret in [*secrets, "jim@corp.com"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "DATA_CARD.md",
        "manifest.json",
        "pii.jsonl",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]


def test_responses_are_searched_too(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "response": reply}
        for i, reply in enumerate(["fine", "I am at 8.8.8.8"])
    ]
    prepare(jsonl(*rows), tmp_path / "out", "demonstrations", OPEN)
    assert kept(tmp_path / "out") == [rows[0]]
    ranking = {
        "prompt": "p",
        "responses": ["a", "b", "jane@corp.com"],
        "ranks": [1, 2, 3],
        "labeler_id": "l",
    }
    clean = {**ranking, "prompt": "q", "responses": ["a", "b", "c"]}
    prepare(jsonl(ranking, clean), tmp_path / "out", "rankings", OPEN)
    assert kept(tmp_path / "out") == [clean]


def test_counts_add_up_and_the_manifest_describes_the_output(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[Any] = [
        {"prompt": f"question {i}", "user_id": f"u{i % 40}", "extra": i} for i in range(300)
    ]
    rows += [
        {"prompt": "x" * 99},
        {"prompt": "?"},
        {"prompt": 3},
        "{",
        rows[0],
        {"prompt": "me@corp.com"},
    ]
    path = jsonl(*rows)
    limits = Rules(min_chars=2, max_chars=98, max_per_user=7, valid_fraction=0.2, test_fraction=0.2)
    with pytest.raises(UserError, match=r"data\.jsonl:303: "):
        prepare(path, tmp_path / "out", "prompts", limits)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare(path, tmp_path / "out", "prompts", limits, on_error="quarantine")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["read"] == 306 == sum(manifest["dropped"].values()) + manifest["kept"]
    assert manifest["dropped"] == {
        "malformed": 2,
        "too_short": 1,
        "too_long": 1,
        "personal_data": 1,
        "duplicates": 1,
        "over_user_cap": 20,
    }
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    users = {}
    for split in SPLITS:
        file = tmp_path / "out" / f"{split}.jsonl"
        records = list(read_records(file, "prompts"))
        users[split] = {record.user_id for record in records}
        assert manifest["outputs"][file.name] == {
            "records": len(records),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        assert manifest["users"][split] == len(users[split]) > 0
    assert (
        not users["train"] & users["valid"]
        | users["train"] & users["test"]
        | users["valid"] & users["test"]
    )
    assert "| train |" in (tmp_path / "out" / "DATA_CARD.md").read_text()


def test_a_user_stays_in_its_split_when_data_is_added(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {i}", "user_id": f"u{i % 50}"} for i in range(200)]
    thirds = Rules(valid_fraction=0.3, test_fraction=0.3)
    prepare(jsonl(*rows[:100]), tmp_path / "few", "prompts", thirds)
    prepare(jsonl(*rows), tmp_path / "all", "prompts", thirds)
    for split in SPLITS:
        few, everything = (
            {row["user_id"] for row in kept(tmp_path / out, split)} for out in ("few", "all")
        )
        assert few == everything


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), files=st.integers(1, 3))
def test_the_result_does_not_depend_on_the_order_of_the_input(
    tmp_path: Path, seed: int, files: int
) -> None:
    rows = [
        {"prompt": f"ask {i % 60} " + "x" * (i % 3), "user_id": f"u{i % 7}"} for i in range(150)
    ]
    options = Rules(prefix=6, max_per_user=5, valid_fraction=0.3, test_fraction=0.2)

    def run(name: str, rows: list[dict[str, str]], files: int) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{part}.jsonl" for part in range(files)]
        for part, path in enumerate(paths):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[part::files]))
        prepare(paths, folder / "out", "prompts", options)
        return {split: (folder / "out" / f"{split}.jsonl").read_bytes() for split in SPLITS}

    expected = run("sorted", rows, 1)
    assert sum(len(content) for content in expected.values()) > 0
    assert run("shuffled", random.Random(seed).sample(rows, len(rows)), files) == expected


def test_invalid_settings_and_empty_splits(
    jsonl: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        UserError, match=r"train\.jsonl: the input would be overwritten by the output"
    ):
        prepare(jsonl({"prompt": "p"}, name="train.jsonl"), tmp_path)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        prepare(tmp_path / "none.jsonl", tmp_path / "out")
    prepare(jsonl({"prompt": "alone"}), tmp_path / "out", "prompts", Rules(test_fraction=0.0))
    assert "valid is empty: too few users for its share" in caplog.messages
    assert "test is empty: too few users for its share" not in caplog.messages


def test_personal_data_is_redacted_with_pii_redact(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    ranking = {
        "prompt": [{"role": "user", "content": "I am jane@corp.com"}],
        "responses": ["call 415-555-0132 or DE89 3704 0044 0532 0130 00 NOW", "no"],
        "ranks": [1, 2],
        "user_id": "jane@corp.com",
        "labeler_id": "8.8.8.8",
    }
    clean = {"prompt": "caf\u00e9 \uff21", "responses": ["a", "b"], "ranks": [1, 2], "user_id": "u"}
    redacting = Rules(pii="redact", valid_fraction=0, test_fraction=0)
    manifest = prepare(jsonl(ranking, clean), tmp_path / "out", "rankings", redacting)
    assert manifest["personal_data"] == {"email": 2, "iban": 1, "ip": 1, "phone": 1}
    assert (manifest["kept"], manifest["dropped"]["personal_data"]) == (2, 0)
    rows = {row["responses"][1]: row for row in kept(tmp_path / "out", "train")}
    assert rows["b"] == clean
    assert rows["no"]["prompt"] == [{"role": "user", "content": "I am [EMAIL]"}]
    assert rows["no"]["responses"] == ["call [PHONE] or [IBAN] NOW", "no"]
    assert rows["no"]["user_id"].startswith("user-")
    assert rows["no"]["labeler_id"].startswith("labeler-")


def test_only_pii_splits_are_searched(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"mail {i} to jane@corp.com", "user_id": str(i)} for i in range(60)]
    thirds: dict[str, float] = {"valid_fraction": 0.3, "test_fraction": 0.3}
    prepare(jsonl(*rows), tmp_path / "out", "prompts", Rules(**thirds))
    assert [len(kept(tmp_path / "out", split)) > 5 for split in SPLITS] == [False, True, True]
    manifest = prepare(
        jsonl(*rows), tmp_path / "all", "prompts", Rules(**thirds, pii_splits=list(SPLITS))
    )
    assert manifest["kept"] == 0
    assert (
        prepare(jsonl(*rows), tmp_path / "kept", "prompts", Rules(**thirds, pii="keep"))["kept"]
        == 60
    )


def test_prefixes_and_limits_in_tokens(
    jsonl: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path, tokenizer: Any
) -> None:
    start = "the cat sat on the mat. a dog ran after"
    rows = [{"prompt": f"{start} {i}"} for i in range(3)] + [{"prompt": "number " * 40}]
    length = len(tokenizer(start)["input_ids"])
    options: dict[str, Any] = {
        "tokenizer": str(tokenizer_folder),
        "valid_fraction": 0,
        "test_fraction": 0,
    }
    options |= {"prefix_unit": "tokens", "max_prompt_tokens": 40}
    manifest = prepare(jsonl(*rows), tmp_path / "out", "prompts", Rules(prefix=length, **options))
    assert (
        manifest["dropped"]["too_long"],
        manifest["dropped"]["duplicates"],
        manifest["kept"],
    ) == (1, 2, 1)
    assert manifest["prompt_length"]["train"][0] == length + 2
    longer = prepare(jsonl(*rows), tmp_path / "out", "prompts", Rules(prefix=length + 2, **options))
    assert longer["kept"] == 3


def test_the_card_counts_by_split_source_and_k(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    one = jsonl(
        *[
            {"prompt": f"p{i}", "responses": ["a", "bbb", "c"], "ranks": [1, 2, 2]}
            for i in range(40)
        ]
    )
    two = jsonl(
        *[{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)], name="two.jsonl"
    )
    manifest = prepare(
        {"a": [one], "b": [two]},
        tmp_path / "out",
        "rankings",
        Rules(valid_fraction=0.3, test_fraction=0.3),
    )
    assert (
        sum(manifest["sources"]["a"][split] for split in SPLITS)
        == manifest["sources"]["a"]["read"]
        == 40
    )
    assert sum(manifest["sources"]["b"][split] for split in SPLITS) == 20
    for split in SPLITS:
        rows = kept(tmp_path / "out", split)
        counts = Counter(str(len(row["responses"])) for row in rows)
        assert manifest["responses"][split] == counts
        assert manifest["pairs"][split] == 2 * counts["3"] + counts["2"]
        assert manifest["users"][split] == len(rows)
        assert manifest["response_length"][split][-1] == 2  # the mean of 1, 3 and 1, rounded
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "| a | 40 |" in card
    assert "| K | train | valid | test |" in card
