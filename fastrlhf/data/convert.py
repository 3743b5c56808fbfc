"""Convert preference and instruction data of other projects to fastrlhf records.

    pairs       TRL, OpenRLHF and Alpaca rows: chosen and rejected as text or turns, with or without
                prompt; messages; prompt and completion; instruction, input and output
    transcripts HH-RLHF: chosen and rejected are complete conversations,
                "\\n\\nHuman: ...\\n\\nAssistant: ..."
    trees       OpenAssistant: one tree of messages per line, replies to a prompt ranked by people
    sharegpt    ShareGPT: conversations of {"from": "human" | "gpt", "value"}; with chosen and
                rejected replies, pairs
    alpaca      Alpaca: instruction, input and output (or chosen and rejected), system, history
    pandalm     PandaLM: instruction, input, two responses and what each annotator chose

Files may be .json arrays, as those of ShareGPT, Alpaca and PandaLM are.

A row that does not fit is rejected with its file, line and reason, or quarantined. export.py
converts in the other direction. Not supported: downloading.
"""

from __future__ import annotations

import gzip
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from fastrlhf.data.files import make_folder, printable
from fastrlhf.data.instruction_rows import (
    Turns,
    alpaca_output,
    alpaca_pair,
    alpaca_prompt,
    instruction_text,
    kept_ids,
    pandalm_rankings,
    reply_text,
    sharegpt_pair,
    sharegpt_prompt,
    sharegpt_reply,
)
from fastrlhf.data.records import (
    BadRecord,
    Counts,
    Kind,
    OnError,
    Paths,
    Row,
    as_paths,
    parse_record,
    parse_rows,
    to_json,
)
from fastrlhf.errors import UserError

logger = logging.getLogger(__name__)

Source: TypeAlias = Literal["pairs", "transcripts", "trees", "sharegpt", "alpaca", "pandalm"]
Converter: TypeAlias = Callable[[Any], Iterator[Row]]

PARTIAL = ".partial"
# What a value of a wrong type raises in a converter: rows of other projects may hold anything.
_WRONG_TYPES = (TypeError, AttributeError, KeyError, IndexError, ValueError, RecursionError)
_ROLES = {"Human": "user", "Assistant": "assistant", "prompter": "user", "assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def convert(
    paths: Paths,
    source: Source,
    kind: Kind,
    out: str | Path,
    on_error: OnError = "strict",
    rejected: Path | None = None,
) -> Counts:
    """Write the `kind` records found in `paths` to `out` (.jsonl or .jsonl.gz); return the counts.

    A row may hold several records (a tree) or none of this kind (a tree without two ranked
    replies). Raises UserError if the layout `source` cannot hold this kind.
    """
    converter = select_converter(source, kind, _converters(source))

    def parse(row: Row) -> list[Any]:
        try:
            return [parse_record(found, kind) for found in converter(row)]
        except _WRONG_TYPES as error:
            reason = f"{type(error).__name__}: {printable(str(error))[:100]}"
            raise BadRecord(f"the row is not laid out as {source} are ({reason})") from None

    return convert_rows(paths, kind, parse, to_json, Path(out), on_error, rejected, what=kind)


def select_converter(layout: Source, kind: Kind, converters: dict[Kind, Converter]) -> Converter:
    """Return the converter for `kind`; raise UserError with the possible kinds if there is none."""
    if kind not in converters:
        raise UserError(f"{layout} hold no {kind}; choose one of {', '.join(converters)}")
    return converters[kind]


