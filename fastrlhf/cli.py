"""The command line: each command parses its arguments, reads the configuration and calls one function.

    torchrun --nproc-per-node 4 -m fastrlhf sft configs/debug/sft.yaml train.steps=10

Exit status 0 on success, 2 on a user's mistake (one line on stderr), 130 when interrupted, 1 otherwise. Nothing heavy
is imported until a command needs it, so that --help and a misspelt key answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from fastrlhf.config import Config

app = typer.Typer(
    help="RLHF training at Megatron scale: SFT, reward model and PPO-ptx. Several processes: "
    "torchrun --nproc-per-node N -m fastrlhf COMMAND CONFIG [section.key=value ...]",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that win over CONFIG.")
]


def _config(command: str, path: Path, overrides: list[str] | None) -> Config:
    from fastrlhf.config import load_config, require

    config = load_config(path, overrides or [])
    require(config, command)
    return config


def _train(command: Literal["pretrain", "sft", "rm", "ppo"], path: Path, overrides: list[str] | None) -> None:
    config = _config(command, path, overrides)
    from fastrlhf.launch import train

    train(command, config)


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a language model on plain text."""
    _train("pretrain", config, overrides)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune on demonstrations."""
    _train("sft", config, overrides)


@app.command()
def rm(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a reward model on rankings or pairs."""
    _train("rm", config, overrides)


@app.command()
def ppo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a policy against a reward model with PPO-ptx."""
    _train("ppo", config, overrides)


@app.command()
def sample(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write responses to prompts, for ranking or reading."""
    settings = _config("sample", config, overrides)
    from fastrlhf.generation.sample import run

    run(settings)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the whole run.")] = Path("runs/quickstart"),
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel processes.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline-parallel processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 1234,
) -> None:
    """Run the whole InstructGPT loop on this machine: pretraining, SFT, reward model, PPO-ptx, report."""
    from fastrlhf.quickstart.stages import run

    run(out, tensor, pipeline, seed)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Say what this machine can run, and how to get the rest."""
    from fastrlhf.doctor import report

    if not report(as_json):
        raise typer.Exit(1)


def main() -> None:
    """The entry point of `fastrlhf` and `python -m fastrlhf`."""
    try:
        status = app(prog_name="fastrlhf", standalone_mode=False) or 0
    except UserError as error:
        _tell(error, f"error: {' '.join(str(error).split())}")
        status = 2
    except typer.TyperException as error:
        _tell(error, f"error: {error.format_message().rstrip('.')}; see fastrlhf --help")
        status = 2
    sys.exit(status)


def _tell(error: Exception, line: str) -> None:
    """The line on stderr, once: all ranks usually make the same mistake. What only another rank knows reaches the user
    through torchrun, which shows the error file of the rank that failed first."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
