"""Make the data of the debug configurations: sums, ranked answers, and a tokenizer.

python configs/debug/make_data.py [FOLDER]        (default: runs/debug/data)
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrlhf.data.tokenize import train_bpe


def main(out: Path) -> None:
    """Write text, demonstrations, rankings, prompts and the tokenizer folder; always the same."""
    rng = random.Random(0)
    sums = [(a, b) for a in range(20) for b in range(20)]
    rng.shuffle(sums)
    prompts = [f"What is {a} plus {b}?" for a, b in sums]
    answers = [f" It is {a + b}." for a, b in sums]
    ranked = [
        [f" It is {a + b}.", f" It is {a + b + rng.randint(1, 9)}.", " No idea."] for a, b in sums
    ]
    text = [f"{a} plus {b} is {a + b}. {b} plus {a} is {b + a}." for a, b in sums * 2]

    out.mkdir(parents=True, exist_ok=True)
    _write(out / "text.jsonl", ({"text": line} for line in text))
    _write(
        out / "demonstrations.jsonl",
        ({"prompt": p, "response": a} for p, a in zip(prompts, answers, strict=True)),
    )
    _write(
        out / "rankings.jsonl",
        (
            {"prompt": p, "responses": r, "ranks": [1, 2, 3]}
            for p, r in zip(prompts, ranked, strict=True)
        ),
    )
    _write(out / "prompts.jsonl", ({"prompt": p} for p in prompts))
    train_bpe(text + prompts + answers, 320, out / "tokenizer")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/debug/data"))