def convert_rows(
    paths: Paths,
    kind: Kind,
    parse: Callable[[Row], list[Any]],
    to_line: Callable[[Any], str],
    out: Path,
    on_error: OnError,
    rejected: Path | None,
    *,
    what: str,
) -> Counts:
    """Write one line to `out` for each item that `parse` returns for the rows of `paths`.

    `out` appears under its name only when it is complete. `what` names the lines in the log. Raises
    UserError if `out` does not end in .jsonl or .jsonl.gz, is one of the inputs, or cannot be
    written.
    """
    if not out.name.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(f"{out}: expected an output name ending in .jsonl or .jsonl.gz")
    if out.resolve() in {path.resolve() for path in as_paths(paths)}:
        raise UserError(f"{out}: the input would be overwritten by the output; give another --out")
    make_folder(out.parent)
    counts, partial = Counts(), out.with_name(out.name + PARTIAL)
    try:
        with partial.open("wb") as raw, _gzipped(raw) if out.suffix == ".gz" else raw as file:
            for found in parse_rows(paths, kind, parse, on_error, rejected, counts):
                file.write(to_line(found).encode() + b"\n")
                counts.kept += 1
        partial.replace(out)
    except OSError as error:
        name = str(error.filename or out).removesuffix(PARTIAL)
        raise UserError(f"{name}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
    logger.info(
        "%s: %d %s from %d rows, %d rows set aside",
        out,
        counts.kept,
        what,
        counts.read,
        counts.rejected,
    )
    return counts


def _gzipped(raw: BinaryIO) -> gzip.GzipFile:
    # Without a time stamp, the same rows give the same bytes.
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0)


def _converters(source: Source) -> dict[Kind, Converter]:
    """Return the converter from a row of `source` to our rows, for each kind that it can hold."""
    if source == "pairs":
        return {"rankings": _pair, "demonstrations": _example, "prompts": _prompt}
    if source == "transcripts":
        return {
            "rankings": _transcript_pair,
            "demonstrations": _transcript_chosen,
            "prompts": _transcript_prompt,
        }
    if source == "sharegpt":
        return {
            "rankings": sharegpt_pair,
            "demonstrations": sharegpt_reply,
            "prompts": sharegpt_prompt,
        }
    if source == "alpaca":
        return {
            "rankings": alpaca_pair,
            "demonstrations": alpaca_output,
            "prompts": alpaca_prompt,
        }
    if source == "pandalm":
        return {"rankings": pandalm_rankings, "prompts": alpaca_prompt}
    return {
        "rankings": _tree_rankings,
        "demonstrations": _tree_demonstrations,
        "prompts": _tree_prompts,
    }


# TRL, OpenRLHF, Alpaca


def _pair(row: Row) -> Iterator[Row]:
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), (str, list)):
            raise BadRecord(
                f'"{name}" is missing or neither text nor turns; '
                "expected chosen and rejected responses"
            )
    prompt = row.get("prompt")
    if prompt is None:
        yield _split_pair(row["chosen"], row["rejected"]) | kept_ids(row)
    else:
        chosen, rejected = reply_text(row["chosen"]), reply_text(row["rejected"])
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected} | kept_ids(row)


def _split_pair(chosen: Any, rejected: Any) -> Row:
    """Split two conversations into the shared prompt and the last message of each.

    Raises BadRecord if they differ before the last message.
    """
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRecord(
            '"chosen" and "rejected" are text and there is no "prompt"; '
            "add one, or use source transcripts"
        )
    if not chosen or not rejected or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise BadRecord(
            '"chosen" and "rejected" differ before their last message; '
            "expected one shared conversation"
        )
    return {
        "prompt": chosen[:-1],
        "chosen": reply_text(chosen[-1:]),
        "rejected": reply_text(rejected[-1:]),
    }


def _example(row: Row) -> Iterator[Row]:
    # KTO rows are good and bad responses to prompts, distinguished by the label alone.
    if _shown_label(row.get("label")) in ("false", "0", "0.0", "undesirable", "bad"):
        raise BadRecord(
            f'"label" is {row["label"]}: the response is a bad example, not a demonstration; '
            "remove such rows"
        )
    yield _unlabeled_example(row) | kept_ids(row)


def _shown_label(label: Any) -> str:
    return str(label).strip().lower()


def _unlabeled_example(row: Row) -> Row:
    """Return the prompt and response of a row in any of the layouts of `pairs`."""
    if isinstance(row.get("messages"), list):
        if len(row["messages"]) < 2:
            raise BadRecord('"messages" has fewer than two entries; expected a prompt and a reply')
        return {"prompt": row["messages"][:-1], "response": reply_text(row["messages"][-1:])}
    if "instruction" in row:
        return {"prompt": instruction_text(row), "response": row.get("output")}
    if "completion" in row or "response" in row:
        reply = row["completion"] if "completion" in row else row["response"]
        response = reply_text(reply) if isinstance(reply, list) else reply
        return {"prompt": row.get("prompt"), "response": response}
    if "chosen" in row:
        (pair,) = _pair(row)
        return {"prompt": pair["prompt"], "response": pair["chosen"]}
    keys = "messages; prompt and completion; instruction and output; chosen and rejected"
    raise BadRecord(f"no known keys (found {', '.join(row) or 'none'}); expected {keys}")


