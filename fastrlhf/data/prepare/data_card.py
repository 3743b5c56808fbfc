"""The numbers of a prepared data set and the page that shows them: tables like those of InstructGPT's appendix A."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrlhf.data.prepare.rules import SPLITS

_QUANTILES = (0, 25, 50, 75, 100)
_COLUMNS = ("mean", "std", "min", "25 %", "50 %", "75 %", "max")


def statistics(
    rows: np.ndarray, splits: Mapping[str, np.ndarray], sources: list[str], read: Counter[str]
) -> dict[str, Any]:
    """What the manifest tells of the kept rows (spool.py) of each split; `read` are the good records by source."""
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


def _spread(values: np.ndarray) -> list[float]:
    """Mean, standard deviation, and the quantiles; nothing of nothing."""
    if len(values) == 0:
        return []
    whole = [
        float(values.mean()),
        float(values.std()),
        *map(float, np.percentile(values, _QUANTILES)),
    ]
    return [round(value, 1) for value in whole]


def _histogram(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return {str(value): int(count) for value, count in zip(found, counts, strict=True)}


def data_card(manifest: dict[str, Any]) -> str:
    """The manifest as a page of Markdown."""
    kind, settings = manifest["kind"], manifest["settings"]
    unit = "tokens" if settings["tokenizer"] else "characters"
    counts = [
        (
            name,
            manifest["outputs"][f"{name}.jsonl"]["records"],
            manifest["users"][name],
            manifest["pairs"][name],
        )
        for name in SPLITS
    ]
    rankings = kind == "rankings"
    sizes = _table(
        ("split", kind, "users", *(["pairs"] if rankings else [])),
        [c[: 3 + rankings] for c in counts],
    )
    parts = [
        f"# Data card: {kind}\n",
        f"{manifest['kept']:,} of {manifest['read']:,} {kind} kept, prepared by fastrlhf {manifest['version']} as "
        "InstructGPT's were\n(arXiv 2203.02155, section 3.2).\n",
        sizes,
        "No user is in two splits. A record without a user_id counts as a user of its own.\n",
        "## Sources\n",
        _table(
            ("source", "read", *SPLITS),
            [(source, *row.values()) for source, row in manifest["sources"].items()],
        ),
        "## What was left out\n",
        _table(
            ("reason", "records"),
            [(r.replace("_", " "), n) for r, n in manifest["dropped"].items()],
        ),
        _personal_data(manifest),
        f"## Lengths in {unit}\n",
        _spreads("prompt", manifest["prompt_length"]),
        *(
            [_spreads("response (mean of a prompt's)", manifest["response_length"])]
            if kind != "prompts"
            else []
        ),
        "## Prompts of a user\n",
        _spreads("prompts", manifest["prompts_per_user"]),
        *(
            ["## Responses ranked for a prompt (K)\n", _responses(manifest["responses"])]
            if rankings
            else []
        ),
        _how(settings),
        "## Inputs\n",
        *(
            f"- {e['source']}: {e['name']} ({e['bytes']:,} bytes, sha256 {e['sha256']})"
            for e in manifest["inputs"]
        ),
    ]
    return "\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _spreads(what: str, spreads: dict[str, list[float]]) -> str:
    return _table(
        (what, *_COLUMNS), [(split, *spread) for split, spread in spreads.items() if spread]
    )


def _responses(histograms: dict[str, dict[str, int]]) -> str:
    sizes = sorted({int(K) for histogram in histograms.values() for K in histogram})
    rows = [(str(K), *(histograms[split].get(str(K), 0) for split in SPLITS)) for K in sizes]
    return _table(("K", *SPLITS), rows)


def _personal_data(manifest: dict[str, Any]) -> str:
    settings = manifest["settings"]
    if settings["pii"] == "keep":
        return "Personal data were not searched for.\n"
    kinds = (
        ", ".join(f"{kind} {count:,}" for kind, count in manifest["personal_data"].items())
        or "none"
    )
    return f"Personal data found in {', '.join(settings['pii_splits'])}, by kind: {kinds}.\n"


def _how(settings: dict[str, Any]) -> str:
    limits = f"Prompts of {settings['min_chars']:,} to {settings['max_chars']:,} characters"
    if settings["max_prompt_tokens"]:
        limits += f" and at most {settings['max_prompt_tokens']:,} tokens"
    actions = {
        "drop": "were dropped",
        "redact": "have [EMAIL] and so on in its place",
        "keep": "were kept",
    }
    same = f"{settings['prefix']} {settings['prefix_unit']}"
    return f"""## How
- {limits}.
- Records of {", ".join(settings["pii_splits"])} with an e-mail address, phone number, payment card, IBAN, US social
  security number, public IP address or secret key {actions[settings["pii"]]}. Names and street addresses are not
  detected.
- Prompts equal in their first {same} are one prompt; case and spacing do not count.
- At most {settings["max_per_user"]} prompts a user. Choices and splits were drawn with seed {settings["seed"]}.
"""
