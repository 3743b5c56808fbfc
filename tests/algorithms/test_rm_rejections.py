"""Rankings that a reward model cannot learn from are refused, or set aside and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.batches import ranking_tokens
from fastrlhf.data.datasets import check_ranking_sizes, load_rankings
from fastrlhf.data.records import Counts
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
from fastrlhf.errors import UserError

GOOD = '{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2.5, 1], "labeler_id": 7, "user_id": "u"}'
BAD = {
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2, 3]}': '"ranks" has 3 entries for 2 responses',
    '{"prompt": "p", "responses": ["a"], "ranks": [1]}': '"responses" has 1 entry',
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [2, 2]}': '"ranks" are all equal',
    '{"prompt": "p", "responses": ["a", ""], "ranks": [1, 2]}': '"responses" item 2 is empty',
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [NaN, 2]}': '"ranks" item 1 is NaN',
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, Infinity]}': '"ranks" item 2 is Infinity',
    '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, null]}': '"ranks" item 2 is null',
    '{"prompt": "", "responses": ["a", "b"], "ranks": [1, 2]}': '"prompt" is empty',
    '{"prompt": "p", "chosen": "a", "rejected": " "}': '"rejected" is empty',
}
LIMITS = {"max_prompt_tokens": 9, "max_response_tokens": 9}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a b c p"], 257, folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize(("line", "reason"), BAD.items())
def test_refused_with_file_and_line(line: str, reason: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UserError) as error:
        load_rankings(path, tokenizer, **LIMITS)  # type: ignore[arg-type]
    message = str(error.value)
    assert (
        message.startswith(f"{path}:2: {reason}") and "\n" not in message and "on_error" in message
    )


def test_quarantined_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    path, rejected = tmp_path / "rankings.jsonl", tmp_path / "rejected.jsonl"
    path.write_text("\n".join([GOOD, *BAD, GOOD]) + "\n")
    loaded, counts = load_rankings(
        path, tokenizer, **LIMITS, on_error="quarantine", rejected=rejected
    )  # type: ignore[arg-type]
    assert counts == Counts(read=len(BAD) + 2, kept=2, rejected=len(BAD))
    assert [ranking.ranks for ranking in loaded] == [(1, 2.5, 1)] * 2
    assert (loaded[0].labeler_id, loaded[0].user_id) == ("7", "u")
    rows = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [row["source"] for row in rows] == [f"{path}:{line}" for line in range(2, len(BAD) + 2)]
    for row, reason in zip(rows, BAD.values(), strict=True):
        assert row["reason"].startswith(reason)


def test_a_group_above_the_token_budget_is_refused_before_training(
    tmp_path: Path, tokenizer: Any, caplog: Any
) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text(GOOD + "\n" + '{"prompt": "pp", "responses": ["aaa", "b"], "ranks": [1, 2]}\n')
    loaded, _ = load_rankings(path, tokenizer, **LIMITS)  # type: ignore[arg-type]

    def cost(ranking: Any) -> int:
        return ranking_tokens(ranking, shared_prompt=False)

    assert [cost(ranking) for ranking in loaded] == [9, 10]
    with caplog.at_level("INFO", "fastrlhf"):
        check_ranking_sizes(loaded, cost, 10)
        check_ranking_sizes(loaded, cost, None)
    assert "longest prompt with its responses: 10 tokens (K = 2) of 10" in caplog.messages
    assert "longest prompt with its responses: 10 tokens (K = 2)" in caplog.messages
    with pytest.raises(
        UserError,
        match=r"2 responses has 10 tokens and .*max_tokens_per_micro_batch is 9; raise it to 10 ",
    ):
        check_ranking_sizes(loaded, cost, 9)