def _prompt(row: Row) -> Iterator[Row]:
    found = row if "prompt" in row else _unlabeled_example(row)
    yield {"prompt": found["prompt"]} | kept_ids(row)


# HH-RLHF


def _transcript(text: Any) -> Turns:
    """Split one transcript into turns; consecutive messages of one speaker become one turn."""
    pieces = _SPEAKER.split("\n\n" + text.strip()) if isinstance(text, str) else []
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRecord(
            r'not a transcript; expected text beginning with "\n\nHuman:" (for turns use pairs)'
        )
    turns: Turns = []
    for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role = _ROLES[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content.strip()
        else:
            turns.append({"role": role, "content": content.strip()})
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise BadRecord("the transcript does not end in an assistant's reply to a human")
    return turns


def _transcript_pair(row: Row) -> Iterator[Row]:
    chosen, rejected = _transcript(row.get("chosen")), _transcript(row.get("rejected"))
    yield _split_pair(chosen, rejected) | kept_ids(row)


def _transcript_chosen(row: Row) -> Iterator[Row]:
    turns = _transcript(row.get("chosen"))
    yield {"prompt": turns[:-1], "response": turns[-1]["content"]} | kept_ids(row)


def _transcript_prompt(row: Row) -> Iterator[Row]:
    yield {"prompt": _transcript(row.get("chosen"))[:-1]} | kept_ids(row)


# OpenAssistant


def _tree(row: Row) -> Iterator[tuple[Turns, Row, list[Row]]]:
    """Yield (turns up to a user's message, that message, its usable replies), depth first."""
    root = row.get("prompt")
    if not isinstance(root, dict) or not isinstance(root.get("replies", []), list):
        raise BadRecord(
            '"prompt" is no message with "replies"; expected one OpenAssistant tree per line'
        )
    stack: list[tuple[Turns, Row]] = [([], root)]
    while stack:
        before, message = stack.pop()
        role = _ROLES.get(str(message.get("role")))
        if role is None or not isinstance(message.get("text"), str):
            raise BadRecord('a message lacks "text" or a "role" of prompter or assistant')
        turns = [*before, {"role": role, "content": message["text"]}]
        replies = [reply for reply in message.get("replies") or [] if _usable(reply)]
        if role == "user":
            yield turns, message, replies
        stack += [(turns, reply) for reply in reversed(replies)]


def _usable(message: Row) -> bool:
    """Return whether a message is kept: not deleted, refused by reviewers, synthetic or empty.

    The replies to a message that is not kept are dropped with it.
    """
    text = message.get("text")
    refused = (
        message.get("deleted") or message.get("review_result") is False or message.get("synthetic")
    )
    return not refused and isinstance(text, str) and bool(text.strip())


def _user_id(message: Row) -> Row:
    return {"user_id": message["user_id"]} if message.get("user_id") is not None else {}


def _tree_rankings(row: Row) -> Iterator[Row]:
    for turns, message, replies in _tree(row):
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if len({reply["rank"] for reply in ranked}) >= 2:
            responses = [reply["text"] for reply in ranked]
            ranks = [reply["rank"] for reply in ranked]
            yield {"prompt": turns, "responses": responses, "ranks": ranks} | _user_id(message)


def _tree_demonstrations(row: Row) -> Iterator[Row]:
    """Yield the reply ranked best; without ranks, the reply if there is exactly one."""
    for turns, message, replies in _tree(row):
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if ranked:
            best = min(ranked, key=lambda reply: reply["rank"])
        elif len(replies) == 1:
            best = replies[0]
        else:
            continue
        yield {"prompt": turns, "response": best["text"]} | _user_id(message)


def _tree_prompts(row: Row) -> Iterator[Row]:
    for turns, message, _ in _tree(row):
        yield {"prompt": turns} | _user_id(message)
