"""The command line: parse arguments, read the configuration, call one function per command.

    torchrun --nproc-per-node 4 -m fastrlhf sft configs/debug/sft.yaml train.steps=10

Exit status: 0 on success, 2 on a user's mistake (one line on stderr), 130 when interrupted,
1 otherwise. Heavy packages are imported only when a command needs them, so that --help and a
misspelt key are answered at once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastrlhf import __version__, cli_data
from fastrlhf.config import COMMANDS, TRAINING_COMMANDS, Command
from fastrlhf.config.environment import check_launch, check_variables, user_message
from fastrlhf.errors import UserError, one_line
from fastrlhf.parallel.exit import clean_exit

if TYPE_CHECKING:
    from fastrlhf.config import Config

notes = logging.getLogger(__name__)
app = typer.Typer(
    help=(
        "RLHF training at Megatron scale: SFT, reward model and PPO-ptx. Several processes: "
        "torchrun --nproc-per-node N -m fastrlhf COMMAND CONFIG [section.key=value ...]"
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert = typer.Typer(help="Convert models from and to Hugging Face folders.")
app.add_typer(cli_data.app, name="data")
app.add_typer(convert, name="convert")
evaluate = typer.Typer(help="Evaluate trained models.")
app.add_typer(evaluate, name="eval")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML configuration of the run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that override CONFIG."),
]
Tensor = Annotated[int, typer.Option(min=1, max=2**20, help="Tensor-parallel processes.")]
Pipeline = Annotated[int, typer.Option(min=1, max=2**20, help="Pipeline-parallel processes.")]


def _config(command: str, path: Path, overrides: list[str] | None) -> Config:
    from fastrlhf.config import load_config, require, unread_settings

    check_launch(os.environ)
    config = load_config(path, overrides or [])
    require(config, command)
    if unread := unread_settings(config, command):
        notes.info("note: %s does not read %s", command, ", ".join(unread))
    return config


def _help(command: Command) -> str:
    """Return a command's help: its summary, what it needs, and the sections that it reads."""
    needs = [f"{' or '.join(required.keys)}: {required.holds}." for required in command.required]
    needs.append(f"Reads the config sections {', '.join(command.sections)}.")
    return f"{command.summary}\n\nRequires {' '.join(needs)}"


def _training(name: str) -> Callable[..., None]:
    """Return the function that typer calls for a training command."""

    def run(config: ConfigPath, overrides: Overrides = None) -> None:
        settings = _config(name, config, overrides)
        from fastrlhf.run.train import train

        train(name, settings)

    return run


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fastrlhf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options before a command; the help text is the application's."""


for _row in TRAINING_COMMANDS.values():
    app.command(_row.name, help=_help(_row))(_training(_row.name))


@app.command(help=_help(COMMANDS["sample"]))
def sample(config: ConfigPath, overrides: Overrides = None) -> None:
    settings = _config("sample", config, overrides)
    from fastrlhf.commands.sample import run

    run(settings)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/quickstart"),
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed.")] = 1234,
    model: Annotated[
        str,
        typer.Option(
            help="tiny (from random weights), smollm2 (pretrained), or a local Hugging Face folder."
        ),
    ] = "tiny",
    scale: Annotated[
        Literal["auto", "full", "short"],
        typer.Option(
            help=(
                "Amount of training of the tiny model. auto: full, or short if this machine is"
                " slow."
            )
        ),
    ] = "auto",
) -> None:
    """Run the whole InstructGPT loop on this machine.

    Pretrains a small model (or loads a pretrained one), then runs SFT, reward modelling and
    PPO-ptx, and writes a report.
    """
    from fastrlhf.quickstart.stages import run

    run(out, tensor, pipeline, seed, scale, model)


