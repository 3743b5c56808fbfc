"""Print records as the model reads them: templated, cut, and coloured by what the loss counts.

Without colour (a pipe, NO_COLOR) the counted part is enclosed in ⟦ and ⟧. Control characters in
the data are printed as escapes, so that a record cannot send commands to the terminal.
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
from fastrlhf.data.batches import TokenizedDemonstration, pack_demonstrations
from fastrlhf.data.pretrain import indexed_prefix
from fastrlhf.data.records import (
    Demonstration,
    Paths,
    Prompt,
    Ranking,
    Record,
    Text,
    as_paths,
    detect_kind,
    located_records,
)
from fastrlhf.data.rejections import Counts, Rejections
from fastrlhf.data.tokenize import (
    EncodeError,
    bos_ids,
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
_SHOWN_TOKENS = 500  # of a document: it may be a book
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
    """Print the first `n` records of each file; its keys determine the kind of record.

    `loss_on` and `prefix` are as for training and sampling: see DataConfig.
    """
    console = console or Console()
    renderer = _RecordRenderer(
        tokenizer,
        max_prompt_tokens,
        max_response_tokens,
        loss_on,
        prefix,
        marks=console.color_system is None,
    )
    console.print(renderer.legend())
    for path in as_paths(paths):
        rejections = Rejections("strict", Counts())
        records = located_records(path, detect_kind(path), rejections)
        for number, (location, record) in enumerate(islice(records, n), 1):
            title = RichText(f"{path.name}: {type(record).__name__.lower()} {number}")
            try:
                lines = list(renderer.render(record))
            except EncodeError as error:
                rejections.reject(location, str(error), "")
            console.print(Panel(Group(*lines), title=title, title_align="left"))


def show_config(config: Config, n: int, console: Console | None = None) -> None:
    """Print the first `n` records of each file that the data section names, with its settings.

    Tokenized text (.bin and .idx) is skipped, since it has no records. Raises UserError if the
    section names no records.
    """
    console = console or Console()
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer, add_bos=data.add_bos)
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
    """Run `data show` on CONFIG.yaml and overrides, or on record files and a tokenizer folder."""
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


class _RecordRenderer:
    """Renders records as rich text for one tokenizer and one set of data settings."""

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

    def render(self, record: Record) -> Iterator[RichText]:
        """Yield the lines of a record."""
        if isinstance(record, Text):
            text = encode_plain(self.tokenizer, [record.text])[0]
            tokens = [*bos_ids(self.tokenizer), *text, self.tokenizer.eos_token_id]
            of = f"of {len(tokens)} " if len(tokens) > _SHOWN_TOKENS else ""
            yield from self._sequence([], tokens[:_SHOWN_TOKENS], part=f"{of}of text")
            return
        prefix = self.prefix if isinstance(record, Prompt) else ""
        (prompt,) = encode_prompts(self.tokenizer, [record.prompt], prefix)
        if len(prompt) > self.max_prompt_tokens:
            reason = (
                f"dropped: the prompt has {len(prompt)} tokens, "
                f"data.max_prompt_tokens is {self.max_prompt_tokens}"
            )
            yield RichText(reason, style="red")
        if isinstance(record, Prompt):
            yield from self._sequence(prompt, [])
        elif isinstance(record, Demonstration):
            response = encode_response(self.tokenizer, record.response, record.prompt)
            ((prompt, spans),) = encode_conversations(
                self.tokenizer, [record.prompt], self.loss_on == "all"
            )
            yield from self._sequence(prompt, response, self.max_response_tokens, tuple(spans))
        else:
            yield from self._ranking(prompt, record)

    def _ranking(self, prompt: list[int], record: Ranking) -> Iterator[RichText]:
        """Yield the prompt once, then the responses from best to worst."""
        yield from self._sequence(prompt, [])
        for rank, response in sorted(
            zip(record.ranks, record.responses, strict=True), key=lambda pair: pair[0]
        ):
            yield RichText(f"rank {rank}", style="bold")
            yield from self._sequence(
                [],
                encode_response(self.tokenizer, response, record.prompt),
                self.max_response_tokens,
            )

    def _sequence(
        self,
        prompt: list[int],
        response: list[int],
        limit: int | None = None,
        spans: tuple[tuple[int, int], ...] = (),
        part: str = "of response",
    ) -> Iterator[RichText]:
        kept = response[:limit]
        tokens = prompt + kept
        # The mask marks where a label counts. The label is the next token, so the mask at t - 1
        # determines the colour of token t.
        packed = pack_demonstrations([TokenizedDemonstration(tokens, len(prompt), spans)])
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
        cut = ""
        if len(kept) < len(response):
            cut = f", cut from {len(response)} by data.max_response_tokens"
        lengths = [f"{len(prompt)} of prompt"] * bool(prompt)
        lengths += [f"{len(kept)} {part}"] * bool(response)
        yield RichText(f"tokens: {' + '.join(lengths)}{cut}", style="cyan")

    def _append(self, text: RichText, tokens: list[int], counted: bool) -> None:
        piece = str(self.tokenizer.decode(tokens)).translate(_ESCAPES)
        text.append(
            f"⟦{piece}⟧" if counted and self.marks else piece,
            style=_COUNTED if counted else _CONTEXT,
        )
