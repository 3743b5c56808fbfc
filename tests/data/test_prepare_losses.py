"""What `data prepare` removes: duplicates of rankings, prefix=null, warnings, early mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrlhf.data.prepare.prepare import prepare, prepare_all, run
from fastrlhf.data.prepare.rules import Inputs, PrepareConfig, Rules
from fastrlhf.errors import UserError


def test_rankings_are_duplicates_by_prompt_responses_and_labeler(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    # Three labelers who rank the same three pairs of each of 40 prompts.
    rows = [
        {
            "prompt": f"{'Summarize the text. ' * 20}{number}",
            "chosen": f"good {pair}",
            "rejected": f"bad {pair}",
            "labeler_id": f"labeler {labeler}",
        }
        for number in range(40)
        for labeler in range(3)
        for pair in range(3)
    ]
    rules = Rules(max_per_user=1000, prefix=1000)
    manifest = prepare(jsonl(*rows), tmp_path / "out", "rankings", rules)
    assert (manifest["read"], manifest["kept"]) == (360, 360)
    swapped = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    manifest = prepare(jsonl(*rows, rows[5], swapped), tmp_path / "out", "rankings", rules)
    assert (manifest["kept"], manifest["dropped"]["duplicates"]) == (360, 2)
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert (
        "share their first 1000 characters are duplicates if their responses are the same" in card
    )


def test_templated_prompts_and_a_prefix_of_null(
    jsonl: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = "You are a helpful assistant. " * 10
    rows = [{"prompt": f"{start}{number}", "response": "x"} for number in range(30)]
    path = jsonl(*rows, rows[0], {**rows[0], "response": "y"})
    manifest = prepare(path, tmp_path / "out", "demonstrations", Rules(max_per_user=100))
    assert manifest["kept"] == 1
    assert (
        "31 of 32 records (97 %) removed: duplicates, which share the first 200 characters"
        in caplog.text
    )
    assert "raise prefix, or set prefix=null" in caplog.text
    caplog.clear()
    run([str(path), "prefix=null"], tmp_path / "out", "demonstrations")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["settings"]["prefix"], manifest["kept"]) == (None, 31)
    assert "removed" not in caplog.text
    card = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "Prompts that are equal are duplicates if their responses are the same too" in card
    prompts = jsonl(*({"prompt": row["prompt"]} for row in rows), {"prompt": rows[0]["prompt"]})
    manifest = prepare(prompts, tmp_path / "prompts", "prompts", Rules(prefix=None))
    assert manifest["kept"] == 30


def test_a_large_loss_names_its_reason_and_cure(
    jsonl: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{number} of a number", "user_id": "one"} for number in range(10)]
    prepare(jsonl(*rows), tmp_path / "out", "prompts", Rules(max_per_user=5, min_chars=2))
    assert "5 of 10 records (50 %) removed: users with more than max_per_user 5" in caplog.text
    caplog.clear()
    prepare(jsonl(*rows), tmp_path / "out", "prompts", Rules(max_per_user=8))
    assert "removed" not in caplog.text  # 20 % is not above 20 %


def test_mistakes_in_any_kind_are_found_before_the_first_is_read(
    jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    good, table = jsonl({"prompt": "x", "response": "y"}), jsonl(name="table.csv")
    for rankings, message in (
        ("missing.jsonl", r"missing\.jsonl: no such file"),
        (str(table), r"table\.csv: unknown kind of file"),
    ):
        config = PrepareConfig(
            inputs=Inputs.model_validate({"demonstrations": str(good), "rankings": rankings}),
            out=str(tmp_path / "out"),
        )
        with pytest.raises(UserError, match=message):
            prepare_all(config)
        assert not (tmp_path / "out").exists()
    config = config.model_copy(update={"tokenizer": "none", "inputs": Inputs()})
    with pytest.raises(UserError, match="none: no such tokenizer folder"):
        prepare_all(config)
