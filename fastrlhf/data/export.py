"""Export fastrlhf records to the row layouts of other projects; the inverse of convert.py.

    pairs       TRL and OpenRLHF: prompt, chosen and rejected; prompt and completion; prompt.
                Responses are messages if prompts are
    transcripts HH-RLHF: chosen and rejected are complete conversations
    trees       OpenAssistant: one tree per record, replies with their ranks

A ranking of K responses becomes one row for each pair that is not a tie; trees keep the K responses
together. Not supported: joining records with a common beginning into one tree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastrlhf.data.convert import Converter, Source, convert_rows, select_converter
from fastrlhf.data.instruction_rows import Turns
from fastrlhf.data.records import (
    BadRecord,
    Counts,
    Demonstration,
    Kind,
    OnError,
    Paths,
    Ranking,
    Row,
    parse_record,
)
from fastrlhf.errors import UserError

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_TREE_ROLES = {"user": "prompter", "assistant": "assistant"}


def export(
    paths: Paths,
    target: Source,
    kind: Kind,
    out: str | Path,
    on_error: OnError = "strict",
    rejected: Path | None = None,
) -> Counts:
    """Write the `kind` records of `paths` as `target` rows to `out`; return the counts.

    `out` ends in .jsonl or .jsonl.gz. A record that the layout cannot hold (a system turn in a
    transcript) is rejected like a malformed one.
    """
    converter = select_converter(target, kind, _converters(target))

    def parse(row: Row) -> list[Row]:
        return [found | _ids(row) for found in converter(parse_record(row, kind))]

    to_line = partial(json.dumps, ensure_ascii=False)
    return convert_rows(
        paths, kind, parse, to_line, Path(out), on_error, rejected, what=f"{target} rows"
    )


def _converters(target: Source) -> dict[Kind, Converter]:
    if target == "pairs":
        return {"rankings": _pairs, "demonstrations": _completion, "prompts": _prompt}
    if target == "transcripts":
        return {"rankings": _transcripts}
    if target != "trees":
        raise UserError(
            f"records are not written as {target}; choose --to pairs, transcripts or trees"
        )
    return {"rankings": _ranked_tree, "demonstrations": _answered_tree, "prompts": _bare_tree}


def _ids(row: Row) -> Row:
    return {name: str(row[name]) for name in ("user_id", "labeler_id") if row.get(name) is not None}


def _turns(prompt: Any) -> Turns:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _strict_pairs(ranking: Ranking) -> Iterator[tuple[str, str]]:
    """Yield (better, worse) for every pair that is not a tie."""
    ranked = zip(ranking.ranks, ranking.responses, strict=True)
    for (rank, response), (other_rank, other) in itertools.combinations(ranked, 2):
        if rank != other_rank:
            yield (response, other) if rank < other_rank else (other, response)


# TRL, OpenRLHF


def _reply(prompt: Any, text: str) -> Any:
    """Return a response in the form of its prompt: text for text, a message for turns."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _pairs(ranking: Ranking) -> Iterator[Row]:
    for chosen, rejected in _strict_pairs(ranking):
        prompt = ranking.prompt
        yield {
            "prompt": prompt,
            "chosen": _reply(prompt, chosen),
            "rejected": _reply(prompt, rejected),
        }


def _completion(demonstration: Demonstration) -> Iterator[Row]:
    prompt = demonstration.prompt
    yield {"prompt": prompt, "completion": _reply(prompt, demonstration.response)}


def _prompt(record: Any) -> Iterator[Row]:
    yield {"prompt": record.prompt}


# HH-RLHF


def _transcripts(ranking: Ranking) -> Iterator[Row]:
    for pair in _strict_pairs(ranking):
        chosen, rejected = (_transcript(ranking.prompt, text) for text in pair)
        yield {"chosen": chosen, "rejected": rejected}


def _transcript(prompt: Any, response: str) -> str:
    lines = []
    for turn in [*_turns(prompt), {"role": "assistant", "content": response}]:
        speaker = _SPEAKERS.get(turn["role"])
        if speaker is None:
            raise BadRecord(
                f'a transcript has no turns of "{turn["role"]}"; expected user and assistant'
            )
        if any(f"\n\n{name}:" in "\n\n" + turn["content"] for name in _SPEAKERS.values()):
            raise BadRecord(
                "a turn contains a paragraph that begins with Human: or Assistant:, "
                "which a transcript would split into two turns"
            )
        lines.append(f"\n\n{speaker}: {turn['content']}")
    return "".join(lines)


# OpenAssistant


def _tree(record: Any, replies: list[Row]) -> Row:
    """Return the conversation as a chain of messages with `replies` below the last one."""
    turns = _turns(record.prompt)
    owner = {"user_id": record.user_id} if record.user_id is not None else {}
    for turn in turns:
        if turn["role"] not in _TREE_ROLES:
            raise BadRecord(
                f'a tree has no messages of "{turn["role"]}"; expected user and assistant'
            )
    if turns[0]["role"] != "user" or turns[-1]["role"] != "user":
        raise BadRecord("the prompt does not begin and end with a user's turn, as a tree must")
    below = replies
    for turn in reversed(turns):
        message = {"role": _TREE_ROLES[turn["role"]], "text": turn["content"], "replies": below}
        below = [message | owner if turn["role"] == "user" else message]
    name = hashlib.sha256(json.dumps(below[0]).encode()).hexdigest()[:16]
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": below[0]}


def _answer(text: str, **rank: Any) -> Row:
    return {"role": "assistant", "text": text, "replies": [], **rank}


def _ranked_tree(ranking: Ranking) -> Iterator[Row]:
    ranked = zip(ranking.responses, ranking.ranks, strict=True)
    yield _tree(ranking, [_answer(text, rank=rank) for text, rank in ranked])


def _answered_tree(demonstration: Demonstration) -> Iterator[Row]:
    yield _tree(demonstration, [_answer(demonstration.response)])


def _bare_tree(record: Any) -> Iterator[Row]:
    yield _tree(record, [])