@convert.command("from-hf")
def from_hf(
    path: Annotated[Path, typer.Argument(help="Hugging Face folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="New model folder.")],
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
) -> None:
    """Convert a Hugging Face model to a model folder for model.load."""
    from fastrlhf.commands.convert import convert_from_hf
    from fastrlhf.config import ParallelConfig

    convert_from_hf(path, out, ParallelConfig(tensor=tensor, pipeline=pipeline))


@convert.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run, a checkpoint of it, or a model folder.")
    ],
    out: Annotated[Path, typer.Argument(help="New Hugging Face folder.")],
    tensor: Tensor = 1,
    pipeline: Pipeline = 1,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, if the checkpoint has no copy of it.")
    ] = None,
) -> None:
    """Convert a trained model to a Hugging Face folder."""
    from fastrlhf.commands.convert import convert_to_hf
    from fastrlhf.config import ParallelConfig

    layout = ParallelConfig(tensor=tensor, pipeline=pipeline)
    convert_to_hf(checkpoint, out, layout, tokenizer)


@evaluate.command("rm")
def evaluate_rm(
    config: ConfigPath,
    overrides: Overrides = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, help="Number of models to train, each without one group of labelers."),
    ] = None,
    by: Annotated[
        Literal["labeler_id", "user_id"],
        typer.Option(help="Field by which rankings are grouped into folds."),
    ] = "labeler_id",
) -> None:
    """Evaluate a reward model on held-out rankings.

    The model is model.load, the rankings are data.valid. Reports pair accuracy with intervals, by K
    and by rank distance, compared with the rule that the longer response wins; calibration; and the
    agreement of labelers. With --folds: cross-validates the training in CONFIG over groups of
    labelers.
    """
    settings = _config("eval rm" if folds is None else "rm", config, overrides)
    from fastrlhf.commands import eval_reward

    if folds is None:
        eval_reward.evaluate(settings)
    else:
        eval_reward.cross_validate(settings, folds, by)


@evaluate.command("winrate")
def evaluate_winrate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Compare two policies on prompts.

    The policies are model.load and eval.baseline, the prompts are data.prompts. The judge is a
    reward model (eval.reward_model) or a Python function (eval.judge). Reports the win rate with a
    95 % interval over prompts, ties counted as half; writes pairs.jsonl, winrate.json and
    winrate.html to output_dir.
    """
    settings = _config("eval winrate", config, overrides)
    from fastrlhf.commands.eval_policy import winrate

    winrate(settings)


@evaluate.command("human")
def evaluate_human(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Judgements of `label`.")],
    baseline: Annotated[str | None, typer.Option(help="Model that win rates are against.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of human.json and .html.")] = Path("human"),
) -> None:
    """Report win rates and agreement of human judgements."""
    from fastrlhf.commands.eval_human import run

    run(files, baseline, output)


@evaluate.command("select")
def evaluate_select(config: ConfigPath, overrides: Overrides = None) -> None:
    """Name the best checkpoint of a run by a judge's scores.

    InstructGPT chose its SFT models this way. The run is output_dir, the prompts are data.prompts.
    Writes checkpoints/best, which model.load accepts, select.json and select.html.
    """
    settings = _config("eval select", config, overrides)
    from fastrlhf.commands.eval_policy import select

    select(settings)


@app.command("config")
def show_config(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION|SECTION.KEY] | show CONFIG [KEY=VALUE]...",
            help="A section, a setting, or `show` and a run's configuration.",
        ),
    ] = None,
) -> None:
    """Describe settings, or show a resolved configuration.

    Without arguments every setting is printed with its type, default and meaning. `config show
    CONFIG section.key=value` prints the configuration of a run with the origin of each value.
    """
    from fastrlhf.config import reference

    match arguments or []:
        case []:
            print(reference.describe())
        case ["show", path, *overrides]:
            print(reference.show(path, overrides), end="")
        case ["show"]:
            raise UserError("config show: expected the path of a configuration")
        case [key]:
            print(reference.describe(key))
        case [key, *rest]:
            raise UserError(
                f"config {key}: unexpected {' '.join(rest)}; expected one section or setting, or "
                "show CONFIG"
            )


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    command: Annotated[
        str, typer.Option(help=f"Training command: {', '.join(TRAINING_COMMANDS)}.")
    ] = "ppo",
    gpus: Annotated[int, typer.Option(min=1, max=2**20, help="GPUs of the run.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="h100-80gb, h200, a100-80gb, b200, or a YAML file of figures.")
    ] = "h100-80gb",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="List the fastest settings that fit.")
    ] = False,
    lengths: Annotated[
        Path | None, typer.Option(metavar="RUN", help="PPO run whose response lengths to expect.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Records of data.train, if the files are elsewhere.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts.")] = None,
) -> None:
    """Compute the memory, time and cost of a run, without a GPU.

    The models of the run are built on fake tensors for every kind of rank. Exit status 0 also if
    the run does not fit.
    """
    from fastrlhf.commands.plan import run

    run(
        config,
        overrides or [],
        command,
        gpus,
        gpu,
        as_json=as_json,
        search_settings=search,
        lengths=lengths,
        samples=samples,
        page=html,
    )


@app.command()
def label(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="YAML file of the project.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8500,
    link: Annotated[
        list[str] | None, typer.Option(help="Print a new personal link of this labeler.")
    ] = None,
    admin_link: Annotated[
        str | None, typer.Option(help="Print a new personal link of this administrator.")
    ] = None,
    revoke: Annotated[str | None, typer.Option(help="Make this labeler's link invalid.")] = None,
    backup: Annotated[Path | None, typer.Option(help="Copy the database to this file.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the answers to this folder.")] = None,
) -> None:
    """Serve a web page for labelers: rank, compare, rate, write."""
    from fastrlhf.commands.label import run

    run(
        project,
        host=host,
        port=port,
        link=link or [],
        admin_link=admin_link,
        revoke=revoke,
        backup=backup,
        export=export,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Report what this machine can run, and how to install the rest."""
    from fastrlhf.commands.doctor import report

    if not report(as_json):
        raise typer.Exit(1)


