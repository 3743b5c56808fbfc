"""Print records as the model will read them: after templating and cutting, coloured by what the loss counts.

Without colour (a pipe, NO_COLOR) the counted part stands between ⟦ and ⟧. Control characters in the data are shown as
escapes, so that a record cannot command the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text as RichText

from fastrlhf.data.batches import pack
from fastrlhf.data.records import Demonstration, Paths, Prompt, Ranking, Text, as_paths, detect_kind, read_records
from fastrlhf.data.tokenize import encode_plain, encode_prompt, encode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_COUNTED, _CONTEXT = "bold green", "dim"
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def show(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    console: Console | None = None,
) -> None:
    """Print the first `n` records of each file; the kind of record is told by the file's keys."""
    console = console or Console()
    painter = _Painter(tokenizer, max_prompt_tokens, max_response_tokens, marks=console.color_system is None)
    console.print(painter.legend())
    for path in as_paths(paths):
        for number, record in enumerate(islice(read_records(path, detect_kind(path)), n), 1):
            title = RichText(f"{path.name}: {type(record).__name__.lower()} {number}")
            console.print(Panel(Group(*painter.paint(record)), title=title, title_align="left"))


class _Painter:
    """Turns records into rich text under one tokenizer and one pair of limits."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, max_prompt_tokens: int, max_response_tokens: int, marks: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.marks = marks

    def legend(self) -> RichText:
        counted = "⟦counted by the loss⟧" if self.marks else "counted by the loss"
        return RichText.assemble(("context", _CONTEXT), "  ", (counted, _COUNTED))

    def paint(self, record: Demonstration | Ranking | Prompt | Text) -> Iterator[RichText]:
        if isinstance(record, Text):
            yield from self._sequence(
                [], [*encode_plain(self.tokenizer, [record.text])[0], self.tokenizer.eos_token_id]
            )
            return
        prompt = encode_prompt(self.tokenizer, record.prompt)
        if len(prompt) > self.max_prompt_tokens:
            limit = f"left out: the prompt has {len(prompt)} tokens, data.max_prompt_tokens is {self.max_prompt_tokens}"
            yield RichText(limit, style="red")
        if isinstance(record, Prompt):
            yield from self._sequence(prompt, [])
        elif isinstance(record, Demonstration):
            response = encode_response(self.tokenizer, record.response)
            yield from self._sequence(prompt, response, self.max_response_tokens)
        else:
            yield from self._ranking(prompt, record)

    def _ranking(self, prompt: list[int], record: Ranking) -> Iterator[RichText]:
        """The prompt once, then the responses from best to worst; the score is read at each one's last token."""
        yield from self._sequence(prompt, [])
        for rank, response in sorted(zip(record.ranks, record.responses, strict=True), key=lambda pair: pair[0]):
            yield RichText(f"rank {rank}", style="bold")
            yield from self._sequence([], encode_response(self.tokenizer, response), self.max_response_tokens)

    def _sequence(self, prompt: list[int], response: list[int], limit: int | None = None) -> Iterator[RichText]:
        kept = response[:limit]
        tokens = prompt + kept
        # The mask marks where a label counts; the label is the next token, so token t is coloured by the mask at t - 1.
        counted = [False, *pack([tokens], [len(prompt)]).loss_mask[:-1].tolist()]
        if not prompt:  # the prompt was printed before, or there is none
            counted[0] = True
        text = RichText()
        start = 0
        for t in range(1, len(tokens) + 1):
            if t == len(tokens) or counted[t] != counted[start]:
                self._append(text, tokens[start:t], counted[start])
                start = t
        yield text
        cut = f", cut from {len(response)} by data.max_response_tokens" if len(kept) < len(response) else ""
        yield RichText(f"{len(prompt)} prompt + {len(kept)} response tokens{cut}", style="cyan")

    def _append(self, text: RichText, tokens: list[int], counted: bool) -> None:
        piece = str(self.tokenizer.decode(tokens)).translate(_ESCAPES)
        text.append(f"⟦{piece}⟧" if counted and self.marks else piece, style=_COUNTED if counted else _CONTEXT)
