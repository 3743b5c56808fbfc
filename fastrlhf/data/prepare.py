"""Clean a set of prompts as InstructGPT did (arXiv 2203.02155, section 3.2), the same way on any machine.

1. records too long, then those with personal data (pii.py), are dropped before anything is stored. The paper filters
the training split only; here every split, because samples of all of them end in reports 2. prompts that share a long
prefix are one prompt: one is kept 3. at most 200 prompts a user 4. train, valid and test by user, so that no user is
in two

Every choice is made by a keyed hash of the record's content: the same records in any order and any number of files
give the same bytes, and a user stays in its split when data are added. One pass streams the records to a spool file on
disk; memory holds under 100 bytes a record. Left out on purpose: fuzzy deduplication (MinHash).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastrlhf.data.pii import find_pii
from fastrlhf.data.records import (
    Counts,
    Demonstration,
    Kind,
    OnError,
    Paths,
    Prompt,
    PromptLike,
    Ranking,
    as_paths,
    read_records,
    to_json,
)
from fastrlhf.data.tokenize import prompt_text
from fastrlhf.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Settings:
    """What `prepare` does; written into the manifest."""

    kind: Kind = "prompts"
    seed: int = 1234
    prefix_chars: int = 200  # prompts equal in so many first characters are one; shorter ones when they are equal
    max_per_user: int = 200
    valid_fraction: float = 0.05  # of users
    test_fraction: float = 0.05
    min_chars: int = 1
    max_chars: int = 20_000

    def __post_init__(self) -> None:
        for name in ("prefix_chars", "max_per_user", "min_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1")
        if min(self.valid_fraction, self.test_fraction) < 0 or self.valid_fraction + self.test_fraction >= 1:
            raise UserError("valid_fraction and test_fraction must be 0 or more and leave users for train")


class _Index:
    """One entry a spooled record: three 64-bit hashes, and where its line is. Users without an id are one each."""

    def __init__(self) -> None:
        self.prompt, self.user, self.order, self.start = (array("Q") for _ in range(4))

    def add(self, prompt: int, user: int, order: int, start: int) -> None:
        self.prompt.append(prompt)
        self.user.append(user)
        self.order.append(order)
        self.start.append(start)


def prepare(
    paths: Paths, out: str | Path, settings: Settings | None = None, on_error: OnError = "strict"
) -> dict[str, Any]:
    """Write {train,valid,test}.jsonl, manifest.json and DATA_CARD.md into the folder `out`; return the manifest.

    Its counts add up: read = malformed + too_short + too_long + personal_data + duplicates + over_user_cap + kept.
    Personal data are counted by kind (a record may have several) and appear nowhere. The manifest is written last, so
    a folder with one is complete.
    """
    settings = settings or Settings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in as_paths(paths):
        if path.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(f"{path}: the input would be overwritten by the output; choose another output folder")
    (out / "manifest.json").unlink(missing_ok=True)
    with tempfile.TemporaryFile(dir=out) as spool:
        index, dropped, found = _spool(paths, settings, on_error, spool)
        rows = _unique(index)
        dropped["duplicates"] = len(index.order) - len(rows)
        capped = _cap_users(index, rows, settings.max_per_user)
        dropped["over_user_cap"] = len(rows) - len(capped)
        splits = _split_users(index, capped, settings)
        files = {f"{name}.jsonl": _write(out / f"{name}.jsonl", spool, index, rows) for name, rows in splits.items()}
    users = {name: len(np.unique(_column(index.user)[rows])) for name, rows in splits.items()}
    manifest = {
        "settings": asdict(settings),
        "inputs": sorted((_describe(path) for path in as_paths(paths)), key=lambda entry: entry["sha256"]),
        "read": sum(dropped.values()) + len(capped),
        "dropped": dropped,
        "personal_data": dict(sorted(found.items())),
        "kept": len(capped),
        "users": users,
        "outputs": files,
    }
    for name, rows in splits.items():
        if len(rows) == 0 and (name == "train" or getattr(settings, f"{name}_fraction") > 0):
            log.warning("%s is empty: too few users for its share", name)
    (out / "DATA_CARD.md").write_text(_data_card(manifest), encoding="utf-8")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    log.info("%s: kept %d of %d records, dropped %s", out, manifest["kept"], manifest["read"], dropped)
    return manifest


def _spool(
    paths: Paths, settings: Settings, on_error: OnError, spool: IO[bytes]
) -> tuple[_Index, dict[str, int], Counter[str]]:
    """Stream the records once: drop what the record alone decides, write the rest to `spool`, keep its hashes."""
    index, counts, dropped, found = _Index(), Counts(), Counter[str](), Counter[str]()
    position = 0
    for record in read_records(paths, settings.kind, on_error, None, counts):
        length = len(prompt_text(record.prompt))
        if not settings.min_chars <= length <= settings.max_chars:
            dropped["too_short" if length < settings.min_chars else "too_long"] += 1
        elif kinds := find_pii(_all_text(record)):
            dropped["personal_data"] += 1
            found.update(kinds)
        else:
            line = to_json(record).encode() + b"\n"
            order = _hash(settings.seed, b"order", line)
            user = order if record.user_id is None else _hash(settings.seed, b"user", record.user_id.encode())
            prompt = _hash(settings.seed, b"prompt", _dedup_key(record.prompt, settings.prefix_chars).encode())
            index.add(prompt, user, order, position)
            position += spool.write(line)
    reasons = {"malformed": counts.rejected}
    reasons |= {reason: dropped[reason] for reason in ("too_short", "too_long", "personal_data")}
    return index, reasons, found


def _all_text(record: Prompt | Demonstration | Ranking) -> str:
    """Everything a person may have written, ids too: an id may be an e-mail or IP address."""
    parts = [prompt_text(record.prompt), record.user_id or ""]
    if isinstance(record, Demonstration):
        parts.append(record.response)
    if isinstance(record, Ranking):
        parts += [*record.responses, record.labeler_id or ""]
    return "\n".join(parts)


def _dedup_key(prompt: PromptLike, prefix_chars: int) -> str:
    """The first characters without regard to case and spacing. System turns, the same for whole products, do not
    count.
    """
    if not isinstance(prompt, str):
        prompt = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return " ".join(prompt_text(prompt)[: 4 * prefix_chars].casefold().split())[:prefix_chars]


def _hash(seed: int, purpose: bytes, content: bytes) -> int:
    # `person` keeps the three hashes of a record independent: the split must not follow from the order.
    key = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key, person=purpose).digest(), "little")


def _column(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, dtype=np.uint64) if len(values) else np.zeros(0, dtype=np.uint64)


def _unique(index: _Index) -> np.ndarray:
    """One row of each prompt, the first by order. Sharing the first P characters is an equivalence, so hashes find the
    same groups as comparing neighbours in the sorted prompts would.
    """
    prompt = _column(index.prompt)
    rows = np.lexsort((_column(index.order), prompt))
    first = np.ones(len(rows), dtype=bool)
    first[1:] = prompt[rows][1:] != prompt[rows][:-1]
    return rows[first]


def _cap_users(index: _Index, rows: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` rows a user, the first by order."""
    user = _column(index.user)
    rows = rows[np.lexsort((_column(index.order)[rows], user[rows]))]
    _, starts, sizes = np.unique(user[rows], return_index=True, return_counts=True)
    return rows[np.arange(len(rows)) - np.repeat(starts, sizes) < limit]


