"""`data prepare` on a million prompts of 20,000 users with planted duplicates and personal data.

    python -m bench.prepare [--prompts 1000000] [--users 20000] [--folder FOLDER]

Prints one JSON line: seconds, peak memory, and the recall and precision with which the planted
duplicates, personal data and busy users were found. The same check at a smaller size is a test.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrlhf.data.prepare.prepare import prepare
from fastrlhf.data.prepare.rules import SPLITS, Rules

TEXT = (
    "the a cat dog model writes explains summarise please list how why what of in on and with "
    "about story code python email letter poem recipe travel history science answer question "
    "short long simple detail friend work plan week garden river music paint number sum table "
    "budget meeting report idea name"
)
WORDS = tuple(TEXT.split())
BUSY_PER_THOUSAND = 1  # users, who write twice the cap and more
DUPLICATES, PERSONAL, ALIKE = 0.05, 0.01, 0.01  # shares of the prompts
# Put together here, so that no scanner takes this file for a leak.
PII = {
    "email": "write to jane.doe@" + "corp.com today",
    "phone": "or call 415-555-" + "0132 then",
    "card": "charge 4111 1111 " + "1111 1111 now",
    "iban": "pay to DE89 3704 0044 " + "0532 0130 00 by noon",
    "ssn": "it is 219-09-" + "9999 there",
    "ip": "look at 8.8." + "8.8 first",
    "key": "with AKIA" + "ABCDEFGHIJKLMNOP set",
}
ALIKES = (
    "order 4111 1111 1111 1112",
    "version 1.2.3 at 10.0.0.1",
    "room 12-34-5678 at 10:30",
    "see @jane and 3.14159265358979",
    "sha 0123456789abcdef0123456789abcdef",
)


def write_corpus(path: Path, prompts: int, users: int, cap: int, seed: int = 0) -> None:
    """Write prompts as JSONL in random order.

    A prompt begins with the number of its group, which duplicates share, and ends in marks that say
    what was planted: "busy" (the user exceeds the cap), "pii KIND", "alike".
    """
    draw = random.Random(seed)
    rows = list(_rows(draw, prompts, users, cap))
    draw.shuffle(rows)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _rows(draw: random.Random, prompts: int, users: int, cap: int) -> Iterator[dict[str, str]]:
    busy = max(1, users * BUSY_PER_THOUSAND // 1000)
    left = prompts
    for user in range(busy):
        for _ in range(2 * cap):
            yield {"prompt": f"{_start(draw, left)} busy", "user_id": f"busy{user}"}
            left -= 1
    while left > 0:
        group, user = _start(draw, left), f"user{draw.randrange(users - busy)}"
        chance = draw.random()
        if chance < PERSONAL:
            kind = draw.choice(list(PII))
            yield {"prompt": f"{group} {PII[kind]} pii {kind}", "user_id": user}
        elif chance < PERSONAL + ALIKE:
            yield {"prompt": f"{group} {draw.choice(ALIKES)} alike", "user_id": user}
        else:
            yield {"prompt": f"{group} {_words(draw, 5)}", "user_id": user}
            if draw.random() < DUPLICATES and left > 1:
                left -= 1
                again = group.upper() if draw.random() < 0.5 else group.replace(" ", "  ")
                yield {
                    "prompt": f"{again} {_words(draw, 5)}",
                    "user_id": f"user{draw.randrange(users - busy)}",
                }
        left -= 1


def _start(draw: random.Random, number: int) -> str:
    """Return a unique beginning of more than 200 characters."""
    return f"{number:08d} {_words(draw, 45)}"


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def check(corpus: Path, out: Path, manifest: dict[str, Any], cap: int) -> dict[str, float]:
    """Return recall and precision of each filter, from the corpus, the splits and the reports."""
    planted, groups = _planted(corpus)
    kept = {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").open(encoding="utf-8")]
        for split in SPLITS
    }
    written = Counter(row["prompt"][:8] for rows in kept.values() for row in rows)
    busy = Counter(
        row["user_id"] for rows in kept.values() for row in rows if row["prompt"].endswith("busy")
    )
    reported = {
        int(json.loads(line)["source"].rpartition(":")[2]) for line in (out / "pii.jsonl").open()
    }
    missed = sum(" pii " in row["prompt"] for row in kept["train"])
    owners = {split: {row["user_id"] for row in rows} for split, rows in kept.items()}
    must = {group for group, dangerous in groups.items() if not dangerous}
    return {
        "duplicates_recall": sum(count == 1 for count in written.values()) / len(written),
        "duplicates_precision": len(must & set(written)) / len(must),
        "pii_recall": len(reported & planted) / (len(reported & planted) + missed),
        "pii_precision": len(reported & planted) / len(reported),
        "cap_recall": sum(count <= cap for count in busy.values()) / len(busy),
        "cap_precision": sum(count >= cap for count in busy.values()) / len(busy),
        "users_in_two_splits": (
            len(owners["train"] & owners["valid"] | owners["train"] & owners["test"])
            + len(owners["valid"] & owners["test"])
        ),
        "unaccounted": manifest["read"] - manifest["kept"] - sum(manifest["dropped"].values()),
    }


def _planted(corpus: Path) -> tuple[set[int], dict[str, bool]]:
    """Return the lines with personal data, and for each group whether all of it may be dropped."""
    lines, groups = set(), {}
    for number, line in enumerate(corpus.open(encoding="utf-8"), 1):
        prompt = json.loads(line)["prompt"]
        if " pii " in prompt:
            lines.add(number)
        groups[prompt[:8]] = " pii " in prompt or prompt.endswith("busy")
    return lines, groups


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="kept when given")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    corpus, rules = folder / "corpus.jsonl", Rules()
    if not corpus.exists():
        write_corpus(corpus, options.prompts, options.users, rules.max_per_user)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    manifest = prepare(corpus, folder / "out", "prompts", rules)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"prompts": manifest["read"], "seconds": round(seconds, 1), "peak_mib": peak // 1024}
    result |= {"peak_mib_before": grown // 1024, "dropped": manifest["dropped"]}
    print(json.dumps(result | check(corpus, folder / "out", manifest, rules.max_per_user)))
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
