"""Manifest and data card of a prepared data set, with the tables of InstructGPT's appendix A."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np

from fastrlhf.data.prepare.rules import SPLITS

_QUANTILES = (0, 25, 50, 75, 100)
_COLUMNS = ("mean", "std", "min", "25 %", "50 %", "75 %", "max")


Spread: TypeAlias = list[float]
"""Mean, standard deviation and quantiles (_COLUMNS); empty if there are no values."""


class InputFile(TypedDict):
    """A file that was read."""

    source: str
    name: str
    bytes: int
    sha256: str


class OutputFile(TypedDict):
    """A file that was written."""

    records: int
    sha256: str


class Statistics(TypedDict):
    """Statistics of the kept records by split; `sources` also counts the records read."""

    users: dict[str, int]
    sources: dict[str, dict[str, int]]
    prompt_length: dict[str, Spread]
    response_length: dict[str, Spread]
    responses: dict[str, dict[str, int]]
    pairs: dict[str, int]
    prompts_per_user: dict[str, Spread]


class Manifest(Statistics):
    """Contents of manifest.json: read = kept + the sum of dropped."""

    version: str
    kind: str
    settings: dict[str, Any]
    inputs: list[InputFile]
    read: int
    dropped: dict[str, int]
    personal_data: dict[str, int]
    kept: int
    outputs: dict[str, OutputFile]


def statistics(
    rows: np.ndarray, splits: Mapping[str, np.ndarray], sources: list[str], read: Counter[str]
) -> Statistics:
    """Return the statistics of the kept rows (work_files.py) of each split.

    `splits` has the indices of each split's rows; `read` counts the good records by source.
    """
    counts = {
        name: np.bincount(rows["source"][index], minlength=len(sources))
        for name, index in splits.items()
    }
    return {
        "users": {name: len(np.unique(rows["user"][index])) for name, index in splits.items()},
        "sources": {
            source: {"read": read[source]} | {name: int(counts[name][number]) for name in splits}
            for number, source in enumerate(sources)
        },
        "prompt_length": {
            name: _spread(rows["prompt_length"][index]) for name, index in splits.items()
        },
        "response_length": {
            name: _spread(rows["response_length"][index[rows["responses"][index] > 0]])
            for name, index in splits.items()
        },
        "responses": {name: _histogram(rows["responses"][index]) for name, index in splits.items()},
        "pairs": {
            name: int(rows["pairs"][index].sum(dtype=np.int64)) for name, index in splits.items()
        },
        "prompts_per_user": {
            name: _spread(np.unique(rows["user"][index], return_counts=True)[1])
            for name, index in splits.items()
        },
    }


def _spread(values: np.ndarray) -> Spread:
    if len(values) == 0:
        return []
    spread = [values.mean(), values.std(), *np.percentile(values, _QUANTILES)]
    return [round(float(value), 1) for value in spread]


def _histogram(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return {str(value): int(count) for value, count in zip(found, counts, strict=True)}


def data_card(manifest: Manifest) -> str:
    """Return the manifest as a page of Markdown."""
    kind, settings = manifest["kind"], manifest["settings"]
    unit = "tokens" if settings["tokenizer"] else "characters"
    parts = [
        f"# Data card: {kind}\n",
        f"{manifest['kept']:,} of {manifest['read']:,} {kind} kept, prepared by fastrlhf "
        f"{manifest['version']} with the rules of InstructGPT\n(arXiv 2203.02155, section 3.2).\n",
        _sizes(manifest),
        "No user is in two splits. A record without a user_id counts as a separate user.\n",
        "## Sources\n",
        _table(
            ("source", "read", *SPLITS),
            [(source, *row.values()) for source, row in manifest["sources"].items()],
        ),
        "## Dropped records\n",
        _table(
            ("reason", "records"),
            [(r.replace("_", " "), n) for r, n in manifest["dropped"].items()],
        ),
        _personal_data(manifest),
        f"## Lengths in {unit}\n",
        _spreads("prompt", manifest["prompt_length"]),
        *(
            [_spreads("response (mean per prompt)", manifest["response_length"])]
            if kind != "prompts"
            else []
        ),
        "## Prompts per user\n",
        _spreads("prompts", manifest["prompts_per_user"]),
        *(
            ["## Responses ranked per prompt (K)\n", _responses(manifest["responses"])]
            if kind == "rankings"
            else []
        ),
        _method(kind, settings),
        "## Inputs\n",
        *(
            f"- {e['source']}: {e['name']} ({e['bytes']:,} bytes, sha256 {e['sha256']})"
            for e in manifest["inputs"]
        ),
    ]
    return "\n".join(parts) + "\n"


def _sizes(manifest: Manifest) -> str:
    kind = manifest["kind"]
    head = ("split", kind, "users", "pairs")
    rows = [
        (
            name,
            manifest["outputs"][f"{name}.jsonl"]["records"],
            manifest["users"][name],
            manifest["pairs"][name],
        )
        for name in SPLITS
    ]
    columns = 4 if kind == "rankings" else 3
    return _table(head[:columns], [row[:columns] for row in rows])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str | float, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: str | float) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _spreads(quantity: str, spreads: dict[str, Spread]) -> str:
    rows: list[tuple[str | float, ...]]
    rows = [(split, *spread) for split, spread in spreads.items() if spread]
    return _table((quantity, *_COLUMNS), rows)


def _responses(histograms: dict[str, dict[str, int]]) -> str:
    sizes = sorted({int(K) for histogram in histograms.values() for K in histogram})
    rows: list[tuple[str | float, ...]]
    rows = [(str(K), *(histograms[split].get(str(K), 0) for split in SPLITS)) for K in sizes]
    return _table(("K", *SPLITS), rows)


def _personal_data(manifest: Manifest) -> str:
    settings = manifest["settings"]
    if settings["pii"] == "keep":
        return "The records were not searched for personal data.\n"
    counts = [f"{kind} {count:,}" for kind, count in manifest["personal_data"].items()]
    kinds = ", ".join(counts) or "none"
    return f"Personal data found in {', '.join(settings['pii_splits'])}, by kind: {kinds}.\n"


def _method(kind: str, settings: dict[str, Any]) -> str:
    limits = f"Prompts of {settings['min_chars']:,} to {settings['max_chars']:,} characters"
    if settings["max_prompt_tokens"]:
        limits += f" and at most {settings['max_prompt_tokens']:,} tokens"
    actions = {
        "drop": "were dropped",
        "redact": "have a placeholder such as [EMAIL] in its place",
        "keep": "were kept",
    }
    splits, action = ", ".join(settings["pii_splits"]), actions[settings["pii"]]
    same = "are equal"
    if settings["prefix"]:
        same = f"share their first {settings['prefix']} {settings['prefix_unit']}"
    also = (
        " if their responses are the same too" if kind == "rankings" or same == "are equal" else ""
    )
    also *= kind != "prompts"
    return f"""## Method
- {limits}.
- Records of {splits} with an e-mail address, phone number, payment card, IBAN, US social security
  number, public IP address or secret key {action}. Names and street addresses are not detected.
- Prompts that {same} are duplicates{also}; case and spacing are ignored.
- At most {settings["max_per_user"]} prompts per user.
- Choices and splits were drawn with seed {settings["seed"]}.
"""
