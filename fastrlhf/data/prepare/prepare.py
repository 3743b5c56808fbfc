"""Clean records as InstructGPT did (arXiv 2203.02155, section 3.2), reproducibly on any machine.

1. Drop malformed, too short and too long records.
2. Drop or redact personal data (pii.py) in the training split.
3. Of prompts that share a long prefix, keep one.
4. Keep at most 200 prompts per user.
5. Split into train, valid and test by user, so that no user is in two splits.

Every choice is made by a keyed hash of the record's content. So the same records in any order and
any number of files give the same bytes, and a user stays in its split when data is added. One pass
streams the records to work files on disk (work_files.py), from which an interrupted run resumes.
Memory use is under 200 bytes per record.

Not supported: fuzzy deduplication (MinHash).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from fastrlhf.config.yaml_file import load
from fastrlhf.data.files import (
    Paths,
    ReadPosition,
    as_files,
    as_paths,
    check_readable,
    make_folder,
)
from fastrlhf.data.prepare.data_card import (
    InputFile,
    Manifest,
    OutputFile,
    Statistics,
    data_card,
    statistics,
)
from fastrlhf.data.prepare.record_filter import PrepareStats, RecordFilter, split_of
from fastrlhf.data.prepare.rules import SPLITS, PrepareConfig, Rules, named_sources
from fastrlhf.data.prepare.work_files import WorkFiles
from fastrlhf.data.records import (
    Kind,
    OnError,
    located_rows,
    parse_record,
)
from fastrlhf.data.rejections import Rejections
from fastrlhf.data.tokenize import load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.progress import Meter

logger = logging.getLogger(__name__)

_HASH_VERSION = 2
_CHUNK = 512  # records tokenized in one call
_LARGE_LOSS = 0.2  # share of the records that may be removed for one reason without a warning
_REASONS = {
    "malformed": "malformed; see rejected.jsonl",
    "too_short": "prompts shorter than min_chars {min_chars}; lower it to keep them",
    "too_long": "prompts longer than max_chars {max_chars} or max_prompt_tokens "
    "{max_prompt_tokens}; raise them to keep them",
    "personal_data": "personal data found, see pii.jsonl; set pii=redact to keep the records",
    "duplicates": "duplicates, which share the first {prefix} {prefix_unit} of the prompt (null: "
    "all); raise prefix, or set prefix=null to remove equal records only",
    "over_user_cap": "users with more than max_per_user {max_per_user} prompts; raise it to keep "
    "them",
}
_SAVE_EVERY = 20_000  # records between two resume points, a few seconds of work


def run(arguments: list[str], out: Path | None, kind: Kind) -> None:
    """Run `data prepare` on CONFIG.yaml, or on record files of one `kind` for the folder `out`.

    Arguments of the form key=value are settings. Raises UserError if there are neither files nor a
    configuration, or `out` is missing.
    """
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


def prepare_all(config: PrepareConfig) -> dict[str, Manifest]:
    """Prepare each kind of record that `config` names into `out`/kind; return the manifests."""
    kinds: tuple[Kind, ...] = ("demonstrations", "rankings", "prompts")
    inputs = {kind: sources for kind in kinds if (sources := getattr(config.inputs, kind))}
    # Each kind may take an hour: a mistake in the last one is reported before the first is read.
    for kind, sources in inputs.items():
        _check_inputs([file for _, file in _named_files(sources)], Path(config.out) / kind)
    if config.tokenizer is not None:
        load_tokenizer(config.tokenizer)
    for kind in inputs:
        make_folder(Path(config.out) / kind)
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
) -> Manifest:
    """Write {train,valid,test}.jsonl, manifest.json and DATA_CARD.md to `out`; return the manifest.

    Its counts add up: read = kept + the records dropped, by reason. `pii.jsonl` lists each finding
    by kind and location; the value itself is never written. Malformed records are in
    rejected.jsonl. Either file exists only if it has lines. The manifest is written last, so a
    folder with one is complete. An interrupted run resumes from the work files in `out`/.work.
    """
    rules, out = rules or Rules(), Path(out)
    files = _named_files(sources)
    _check_inputs([file for _, file in files], out)
    make_folder(out)
    (out / "manifest.json").unlink(missing_ok=True)
    work_files = WorkFiles(out / ".work", _fingerprint(files, kind, rules, on_error))
    try:
        stats = _scan(files, kind, rules, on_error, work_files)
        rows = work_files.rows()
        unique = _unique(rows)
        kept = _cap_users(rows, unique, rules.max_per_user)
        dropped = stats.dropped | {
            "duplicates": len(rows) - len(unique),
            "over_user_cap": len(unique) - len(kept),
        }
        splits = _split_users(rows, kept, rules)
        outputs = {
            f"{name}.jsonl": _write(out / f"{name}.jsonl", work_files, rows[index])
            for name, index in splits.items()
        }
        numbers = statistics(
            rows, splits, sorted({name for name, _ in files}), stats.read_by_source
        )
        manifest = _manifest(kind, rules, files, stats, dropped, outputs, numbers)
    finally:
        work_files.close()
    _warn_about_empty_splits(splits, rules)
    work_files.remove(out)
    (out / "DATA_CARD.md").write_text(data_card(manifest), encoding="utf-8")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _log_counts(out, manifest)
    return manifest


def _named_files(sources: Paths | Mapping[str, Paths]) -> list[tuple[str, Path]]:
    """Return (source, file) of all files, by the name of the source."""
    named = named_sources(sources if isinstance(sources, Mapping) else as_paths(sources))
    return [(name, file) for name, paths in sorted(named.items()) for file in as_files(paths)]


def _warn_about_empty_splits(splits: dict[str, np.ndarray], rules: Rules) -> None:
    for name, index in splits.items():
        if len(index) == 0 and (name == "train" or getattr(rules, f"{name}_fraction") > 0):
            logger.warning("%s is empty: too few users for its share", name)


def _log_counts(out: Path, manifest: Manifest) -> None:
    kept, read = manifest["kept"], manifest["read"]
    counts = [f"{n} {why.replace('_', ' ')}" for why, n in manifest["dropped"].items() if n]
    logger.info(
        "%s: kept %d of %d records, dropped %s", out, kept, read, ", ".join(counts) or "none"
    )
    for reason, count in manifest["dropped"].items():
        if count > _LARGE_LOSS * read:
            logger.warning(
                "%s: %d of %d records (%d %%) removed: %s",
                out,
                count,
                read,
                round(100 * count / read),
                _REASONS[reason].format(**manifest["settings"]),
            )


def _check_inputs(files: list[Path], out: Path) -> None:
    for path in files:
        if path.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(
                f"{path}: the input would be overwritten by the output; "
                "choose another output folder"
            )
        check_readable(path)


def _fingerprint(files: list[tuple[str, Path]], kind: Kind, rules: Rules, on_error: OnError) -> str:
    found = [
        (name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for name, file in files
    ]
    settings = rules.model_dump(include=set(Rules.model_fields), mode="json")
    # The version of the rows' hashes: work files with others are discarded.
    key = [found, kind, settings, on_error, _HASH_VERSION]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


# The pass over the records


def _scan(
    files: list[tuple[str, Path]],
    kind: Kind,
    rules: Rules,
    on_error: OnError,
    work_files: WorkFiles,
) -> PrepareStats:
    """Stream the records once, filter each, and add those that pass to the work files."""
    stats, after = PrepareStats.resume(work_files.state)
    if work_files.state is not None:
        logger.info("resuming an interrupted run after %d records", stats.counts.read)
    position, paths = ReadPosition(), [file for _, file in files]
    rejections = Rejections(on_error, stats.counts, work_files.reject)
    record_filter = RecordFilter(
        rules, sorted({name for name, _ in files}), stats, work_files, rejections
    )
    rows = located_rows(
        paths,
        kind,
        lambda row: [parse_record(row, kind)],
        rejections,
        after=after,
        position=position,
    )
    saved = stats.counts.read
    with Meter(
        f"reading {kind}", sum(path.stat().st_size for path in paths), percent=True
    ) as progress:
        while chunk := list(islice(rows, _CHUNK)):
            record_filter.process(
                [(location, files[location.file][0], record) for location, (record,) in chunk]
            )
            progress.update(position.finished + position.current, f"{stats.counts.read:,} records")
            if stats.counts.read - saved >= _SAVE_EVERY:
                saved = stats.counts.read
                work_files.save(stats.state(chunk[-1][0]))
    return stats


# Steps that need all records: they work on the rows of the work files


def _unique(rows: np.ndarray) -> np.ndarray:
    """Return the index of the first row by order for each prompt (of rankings: each judgement).

    Sharing the first P characters is an equivalence relation, so equal hashes give the same groups
    as comparing neighbours in the sorted prompts.
    """
    index = np.lexsort((rows["order"], rows["prompt"]))
    prompt = rows["prompt"][index]
    first = np.ones(len(index), dtype=bool)
    first[1:] = prompt[1:] != prompt[:-1]
    return index[first]


def _cap_users(rows: np.ndarray, unique: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` of the rows `unique` per user, the first by order."""
    user = rows["user"][unique]
    index = unique[np.lexsort((rows["order"][unique], user))]
    _, starts, sizes = np.unique(np.sort(user), return_index=True, return_counts=True)
    capped: np.ndarray = index[np.arange(len(index)) - np.repeat(starts, sizes) < limit]
    return capped


