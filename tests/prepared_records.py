"""What the tests of `data prepare` share: rules without splits, and the records of an output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrlhf.data.prepare.rules import SPLITS, Rules

OPEN = Rules(valid_fraction=0.0, test_fraction=0.0)


def kept(out: Path, *splits: str) -> list[dict[str, Any]]:
    """Return the records of the given splits of an output folder, by default of all."""
    return [
        json.loads(line)
        for split in splits or SPLITS
        for line in (out / f"{split}.jsonl").read_text().splitlines()
    ]
