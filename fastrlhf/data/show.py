"""Print records as the model will read them: after templating and cutting, coloured by what the loss counts.

Without colour (a pipe, NO_COLOR) the counted part stands between ⟦ and ⟧. Control characters in the data are shown as
escapes, so that a record cannot command the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text as RichText

from fastrlhf.config import Config, DataConfig, load_config
from fastrlhf.data.batches import DemonstrationTokens, pack_demonstrations
from fastrlhf.data.pretrain import indexed_prefix
from fastrlhf.data.records import (
    Demonstration,
    Paths,
    Prompt,
    Ranking,
    Text,
    as_paths,
    detect_kind,
    read_records,
)
from fastrlhf.data.tokenize import (
    encode_conversations,
    encode_plain,
    encode_prompts,
    encode_response,
    load_tokenizer,
    read_prefix,
)
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_COUNTED, _CONTEXT = "bold green", "dim"
_SHOWN = 500  # tokens of a document: it may be a book
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def show(
    paths: Paths,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    loss_on: Literal["last", "all"] = "last",
    prefix: str = "",
    console: Console | None = None,
) -> None:
    """Print the first `n` records of each file; the kind of record is told by the file's keys.

    `loss_on` and `prefix` are what training and sampling do: see DataConfig.
    """
    console = console or Console()
    painter = _Painter(
        tokenizer,
        max_prompt_tokens,
        max_response_tokens,
        loss_on,
        prefix,
        marks=console.color_system is None,
    )
    console.print(painter.legend())
    for path in as_paths(paths):
        for number, record in enumerate(islice(read_records(path, detect_kind(path)), n), 1):
            title = RichText(f"{path.name}: {type(record).__name__.lower()} {number}")
            console.print(Panel(Group(*painter.paint(record)), title=title, title_align="left"))


def show_config(config: Config, n: int, console: Console | None = None) -> None:
    """Print the first `n` records of each file that the data section names, as its settings have them read.

    Tokenized text (.bin and .idx) is left out: `data show` prints records.
    """
    console = console or Console()
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer)
    shown = False
    for key in ("train", "valid", "demonstrations", "prompts", "pretrain"):
        paths = [path for path in getattr(data, key) or () if not indexed_prefix(Path(path))]
        if not paths:
            continue
        console.rule(f"data.{key}")
        show(
            paths,
            tokenizer,
            n=n,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
            loss_on=data.loss_on,
            prefix=read_prefix(data.prompt_prefix),
            console=console,
        )
        shown = True
    if not shown:
        raise UserError(
            "the data section names no records; set data.train, data.valid or data.prompts"
        )


def run(arguments: list[str], tokenizer: Path | None, n: int) -> None:
    """The command: CONFIG.yaml and overrides, or record files and a tokenizer."""
    if Path(arguments[0]).suffix in (".yaml", ".yml"):
        show_config(load_config(arguments[0], arguments[1:]), n)
    elif tokenizer is None:
        raise UserError("expected CONFIG.yaml, or record files and --tokenizer FOLDER")
    else:
        limits = DataConfig(tokenizer=str(tokenizer))
        show(
            arguments,
            load_tokenizer(tokenizer),
            n=n,
            max_prompt_tokens=limits.max_prompt_tokens,
            max_response_tokens=limits.max_response_tokens,
        )


class _Painter:
    """Turns records into rich text under one tokenizer and one set of data settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_prompt_tokens: int,
        max_response_tokens: int,
        loss_on: Literal["last", "all"],
        prefix: str,
        marks: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.loss_on = loss_on
        self.prefix = prefix
        self.marks = marks

    def legend(self) -> RichText:
        counted = "⟦counted by the loss⟧" if self.marks else "counted by the loss"
        return RichText.assemble(("context", _CONTEXT), "  ", (counted, _COUNTED))

    def paint(self, record: Demonstration | Ranking | Prompt | Text) -> Iterator[RichText]:
        if isinstance(record, Text):
            tokens = [*encode_plain(self.tokenizer, [record.text])[0], self.tokenizer.eos_token_id]
            of = f"of {len(tokens)} " if len(tokens) > _SHOWN else ""
            yield from self._sequence([], tokens[:_SHOWN], named=f"{of}of text")
            return
        prefix = self.prefix if isinstance(record, Prompt) else ""
        (prompt,) = encode_prompts(self.tokenizer, [record.prompt], prefix)
        if len(prompt) > self.max_prompt_tokens:
            limit = f"left out: the prompt has {len(prompt)} tokens, data.max_prompt_tokens is {self.max_prompt_tokens}"
            yield RichText(limit, style="red")
        if isinstance(record, Prompt):
            yield from self._sequence(prompt, [])
        elif isinstance(record, Demonstration):
            response = encode_response(self.tokenizer, record.response)
            ((prompt, spans),) = encode_conversations(
                self.tokenizer, [record.prompt], self.loss_on == "all"
            )
            yield from self._sequence(prompt, response, self.max_response_tokens, tuple(spans))
        else:
            yield from self._ranking(prompt, record)

    def _ranking(self, prompt: list[int], record: Ranking) -> Iterator[RichText]:
        """The prompt once, then the responses from best to worst; the score is read at each one's last token."""
        yield from self._sequence(prompt, [])
        for rank, response in sorted(
            zip(record.ranks, record.responses, strict=True), key=lambda pair: pair[0]
        ):
            yield RichText(f"rank {rank}", style="bold")
            yield from self._sequence(
                [], encode_response(self.tokenizer, response), self.max_response_tokens
            )

    def _sequence(
        self,
        prompt: list[int],
        response: list[int],
        limit: int | None = None,
        spans: tuple[tuple[int, int], ...] = (),
        named: str = "of response",
    ) -> Iterator[RichText]:
        kept = response[:limit]
        tokens = prompt + kept
        # The mask marks where a label counts; the label is the next token, so token t is coloured by the mask at t - 1.
        packed = pack_demonstrations([DemonstrationTokens(tokens, len(prompt), spans)])
        counted = [False, *packed.loss_mask[:-1].tolist()]
        if not prompt:  # the prompt was printed before, or there is none
            counted[0] = True
        text = RichText()
        start = 0
        for t in range(1, len(tokens) + 1):
            if t == len(tokens) or counted[t] != counted[start]:
                self._append(text, tokens[start:t], counted[start])
                start = t
        yield text
        cut = (
            f", cut from {len(response)} by data.max_response_tokens"
            if len(kept) < len(response)
            else ""
        )
        lengths = [f"{len(prompt)} of prompt"] * bool(prompt) + [f"{len(kept)} {named}"] * bool(
            response
        )
        yield RichText(f"tokens: {' + '.join(lengths)}{cut}", style="cyan")

    def _append(self, text: RichText, tokens: list[int], counted: bool) -> None:
        piece = str(self.tokenizer.decode(tokens)).translate(_ESCAPES)
        text.append(
            f"⟦{piece}⟧" if counted and self.marks else piece,
            style=_COUNTED if counted else _CONTEXT,
        )
