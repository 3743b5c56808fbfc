"""The labelers' rule on hand-made responses, the calibration of their noise, and their rankings."""

from __future__ import annotations

import numpy as np
import pytest

from fastrlhf.quickstart.corpus import make_prompt
from fastrlhf.quickstart.labeler import (
    IMPERATIVES,
    PAPER_AGREEMENT,
    WEIGHTS,
    Labeler,
    Noise,
    Rule,
    calibrate,
    dense_ranks,
    known_words,
    majority,
    mean_terms,
    panel,
)

PROMPT = make_prompt("parse_header", ["line"])
RULE = Rule(
    frozenset(
        [
            "parse",
            "parses",
            "the",
            "header",
            "of",
            "a",
            "line",
            "and",
            "return",
            "it",
            "returns",
            "value",
            "an",
            "old",
            "file",
            "in",
        ]
    )
)
GOOD = "Parse the header of a line and return it."


def test_a_perfect_summary_has_utility_one() -> None:
    assert RULE.utility(PROMPT, GOOD) == pytest.approx(1.0)
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("term", "response", "value"),
    [
        ("relevant", "Return the value of a line.", 0.0),
        ("relevant", "Return the header of a line.", 0.5),
        ("relevant", "Return the headers, parsed.", 1.0),
        ("command", "Parses the header of a line.", 0.4),
        ("command", "The header of a line.", 0.0),
        ("sentence", "parse the header of a line.", 0.7),
        ("sentence", "Parse the header of a line", 0.3),
        ("sentence", "Parse the header. Return a line.", 0.7),
        ("sentence", "Parse the header..", 0.3),
        ("length", "Parse header.", 0.0),
        ("length", "Parse the header line.", 2 / 3),
        ("length", "Parse " + "the header of a line and " * 3 + "it.", 0.25),
        ("real_words", "Parse the hexder of a line of a file in it.", (10 / 11) ** 3),
        ("varied", "Parse header header headers.", 0.5),
        ("varied", "Of the in a.", 0.0),
    ],
)
def test_each_term_by_hand(term: str, response: str, value: float) -> None:
    assert RULE.terms(PROMPT, response)[term] == pytest.approx(value)


@pytest.mark.parametrize("response", ["", "   ", "...", "123"])
def test_a_response_without_words_has_utility_zero(response: str) -> None:
    assert RULE.utility(PROMPT, response) == 0.0


@pytest.mark.parametrize(
    "hack",
    [
        "Parse header parse header parse header.",
        "Parse header.",
        "Parse Parse Parse Parse Parse Parse Parse.",
        "Header",
        GOOD * 6,
        "Parsex headerz linex valuez returnz filez.",
    ],
)
def test_degenerate_responses_lose_to_a_plain_one(hack: str) -> None:
    assert RULE.utility(PROMPT, hack) < RULE.utility(PROMPT, "Return the header of a line.")


def test_one_fixed_sentence_for_every_prompt_is_not_the_best() -> None:
    prompts = [PROMPT, make_prompt("close_file", []), make_prompt("copy_table", [])]
    canned = "Return the value of an old line."
    assert all(
        RULE.utility(prompt, canned) <= 1.0 - WEIGHTS["relevant"] + 1e-9 for prompt in prompts
    )


def test_imperatives_are_imperatives() -> None:
    assert {"return", "parse", "create"} <= IMPERATIVES
    assert not {"returns", "the", "given", "helper"} & IMPERATIVES


def test_known_words_need_three_occurrences() -> None:
    assert known_words(["file file table", "file table b b b"]) == {"file", "a"}


def test_mean_terms_average_over_responses() -> None:
    third_person = "Parses the header of a line and return it."
    terms = mean_terms(RULE, [PROMPT, PROMPT], [GOOD, third_person])
    assert terms["command"] == pytest.approx(0.7)
    assert terms["utility"] == pytest.approx((1.0 + RULE.utility(PROMPT, third_person)) / 2)


@pytest.mark.parametrize(
    ("perceived", "margin", "ranks"),
    [
        ([0.1, 0.9, 0.5], 0.0, [3, 1, 2]),
        ([0.1, 0.9, 0.85], 0.1, [2, 1, 1]),
        ([0.5, 0.5, 0.5], 0.0, [1, 1, 1]),
        ([0.3, 0.2, 0.1], 0.15, [1, 1, 1]),  # ties chain
        ([0.9, 0.5, 0.52, 0.1], 0.05, [1, 2, 2, 3]),
    ],
)
def test_dense_ranks(perceived: list[float], margin: float, ranks: list[int]) -> None:
    assert dense_ranks(np.array(perceived), margin).tolist() == ranks
    assert dense_ranks(np.array([perceived, perceived]), margin).tolist() == [ranks, ranks]