def _split_users(rows: np.ndarray, index: np.ndarray, rules: Rules) -> dict[str, np.ndarray]:
    """Return the rows of each split in the order in which they are written."""
    index = index[np.argsort(rows["order"][index], kind="stable")]
    split = split_of(rows["user"][index], rules)
    return {name: index[split == number] for number, name in enumerate(SPLITS)}


def _write(path: Path, work_files: WorkFiles, rows: np.ndarray) -> OutputFile:
    digest, lines = hashlib.sha256(), work_files.lines()
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
    stats: PrepareStats,
    dropped: dict[str, int],
    outputs: dict[str, OutputFile],
    numbers: Statistics,
) -> Manifest:
    from fastrlhf import __version__

    kept = sum(entry["records"] for entry in outputs.values())
    return {
        "version": __version__,
        "kind": kind,
        "settings": rules.model_dump(include=set(Rules.model_fields), mode="json"),
        "inputs": sorted(
            (_input_file(name, file) for name, file in files), key=lambda file: file["sha256"]
        ),
        "read": stats.counts.read,
        "dropped": dropped,
        "personal_data": dict(sorted(stats.personal_data.items())),
        "kept": kept,
        "outputs": outputs,
        **numbers,
    }


def _input_file(source: str, path: Path) -> InputFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "source": source,
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }
