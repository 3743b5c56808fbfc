"""Read items from sampled responses, and write answers as records of the trainers.

Out of scope: the formats of Label Studio and Argilla.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastrlhf.data.files import DamagedFile, raw_rows
from fastrlhf.data.json_rows import BadRecord, decode_row
from fastrlhf.errors import UserError
from fastrlhf.labeling.project import FEWEST_RANKED, MOST_RANKED, Project, Task
from fastrlhf.labeling.store import Item

_RESPONSES = {
    "rank": (FEWEST_RANKED, MOST_RANKED),
    "compare": (2, 2),
    "rate": (1, MOST_RANKED),
    "demonstrate": (0, MOST_RANKED),
}


def read_items(path: Path, project: Project) -> Iterator[Item]:
    """Yield the items of a file of `sample`, of `eval winrate`'s pairs.jsonl, or of prompts.

    The columns "priority" (a number; higher is earlier) and "gold" (the expected ranks) set the
    assignment and are not shown. Raises UserError that names the file and the line.
    """
    try:
        for number, raw in raw_rows(path):
            try:
                row = decode_row(raw) if isinstance(raw, bytes) else dict(raw)
                yield _item(_with_responses(row), project)
            except BadRecord as error:
                raise UserError(f"{path}:{number}: {error}") from None
    except DamagedFile as error:
        raise UserError(f"{path}:{error.row}: {error}") from None


def _with_responses(row: dict[str, Any]) -> dict[str, Any]:
    if "responses" in row or "baseline" not in row or "policy" not in row:
        return row
    # A pair of `eval winrate` becomes two responses of two models.
    texts = [row["policy"], row["baseline"]]
    kept = {key: value for key, value in row.items() if key not in ("policy", "baseline")}
    return {**kept, "responses": texts, "model": ["policy", "baseline"]}


def _item(row: dict[str, Any], project: Project) -> Item:
    _check(row, project.task)
    priority, gold = row.pop("priority", 0), row.pop("gold", None)
    number = isinstance(priority, (int, float)) and not isinstance(priority, bool)
    if not number or not math.isfinite(priority):
        raise BadRecord(f"priority is {priority!r}; expected a finite number")
    text = json.dumps(row, ensure_ascii=False, sort_keys=True)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    # The item's own digest draws it for the overlap: the draw is the same at each start.
    drawn = int(digest[-8:], 16) / 2**32 < project.overlap_share
    needed = project.overlap_labelers if drawn else project.labelers_per_item
    return Item(digest[:16], row, needed, float(priority), gold)


def _check(row: dict[str, Any], task: Task) -> None:
    prompt = row.get("prompt")
    turns = isinstance(prompt, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in prompt
    )
    if not prompt or not (isinstance(prompt, str) or turns):
        raise BadRecord(
            'prompt is missing or malformed; expected text or {"role", "content"} turns'
        )
    responses = row.get("responses", [])
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise BadRecord("responses is malformed; expected a list of strings")
    fewest, most = _RESPONSES[task]
    if not fewest <= len(responses) <= most:
        count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise BadRecord(f"has {len(responses)} responses; the task {task} needs {count}")


def check_answer(answer: object, task: Task, responses: int, project: Project) -> dict[str, Any]:
    """Return the answer of a form, checked against the questions of the project.

    Raises ValueError that says what is missing, for the labeler.
    """
    if not isinstance(answer, dict):
        raise ValueError("the answer is not an object")
    if task == "demonstrate":
        text = answer.get("response")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("write a response first")
        return {"response": text}
    checked: dict[str, Any] = {}
    if task in ("rank", "compare"):
        checked["ranks"] = _levels(answer.get("ranks"), responses, responses, "rank")
    if task in ("rank", "rate"):
        levels = project.quality_levels
        checked["ratings"] = _levels(answer.get("ratings"), responses, levels, "overall quality")
        checked["flags"] = _flags(answer.get("flags"), responses, project)
    return checked


def _levels(values: object, count: int, highest: int, name: str) -> list[int]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"give each response its {name}")
    if not all(type(value) is int and 1 <= value <= highest for value in values):
        raise ValueError(f"give each response its {name}, from 1 to {highest}")
    return values


def _flags(values: object, count: int, project: Project) -> list[list[str]]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError("the flags of a response are missing")
    for names in values:
        if not isinstance(names, list) or not all(name in project.flags for name in names):
            raise ValueError("a flag is unknown")
    return [sorted(set(names)) for names in values]


def judgements(answers: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one record per answer: the imported row, the answer, and who gave it and how fast.

    Answers of several labelers to one item stay separate records.
    """
    for found in answers:
        gold = {} if found["gold"] is None else {"gold": found["gold"]}
        yield {
            **found["row"],
            **found["answer"],
            **gold,
            "labeler_id": found["labeler_id"],
            "seconds": found["seconds"],
            "item_id": found["item_id"],
            "finished": found["finished"],
        }


def training_records(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the records that `rm` and `sft` read, with all columns kept.

    Gold items, rankings that are one tie, and those with an empty response are left out: the
    trainers reject the latter two, and a gold item measures labelers.
    """
    for record in records:
        if "gold" in record:
            continue
        if "ranks" in record:
            usable = len(set(record["ranks"])) > 1 and all(t.strip() for t in record["responses"])
        else:
            usable = "response" in record
        if usable:
            yield record


def json_lines(records: Iterable[dict[str, Any]]) -> str:
    """Return the records as JSONL."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
