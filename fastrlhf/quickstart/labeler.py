"""A simulated human labeler for one-line summaries of Python functions.

The rule (`Rule.utility`) follows PEP 257 for the first line of a docstring: "a phrase ending in a
period" that "prescribes the function's effect as a command", short enough for one line. The summary
should also be about this function, in real words, and without repetitions. Every term depends only
on the text, so a reward model can learn it and a policy can improve it.

People do not apply a rule identically: the paper's labelers agreed on 72.6 +- 1.5 % of pairs
(section 3.4). Each simulated labeler therefore adds independent Gumbel noise to the utility of
every response. Its choice between two responses then follows the Bradley-Terry model, P(a over b) =
sigmoid((u_a - u_b) / scale), which the reward model's loss assumes. `calibrate` finds the scale at
which two labelers agree as often as the paper's, and the margin within which two responses are a
tie.

Not supported: systematic differences between labelers; they differ by independent noise only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastrlhf.quickstart.corpus import prompt_name
from fastrlhf.quickstart.text import FUNCTION_WORDS, words

# Imperatives that begin summaries in the standard library and the scientific packages.
_VERBS = (
    "abort accept access acquire add adjust allocate allow analyze append apply approximate "
    "arrange ask assemble assert attach attempt bind broadcast build calculate call cancel cast "
    "change check choose clean clear close coerce collapse collect combine compare compile "
    "compress compute concatenate configure connect construct consume control convert copy count "
    "create decide declare decode decompress define delete delegate deserialize detach detect "
    "determine disable discard dispatch display divide do download draw drop dump edit emit "
    "enable encode ensure enter escape estimate evaluate exchange execute exit expand extend "
    "extract fetch figure fill filter find finish flatten flush fold format free gather generate "
    "get give group guess handle hide highlight hook ignore import include increment indicate "
    "infer initialize insert inspect install instantiate interpolate invert invoke iterate join "
    "kill launch list load lock log look make map mark merge modify move multiply normalize "
    "obtain offload open output override parse pass patch pause perform pick plot pop populate "
    "prepare preprocess print process produce provide pull push put query quote raise read "
    "recalculate receive reconstruct record reduce register release reload remove rename render "
    "reorder repeat replace report represent request reset reshape resize resolve restore resume "
    "retrieve return rewrite rotate round run save scale scan schedule search select send "
    "separate serialize set share show shuffle signal skip solve sort specify spawn split start "
    "stop store strip subtract sum swap synchronize take test toggle tokenize track transform "
    "translate truncate try turn unbind undo unlock unpack unregister unwrap update upload use "
    "validate verify visit wait walk warn wrap write yield"
)
IMPERATIVES = frozenset(_VERBS.split())
# Weights of the terms; a perfect summary has utility 1. The term "varied" multiplies their sum: if
# it were added, "Parse header parse header parse header." would have a high score.
WEIGHTS = {"relevant": 0.30, "command": 0.25, "sentence": 0.15, "length": 0.20, "real_words": 0.10}
TERMS = (*WEIGHTS, "varied")

PAPER_AGREEMENT = 0.726


@dataclass(frozen=True)
class Rule:
    """The scoring rule of all labelers, without their noise."""

    vocabulary: frozenset[str]
    """Words that count as real: see `known_words`."""

    def terms(self, prompt: str, response: str) -> dict[str, float]:
        """Return the six terms, each from 0 to 1, for a prompt made by `corpus.make_prompt`.

        - relevant: share of the words of the function's name that occur in the response, in any
          inflection.
        - command: 1 if it begins with an imperative ("Return"), 0.4 with its third person
          ("Returns"), else 0.
        - sentence: one sentence with a capital letter first, a full stop last, and neither a line
          break nor another stop inside.
        - length: 1 for 5 to 14 words; less by a third for each word below, an eighth for each
          above.
        - real_words: share of known words, cubed; one unknown word in ten costs a quarter.
        - varied: share of the words, except function words, that are not repetitions.
        """
        found = words(response)
        if not found:
            return dict.fromkeys(TERMS, 0.0)
        text = response.strip()
        content = [word for word in found if word not in FUNCTION_WORDS]
        stems = {_stem(word) for word in found}
        name = {_stem(word) for word in prompt_name(prompt)}
        capital, stop = text[0].isupper(), text.endswith(".") and not text.endswith("..")
        single = not any(mark in text[:-1] for mark in (". ", "! ", "? ", "\n"))
        excess = max(5 - len(found), 0) / 3 + max(len(found) - 14, 0) / 8
        return {
            "relevant": len(name & stems) / max(len(name), 1),
            "command": _command(found[0]),
            "sentence": 0.3 * capital + 0.4 * stop + 0.3 * (single and stop),
            "length": max(1.0 - excess, 0.0),
            "real_words": (sum(word in self.vocabulary for word in found) / len(found)) ** 3,
            "varied": len({_stem(word) for word in content}) / len(content) if content else 0.0,
        }

    def utility(self, prompt: str, response: str) -> float:
        """Return the score without noise, from 0 to 1: varied * weighted sum of the other terms."""
        terms = self.terms(prompt, response)
        return terms["varied"] * sum(weight * terms[name] for name, weight in WEIGHTS.items())

    def utilities(self, prompt: str, responses: Sequence[str]) -> NDArray[np.float64]:
        """Return the `utility` of each response, [K]."""
        return np.array([self.utility(prompt, response) for response in responses])


@dataclass(frozen=True)
class Noise:
    """Noise of the labelers."""

    scale: float
    """Scale of the Gumbel noise added to each utility."""
    tie_margin: float
    """Adjacent responses in a labeler's order are a tie if they differ by no more than this."""


@dataclass(frozen=True)
class Labeler:
    """One simulated labeler.

    It always ranks the same responses in the same order. The noise of two labelers is independent.
    """

    rule: Rule
    noise: Noise
    labeler_id: str = "labeler-0"
    seed: int = 0

    def rank(self, prompt: str, responses: Sequence[str]) -> list[int]:
        """Return the ranks [K] of the responses, 1 for the best.

        Ties have equal ranks and no rank is skipped (1, 2, 2, 3). Equal texts are a tie.
        """
        return dense_ranks(self.perceived(prompt, responses), self.noise.tie_margin).tolist()

    def prefers(self, prompt: str, first: str, second: str) -> float:
        """Return 1.0 if the first response ranks above the second, 0.0 if below, 0.5 if tied."""
        a, b = self.rank(prompt, [first, second])
        return 0.5 if a == b else float(a < b)

    def perceived(self, prompt: str, responses: Sequence[str]) -> NDArray[np.float64]:
        """Return the utilities [K] with this labeler's noise.

        The noise depends only on the labeler, the prompt and the text.
        """
        noise = [self._noise(prompt, response) for response in responses]
        return self.rule.utilities(prompt, responses) + self.noise.scale * np.array(noise)

    def _noise(self, prompt: str, response: str) -> float:
        key = "\0".join((str(self.seed), self.labeler_id, prompt, response))
        bits = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 11
        return float(-np.log(-np.log((bits + 0.5) / 2**53)))  # uniform -> standard Gumbel


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`: the noise, and statistics measured on the given responses."""

    noise: Noise
    agreement: float
    """Share of pairs on which two labelers agree, of those that neither calls a tie."""
    ties: float
    """Share of pairs that one labeler calls a tie."""
    ceiling: float
    """Share of one labeler's strict pairs that the rule puts in the same order: the best accuracy
    that a reward model can reach."""


def panel(rule: Rule, noise: Noise, size: int, seed: int = 0) -> list[Labeler]:
    """Return the labelers "labeler-0" to "labeler-(size-1)"."""
    return [Labeler(rule, noise, f"labeler-{i}", seed) for i in range(size)]


def majority(labelers: Sequence[Labeler], prompt: str, first: str, second: str) -> float:
    """Return the majority's preference: 1.0 for the first, 0.0 for the second, 0.5 tied."""
    votes = sum(labeler.prefers(prompt, first, second) - 0.5 for labeler in labelers)
    return 0.5 if votes == 0 else float(votes > 0)


def known_words(documents: Iterable[str], minimum: int = 3) -> frozenset[str]:
    """Return the words that occur at least `minimum` times in the documents.

    Of the words with a single letter, only "a" is returned.
    """
    counts = Counter(word for document in documents for word in words(document))
    common = (word for word, count in counts.items() if count >= minimum and len(word) > 1)
    return frozenset(common) | {"a"}


def dense_ranks(perceived: NDArray[np.float64], margin: float) -> NDArray[np.int64]:
    """Return the ranks [..., K] of values, 1 for the highest.

    A value within `margin` of the next higher one has the same rank.
    """
    order = np.argsort(-perceived, axis=-1, kind="stable")
    steps = -np.diff(np.take_along_axis(perceived, order, -1), axis=-1) > margin
    sorted_ranks = np.concatenate(
        [np.ones_like(steps[..., :1], dtype=np.int64), 1 + np.cumsum(steps, axis=-1)], axis=-1
    )
    ranks = np.empty_like(sorted_ranks)
    np.put_along_axis(ranks, order, sorted_ranks, -1)
    return ranks


def calibrate(
    utilities: Sequence[NDArray[np.float64]],
    *,
    agreement: float = PAPER_AGREEMENT,
    ties: float = 0.08,
    seed: int = 0,
) -> Calibration:
    """Find the noise with the given agreement between labelers and share of ties.

    `agreement` is the share of pairs on which two labelers agree, of those that neither calls a
    tie; `ties` is the share of all pairs that a labeler calls a tie. `utilities` has for each
    prompt the rule's utilities [K] of its K >= 2 responses. The scale is found by bisection with
    the same random draws at every step, so that agreement decreases monotonically with it. Raises
    ValueError if no two responses differ in utility.
    """
    if not any(np.ptp(u) > 0 for u in utilities):
        raise ValueError("calibrate needs prompts with responses that differ in utility")
    rng = np.random.default_rng(seed)
    blocks = []  # one for each K, to use array operations
    for size in sorted({len(u) for u in utilities}):
        block_GK = np.repeat(np.stack([u for u in utilities if len(u) == size]), 8, axis=0)
        blocks.append((block_GK, rng.gumbel(size=block_GK.shape), rng.gumbel(size=block_GK.shape)))
    low, high = 1e-4, 10.0
    for _ in range(25):
        scale = float(np.sqrt(low * high))
        result = _measure(blocks, scale, ties)
        low, high = (scale, high) if result.agreement > agreement else (low, scale)
    return result


def _measure(
    blocks: Sequence[tuple[NDArray[np.float64], ...]], scale: float, ties: float
) -> Calibration:
    """Measure two labelers with noise of this scale, at the margin that gives the share of ties."""
    first = [utility + scale * a for utility, a, _ in blocks]
    second = [utility + scale * b for utility, _, b in blocks]
    margin = _margin(first, ties)
    order_a, order_b = _pair_signs(first, margin), _pair_signs(second, margin)
    truth = _pair_signs([utility for utility, _, _ in blocks], 0.0)
    strict = (order_a != 0) & (order_b != 0)
    ordered = (order_a != 0) & (truth != 0)
    return Calibration(
        Noise(scale, margin),
        agreement=float(np.mean(order_a[strict] == order_b[strict])),
        ties=float(np.mean(order_a == 0)),
        ceiling=float(np.mean(order_a[ordered] == truth[ordered])),
    )


def _margin(perceived: list[NDArray[np.float64]], ties: float) -> float:
    """Return the margin at which a share `ties` of the pairs tie.

    It is found by bisection: ties are transitive, so it is not a quantile of the differences.
    """
    low, high = 0.0, float(max(np.ptp(block) for block in perceived))
    for _ in range(15):
        middle = (low + high) / 2
        too_few = np.mean(_pair_signs(perceived, middle) == 0) < ties
        low, high = (middle, high) if too_few else (low, middle)
    return high


def _pair_signs(blocks: list[NDArray[np.float64]], margin: float) -> NDArray[np.int64]:
    """Return the order of every pair of every row of the blocks [G, K].

    It is 1 if the first of the pair ranks above the second, -1 if below, 0 for a tie.
    """
    signs = []
    for block in blocks:
        ranks_GK = dense_ranks(block, margin)
        i, j = np.triu_indices(ranks_GK.shape[1], 1)
        signs.append(np.sign(ranks_GK[:, j] - ranks_GK[:, i]).ravel())
    return np.concatenate(signs)


def _stem(word: str) -> str:
    """Return a crude stem that is the same for "parse", "parses", "parsed" and "parsing"."""
    for suffix in ("ing", "ies", "ied", "ed", "es", "s", "e", "y"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


def _command(word: str) -> float:
    if word in IMPERATIVES:
        return 1.0
    singular = word.endswith("s") and bool({word[:-1], word[:-2], word[:-3] + "y"} & IMPERATIVES)
    return 0.4 if singular else 0.0


def mean_terms(rule: Rule, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Return the means of the rule's terms and of "utility" over prompts and their responses."""
    pairs = list(zip(prompts, responses, strict=True))
    terms = [rule.terms(prompt, response) for prompt, response in pairs]
    means = {name: float(np.mean([term[name] for term in terms])) for name in TERMS}
    utilities = [rule.utility(prompt, response) for prompt, response in pairs]
    return means | {"utility": float(np.mean(utilities))}