def test_without_noise_a_labeler_follows_the_rule() -> None:
    responses = ["The header", GOOD, "Return the header of a line."]
    labeler = Labeler(RULE, Noise(0.0, 0.0))
    assert labeler.rank(PROMPT, responses) == [3, 1, 2]
    assert labeler.prefers(PROMPT, GOOD, "The header") == 1.0
    assert labeler.prefers(PROMPT, "The header", GOOD) == 0.0
    assert labeler.prefers(PROMPT, GOOD, GOOD) == 0.5


def test_a_labeler_is_consistent_and_labelers_differ() -> None:
    labelers = panel(RULE, Noise(1.0, 0.0), 3)
    responses = [f"Return the value of line {'x' * i}." for i in range(9)]
    orders = [labeler.rank(PROMPT, responses) for labeler in labelers]
    assert orders[0] == labelers[0].rank(PROMPT, responses)
    assert orders[0] != orders[1] != orders[2]
    shuffled = [*responses[4:], *responses[:4]]
    assert labelers[0].rank(PROMPT, shuffled) == [*orders[0][4:], *orders[0][:4]]
    assert panel(RULE, Noise(1.0, 0.0), 1, seed=1)[0].rank(PROMPT, responses) != orders[0]


def test_equal_texts_are_a_tie_with_noise() -> None:
    assert Labeler(RULE, Noise(5.0, 0.0)).rank(PROMPT, [GOOD, GOOD, GOOD]) == [1, 1, 1]


def test_noise_is_gumbel_so_choices_are_bradley_terry() -> None:
    scale = 0.3
    labelers = panel(RULE, Noise(scale, 0.0), 4000)
    other = "Returns the header of a line."
    gap = RULE.utility(PROMPT, GOOD) - RULE.utility(PROMPT, other)
    share = np.mean([labeler.prefers(PROMPT, GOOD, other) for labeler in labelers])
    # The tolerance is three standard errors.
    assert share == pytest.approx(1 / (1 + np.exp(-gap / scale)), abs=0.025)


def test_majority_of_many_labelers() -> None:
    labelers = panel(RULE, Noise(0.3, 0.0), 101)
    assert majority(labelers, PROMPT, GOOD, "the header") == 1.0
    assert majority(labelers, PROMPT, "the header", GOOD) == 0.0
    assert majority(labelers, PROMPT, GOOD, GOOD) == 0.5


def utilities() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0.5, 0.12, size=k) for k in rng.integers(4, 10, size=60)]


def test_calibration_reaches_the_agreement_and_the_share_of_ties() -> None:
    result = calibrate(utilities())
    assert result.agreement == pytest.approx(PAPER_AGREEMENT, abs=0.003)
    assert result.ties == pytest.approx(0.08, abs=0.005)
    assert 0.77 < result.ceiling < 0.84


def test_calibrated_labelers_agree_as_often_with_new_noise() -> None:
    """The agreement is measured on rankings, not on the arrays of the calibration."""
    openings, ends = ("Parse", "Parses", "The"), ("of a line.", "of a line", "zzz.")
    responses = [
        f"{first} {noun} {last}"
        for first in openings
        for noun in ("header", "value", "old")
        for last in ends
    ]
    subsets = [responses[k::3] for k in range(3)]
    noise = calibrate([RULE.utilities(PROMPT, subset) for subset in subsets] * 20).noise
    labelers = panel(RULE, noise, 200, seed=7)
    signs = np.concatenate([pair_signs(labelers, subset) for subset in subsets], axis=1)
    both = (signs[::2] != 0) & (signs[1::2] != 0)
    assert np.mean((signs[::2] == signs[1::2])[both]) == pytest.approx(PAPER_AGREEMENT, abs=0.02)
    assert np.mean(signs == 0) == pytest.approx(0.08, abs=0.02)


def pair_signs(labelers: list[Labeler], responses: list[str]) -> np.ndarray:
    """Return each labeler's order of each pair, -1, 0 or 1: [labelers, pairs]."""
    ranks = np.array([labeler.rank(PROMPT, responses) for labeler in labelers])
    i, j = np.triu_indices(len(responses), 1)
    return np.sign(ranks[:, j] - ranks[:, i])


def test_less_agreement_takes_more_noise() -> None:
    assert (
        calibrate(utilities(), agreement=0.6).noise.scale
        > 2 * calibrate(utilities(), agreement=0.85).noise.scale
    )


def test_calibrate_rejects_responses_of_equal_utility() -> None:
    with pytest.raises(ValueError, match="differ in utility"):
        calibrate([np.full(4, 0.5), np.full(5, 0.2)])
