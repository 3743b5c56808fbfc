"""Rows of instruction data (Alpaca, PandaLM, ShareGPT) as our rows; see convert.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from fastrlhf.data.json_rows import BadRecord, Row

Turns: TypeAlias = list[dict[str, str]]


def kept_ids(row: Row) -> Row:
    """Return the ids of the user and the labeler that the row has."""
    return {name: row[name] for name in ("user_id", "labeler_id") if row.get(name) is not None}


def reply_text(value: Any) -> Any:
    """Return the text of a response given as text or as one assistant message."""
    if isinstance(value, str):
        return value
    if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
        raise BadRecord("a response is not a single assistant message; expected exactly one")
    return value[0].get("content")


# Alpaca, PandaLM


def instruction_text(row: Row) -> Any:
    """Return the instruction and its input as one text; an input of null or NaN is none."""
    parts = [row.get("instruction"), row.get("input")]
    return "\n\n".join(str(part) for part in parts if part and part == part)


def _alpaca_turns(row: Row) -> Any:
    """Return the prompt: text, or turns if there is a system prompt or earlier turns."""
    text, system, history = instruction_text(row), row.get("system"), row.get("history")
    if not system and not history:
        return text
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in history or []:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return [*turns, {"role": "user", "content": text}]


def alpaca_prompt(row: Row) -> Iterator[Row]:
    """Yield the prompt of an Alpaca row."""
    yield {"prompt": _alpaca_turns(row)} | kept_ids(row)


def alpaca_output(row: Row) -> Iterator[Row]:
    """Yield an Alpaca row as a demonstration."""
    yield {"prompt": _alpaca_turns(row), "response": row.get("output")} | kept_ids(row)


def alpaca_pair(row: Row) -> Iterator[Row]:
    """Yield an Alpaca row with chosen and rejected responses as a pair."""
    answers = {name: row[name] for name in ("chosen", "rejected") if name in row}
    yield {"prompt": _alpaca_turns(row)} | answers | kept_ids(row)


_PANDALM_RANKS = {1: [1, 2], 2: [2, 1]}  # 0 is a tie, in which nothing is ranked


def pandalm_rankings(row: Row) -> Iterator[Row]:
    """Yield one ranking for each annotator who preferred a response."""
    annotators = sorted(name for name in row if name.startswith("annotator"))
    if not annotators:
        raise BadRecord('no "annotator1" (found ' + ", ".join(row) + "); expected annotators")
    for name in annotators:
        if row[name] not in (0, 1, 2):
            raise BadRecord(f'"{name}" is {row[name]}; expected 0 (a tie), 1 or 2')
        if row[name]:
            responses = [row.get("response1"), row.get("response2")]
            yield {
                "prompt": instruction_text(row),
                "responses": responses,
                "ranks": _PANDALM_RANKS[row[name]],
                "labeler_id": name,
            }


# ShareGPT


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def _sharegpt_turn(message: Any) -> dict[str, str]:
    speaker = message.get("from") if isinstance(message, dict) else None
    role = _SHAREGPT_ROLES.get(str(speaker))
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadRecord(f'a message is from {speaker!r}; expected "from" to be one of {known}')
    return {"role": role, "content": message.get("value")}


def _sharegpt_turns(row: Row) -> Turns:
    messages = row.get("conversations", row.get("conversation"))
    if not isinstance(messages, list) or not messages:
        raise BadRecord(
            f'no "conversations" (found {", ".join(row) or "nothing"}); '
            'expected a list of {"from", "value"}'
        )
    turns = [_sharegpt_turn(message) for message in messages]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return turns


def sharegpt_reply(row: Row) -> Iterator[Row]:
    """Yield a conversation that ends in a reply as a demonstration."""
    *prompt, reply = _sharegpt_turns(row)
    if reply["role"] != "assistant" or not prompt:
        raise BadRecord("the conversation does not end in a reply of gpt to somebody")
    yield {"prompt": prompt, "response": reply["content"]} | kept_ids(row)


def sharegpt_prompt(row: Row) -> Iterator[Row]:
    """Yield a conversation up to its last reply, if it ends in one, as a prompt."""
    turns = _sharegpt_turns(row)
    yield {"prompt": turns[:-1] if turns[-1]["role"] == "assistant" else turns} | kept_ids(row)


def sharegpt_pair(row: Row) -> Iterator[Row]:
    """Yield a conversation with chosen and rejected replies as a pair."""
    answers = {}
    for name in ("chosen", "rejected"):
        answer = row.get(name)
        text = isinstance(answer, str)
        answers[name] = answer if text else reply_text([_sharegpt_turn(answer)])
    yield {"prompt": _sharegpt_turns(row)} | answers | kept_ids(row)
