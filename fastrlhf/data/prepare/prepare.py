"""Clean records as InstructGPT did (arXiv 2203.02155, section 3.2), the same way on any machine.

1. malformed, too short and too long records are left out  2. personal data (pii.py) are dropped or redacted in the
training split  3. prompts that share a long prefix are one prompt: one is kept  4. at most 200 prompts a user
5. train, valid and test by user, so that no user is in two

Every choice is made by a keyed hash of the record's content: the same records in any order and any number of files
give the same bytes, and a user stays in its split when data are added. One pass streams the records to work files on
disk (spool.py), from which a stopped run goes on; memory holds under 200 bytes a record. Left out on purpose: fuzzy
deduplication (MinHash).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastrlhf.config.yaml_file import load
from fastrlhf.data.files import Paths, Position, as_files, as_paths, make_folder
from fastrlhf.data.prepare.data_card import data_card, statistics
from fastrlhf.data.prepare.record_filter import Cleaner, PrepareStats, split_of
from fastrlhf.data.prepare.rules import SPLITS, PrepareConfig, Rules, named_sources
from fastrlhf.data.prepare.work_files import WorkFiles
from fastrlhf.data.records import (
    Kind,
    OnError,
    parse_record,
    placed_rows,
)
from fastrlhf.errors import UserError
from fastrlhf.progress import Meter

log = logging.getLogger(__name__)

_CHUNK = 512  # records tokenized in one call
_SAVE_EVERY = (
    20_000  # records between two places a stopped run can go on from, a few seconds of work
)


def run(arguments: list[str], out: Path | None, kind: Kind) -> None:
    """The command: CONFIG.yaml, or record files of one `kind` for the folder `out`; then settings as key=value."""
    paths = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    overrides = [argument for argument in arguments if argument not in paths]
    if len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml"):
        if out is not None:
            overrides.append(f"out={json.dumps(str(out))}")
        prepare_all(load(PrepareConfig, Path(paths[0]), overrides))
        return
    if not paths or out is None:
        raise UserError("expected CONFIG.yaml, or record files and --out FOLDER")
    given = [f"inputs.{kind}={json.dumps(paths)}", f"out={json.dumps(str(out))}"]
    config = load(PrepareConfig, Path(os.devnull), [*given, *overrides])
    prepare(getattr(config.inputs, kind), config.out, kind, config, config.on_error)


def prepare_all(config: PrepareConfig) -> dict[str, dict[str, Any]]:
    """`prepare` each kind of record that `config` names into a folder of its own; the manifests by kind."""
    kinds: tuple[Kind, ...] = ("demonstrations", "rankings", "prompts")
    inputs = {kind: sources for kind in kinds if (sources := getattr(config.inputs, kind))}
    return {
        kind: prepare(sources, Path(config.out) / kind, kind, config, config.on_error)
        for kind, sources in inputs.items()
    }


def prepare(
    sources: Paths | Mapping[str, Paths],
    out: str | Path,
    kind: Kind = "prompts",
    rules: Rules | None = None,
    on_error: OnError = "strict",
) -> dict[str, Any]:
    """Write {train,valid,test}.jsonl, manifest.json and DATA_CARD.md into the folder `out`; return the manifest.

    Its counts add up: read = kept + the records dropped, by reason. Personal data are told in pii.jsonl by kind and
    place, malformed records in rejected.jsonl; either is there only if it has lines. The manifest is written last, so
    a folder with one is complete; a run that was stopped goes on from the work files in `out`/.work.
    """
    rules, out = rules or Rules(), Path(out)
    named = named_sources(sources if isinstance(sources, Mapping) else as_paths(sources))
    files = [(name, file) for name, paths in sorted(named.items()) for file in as_files(paths)]
    _check_apart([file for _, file in files], out)
    make_folder(out)
    (out / "manifest.json").unlink(missing_ok=True)
    spool = WorkFiles(out / ".work", _fingerprint(files, kind, rules, on_error))
    try:
        tally = _scan(files, kind, rules, on_error, spool)
        rows = spool.rows()
        kept = _cap_users(rows, _unique(rows), rules.max_per_user)
        dropped = tally.dropped | {
            "duplicates": len(rows) - kept.unique,
            "over_user_cap": kept.unique - len(kept.index),
        }
        splits = _split_users(rows, kept.index, rules)
        outputs = {
            f"{name}.jsonl": _write(out / f"{name}.jsonl", spool, rows[index])
            for name, index in splits.items()
        }
        names = sorted(named)
        manifest = _manifest(kind, rules, files, tally, dropped, outputs) | statistics(
            rows, splits, names, tally.read_by
        )
    finally:
        spool.close()
    for name, index in splits.items():
        if len(index) == 0 and (name == "train" or getattr(rules, f"{name}_fraction") > 0):
            log.warning("%s is empty: too few users for its share", name)
    spool.remove(out)
    (out / "DATA_CARD.md").write_text(data_card(manifest), encoding="utf-8")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    lost = ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count
    )
    log.info(
        "%s: kept %d of %d records, left out %s",
        out,
        manifest["kept"],
        manifest["read"],
        lost or "none",
    )
    return manifest


def _check_apart(files: list[Path], out: Path) -> None:
    for path in files:
        if path.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(
                f"{path}: the input would be overwritten by the output; choose another output folder"
            )
        if not path.exists():
            raise UserError(f"{path}: no such file; check the path")


def _fingerprint(files: list[tuple[str, Path]], kind: Kind, rules: Rules, on_error: OnError) -> str:
    found = [
        (name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for name, file in files
    ]
    settings = rules.model_dump(include=set(Rules.model_fields), mode="json")
    return hashlib.sha256(json.dumps([found, kind, settings, on_error]).encode()).hexdigest()


# The pass over the records


def _scan(
    files: list[tuple[str, Path]], kind: Kind, rules: Rules, on_error: OnError, spool: WorkFiles
) -> PrepareStats:
    """Stream the records once: drop what the record alone decides, put the rest into the spool."""
    tally, after = PrepareStats.resume(spool.state)
    if spool.state is not None:
        log.info("going on after %d records of a run that was stopped", tally.counts.read)
    position, paths = Position(), [file for _, file in files]
    cleaner = Cleaner(rules, sorted({name for name, _ in files}), tally, spool)
    rows = placed_rows(
        paths,
        kind,
        lambda row: [parse_record(row, kind)],
        on_error,
        spool.reject,
        tally.counts,
        after=after,
        position=position,
    )
    saved = tally.counts.read
    with Meter(
        f"reading {kind}", sum(path.stat().st_size for path in paths), percent=True
    ) as progress:
        while chunk := list(islice(rows, _CHUNK)):
            cleaner.take([(place, files[place.file][0], record) for place, (record,) in chunk])
            progress.update(position.before + position.inside, f"{tally.counts.read:,} records")
            if tally.counts.read - saved >= _SAVE_EVERY:
                saved = tally.counts.read
                spool.save(tally.state(chunk[-1][0]))
    return tally


# What needs all records: rows of the spool


@dataclass
class _Kept:
    index: np.ndarray
    unique: int


def _unique(rows: np.ndarray) -> np.ndarray:
    """The row of each prompt that comes first by order. Sharing the first P characters is an equivalence, so hashes
    find the same groups as comparing neighbours in the sorted prompts would.
    """
    index = np.lexsort((rows["order"], rows["prompt"]))
    prompt = rows["prompt"][index]
    first = np.ones(len(index), dtype=bool)
    first[1:] = prompt[1:] != prompt[:-1]
    return index[first]


def _cap_users(rows: np.ndarray, unique: np.ndarray, limit: int) -> _Kept:
    """At most `limit` rows a user, the first by order."""
    user = rows["user"][unique]
    index = unique[np.lexsort((rows["order"][unique], user))]
    _, starts, sizes = np.unique(np.sort(user), return_index=True, return_counts=True)
    return _Kept(index[np.arange(len(index)) - np.repeat(starts, sizes) < limit], len(unique))


def _split_users(rows: np.ndarray, index: np.ndarray, rules: Rules) -> dict[str, np.ndarray]:
    """Rows of each split in the order they are written."""
    index = index[np.argsort(rows["order"][index], kind="stable")]
    split = split_of(rows["user"][index], rules)
    return {name: index[split == number] for number, name in enumerate(SPLITS)}


def _write(path: Path, spool: WorkFiles, rows: np.ndarray) -> dict[str, Any]:
    digest, lines = hashlib.sha256(), spool.lines()
    with path.open("wb") as file:
        for start, size in zip(rows["start"].tolist(), rows["bytes"].tolist(), strict=True):
            line = lines[start : start + size]
            digest.update(line)
            file.write(line)
    return {"records": len(rows), "sha256": digest.hexdigest()}


def _manifest(
    kind: Kind,
    rules: Rules,
    files: list[tuple[str, Path]],
    tally: PrepareStats,
    dropped: dict[str, int],
    outputs: dict[str, Any],
) -> dict[str, Any]:
    from fastrlhf import __version__

    kept = sum(entry["records"] for entry in outputs.values())
    return {
        "version": __version__,
        "kind": kind,
        "settings": rules.model_dump(include=set(Rules.model_fields), mode="json"),
        "inputs": sorted(
            ({"source": name} | _describe(file) for name, file in files), key=lambda e: e["sha256"]
        ),
        "read": tally.counts.read,
        "dropped": dropped,
        "personal_data": dict(sorted(tally.personal_data.items())),
        "kept": kept,
        "outputs": outputs,
    }


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