def _split_users(index: _Index, rows: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """Rows of each split in the order they are written; a user's hash, as a number in [0, 1), decides."""
    rows = rows[np.argsort(_column(index.order)[rows], kind="stable")]
    place = _column(index.user)[rows] / 2.0**64
    test = place < settings.test_fraction
    valid = ~test & (place < settings.test_fraction + settings.valid_fraction)
    return {"train": rows[~test & ~valid], "valid": rows[valid], "test": rows[test]}


def _write(path: Path, spool: IO[bytes], index: _Index, rows: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for row in rows:
            spool.seek(index.start[row])
            line = spool.readline()
            digest.update(line)
            file.write(line)
    return {"records": len(rows), "sha256": digest.hexdigest()}


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _data_card(manifest: dict[str, Any]) -> str:
    settings = manifest["settings"]
    outputs = manifest["outputs"]
    rows = "".join(
        f"| {name} | {outputs[f'{name}.jsonl']['records']:,} | {manifest['users'][name]:,} |\n" for name in SPLITS
    )
    reasons = "".join(f"| {reason.replace('_', ' ')} | {count:,} |\n" for reason, count in manifest["dropped"].items())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in manifest["personal_data"].items()) or "none found"
    inputs = "".join(
        f"- {entry['name']} ({entry['bytes']:,} bytes, sha256 {entry['sha256']})\n" for entry in manifest["inputs"]
    )
    return f"""# Data card

{manifest["kept"]:,} of {manifest["read"]:,} {settings["kind"]} kept, prepared as InstructGPT's prompts were
(arXiv 2203.02155, section 3.2).

| split | records | users |
|---|---:|---:|
{rows}
No user is in two splits. A record without a user_id counts as a user of its own.

| dropped | records |
|---|---:|
{reasons}
Records with personal data, by kind (a record may have several): {kinds}.

## How
- Prompts of {settings["min_chars"]:,} to {settings["max_chars"]:,} characters.
- Records with an e-mail address, phone number, payment card, IBAN, US social security number, public IP address or
  secret key were dropped from every split. Names and street addresses are not detected.
- Prompts equal in their first {settings["prefix_chars"]} characters are one prompt; case and spacing do not count.
- At most {settings["max_per_user"]} prompts a user, drawn with seed {settings["seed"]}.

## Inputs
{inputs}"""
