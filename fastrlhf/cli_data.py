"""The commands under `fastrlhf data`: prepare, convert, show and tokenize records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastrlhf.data.convert import Source
from fastrlhf.data.records import Kind, OnError
from fastrlhf.errors import UserError

app = typer.Typer(help="Prepare, convert, tokenize and print records.")

Files = Annotated[list[Path], typer.Argument(metavar="FILE", help="JSONL, JSONL.gz or parquet.")]
Broken = Annotated[
    OnError,
    typer.Option(
        help="A malformed record stops the command (strict) or is skipped and counted (quarantine)."
    ),
]


@app.command("prepare")
def prepare_data(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|FILE... [KEY=VALUE]",
            help="A YAML file or record files, followed by settings.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder; overrides the one in a YAML file."),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Kind of the records in the files.")] = "prompts",
) -> None:
    """Deduplicate, filter personal data, cap users, split by user."""
    from fastrlhf.data.prepare.prepare import run

    run(arguments, out, kind)


@app.command("convert")
def convert_data(
    files: Files,
    kind: Annotated[
        Kind, typer.Option(help="Kind of the records to write (--from) or to read (--to).")
    ],
    out: Annotated[Path, typer.Option(help="A .jsonl or .jsonl.gz file.")],
    source: Annotated[
        Source | None, typer.Option("--from", help="Layout of the input files; writes records.")
    ] = None,
    target: Annotated[
        Source | None, typer.Option("--to", help="Layout of the output; reads records.")
    ] = None,
    rejected: Annotated[Path | None, typer.Option(help="File for skipped rows.")] = None,
    on_error: Broken = "strict",
) -> None:
    """Convert other projects' records to ours, or ours to theirs."""
    from fastrlhf.data.convert import convert
    from fastrlhf.data.export import export

    if source is not None and target is None:
        convert(files, source, kind, out, on_error, rejected)
    elif target is not None and source is None:
        export(files, target, kind, out, on_error, rejected)
    else:
        raise UserError("expected one of --from LAYOUT and --to LAYOUT")


@app.command("show")
def show_data(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|FILE... [KEY=VALUE]", help="A run's YAML file, or record files."
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; required with record files.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=2**31 - 1, help="Records per file.")] = 3,
) -> None:
    """Print records as the model will read them.

    Tokens that count in the loss are colored, or enclosed in ⟦ and ⟧ where there is no color.
    """
    from fastrlhf.data.show import run

    run(arguments, tokenizer, n)


@app.command("tokenize")
def tokenize_data(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Text: .txt, JSONL, .gz of both, parquet.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Folder of a Hugging Face tokenizer.")],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin and PREFIX.idx.")],
    workers: Annotated[
        int, typer.Option(min=1, max=1024, help="Processes; the output does not depend on them.")
    ] = 1,
    on_error: Broken = "strict",
) -> None:
    """Tokenize pretraining text into megatron's indexed data set."""
    from fastrlhf.data.indexed import write_indexed
    from fastrlhf.data.tokenize import load_tokenizer

    write_indexed(files, load_tokenizer(tokenizer), out, workers=workers, on_error=on_error)