def program() -> None:
    """Run `main` as a whole process: the entry point of `fastrlhf` and `python -m fastrlhf`."""
    with clean_exit():
        main()


def main() -> None:
    """Run the command that sys.argv names, and raise SystemExit with its status."""
    # Importing torch and megatron makes half a million objects that stay. With a collection every
    # 700 new ones, the garbage collector takes a quarter of that time.
    gc.set_threshold(50_000, 20, 100)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fastrlhf").setLevel(logging.INFO if _is_main() else logging.WARNING)
    try:
        for note in check_variables(os.environ):
            notes.info(note)
        status = app(prog_name="fastrlhf", standalone_mode=False) or 0
        if status == 0:
            _leave_process_groups()
    except (UserError, RuntimeError, ValueError) as error:
        # Ops raise the latter two for a FASTRLHF_* variable that this machine cannot follow.
        if (text := user_message(error)) is None:
            raise
        line = one_line(" ".join(text.split()))
        _report_error(f"error: {line}")
        _report_to_ranks(line)
        status = 2
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fastrlhf"
        option = getattr(error, "option_name", "")
        setting = "; settings have no dashes (train.steps=10)" if "." in option else ""
        message = one_line(f"{error.format_message().rstrip('.')}{setting}; see {command} --help")
        _report_error(f"error: {message}")
        status = 2
    sys.exit(status)


def _leave_process_groups() -> None:
    """Leave the groups of a command that ended well: NCCL warns of groups that are not destroyed.

    After a failure, and when the user has interrupted a collective, the other ranks may be
    anywhere, and leaving would wait for them. `clean_exit` then ends the process without leaving.
    """
    if (meshes := sys.modules.get("fastrlhf.parallel.mesh")) is not None:
        meshes.finalize()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _report_to_ranks(line: str) -> None:
    """Report an error to ranks that wait for this one, perhaps on other nodes."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        from fastrlhf.parallel import rendezvous  # imports torch

        rendezvous.publish_failure(line)


def _report_error(line: str) -> None:
    """Print an error line on stderr, once per node: all ranks usually make the same mistake.

    An error of another rank alone reaches the user through torchrun, which shows the error file of
    the rank that failed first.
    """
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")).strip()
    if rank == "0" or not re.fullmatch("[0-9]+", rank):  # a rank that is no number may be the error
        print(line, file=sys.stderr, flush=True)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        report = {"message": line.removeprefix("error: "), "timestamp": int(time.time())}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
