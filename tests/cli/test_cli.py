"""Exit statuses, one-line errors, and a start that imports no heavy package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastrlhf
from fastrlhf import cli
from fastrlhf.errors import UserError

CONFIG = """\
model: {family: gpt, num_layers: 2, hidden_size: 16, num_heads: 2, max_positions: 2048}
data: {tokenizer: tok, train: a.jsonl}
optimizer: {lr: 1e-3}
train: {steps: 1, global_batch_size: 1}
output_dir: out
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(monkeypatch, capfd):
    """Return a function that runs `fastrlhf ARGUMENTS` in this process.

    It returns (exit status, stdout, stderr).
    """

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastrlhf", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert isinstance(exit_.value.code, int)
        return (exit_.value.code, *capfd.readouterr())

    return call


@pytest.fixture
def tiny_tokenizer(tmp_path: Path) -> Path:
    from fastrlhf.data.tokenize import train_bpe

    train_bpe(["Question 1? Yes, 1. No."], 270, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def launched(monkeypatch):
    """Replace `fastrlhf.run.train`, whose import takes seconds, and record the calls of `train`."""
    calls: list = []
    module = type(sys)("fastrlhf.run.train")
    monkeypatch.setattr(module, "train", lambda *arguments: calls.append(arguments), raising=False)
    monkeypatch.setitem(sys.modules, "fastrlhf.run.train", module)
    return calls


def test_python_m_starts_it_and_imports_nothing_heavy():
    code = """
import runpy, sys
sys.argv = ["fastrlhf", "--help"]
try:
    runpy.run_module("fastrlhf", run_name="__main__")
except SystemExit as error:
    assert error.code == 0, error.code
heavy = {"torch", "transformers", "megatron", "numpy", "triton", "matplotlib", "yaml"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stderr
    for command in (
        "pretrain",
        "sft",
        "rm",
        "ppo",
        "sample",
        "quickstart",
        "data",
        "convert",
        "doctor",
    ):
        assert f"  {command} " in result.stdout


def test_a_misspelt_key_answers_without_torch(config):
    code = f"""
import sys
from fastrlhf import cli
sys.argv = ["fastrlhf", "sft", {str(config)!r}, "trian.seed=1"]
try:
    cli.main()
finally:
    assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: override 'trian.seed=1': unknown key trian.seed; did you mean train.seed?\n"
    )


@pytest.mark.parametrize("command", ["pretrain", "sft", "rm"])
def test_training_command_passes_its_configuration(run, launched, config, command):
    assert run(command, config, "train.seed=7", "model.init_std=0.5") == (0, "", "")
    [(name, passed)] = launched
    assert (name, passed.train.seed, passed.model.init_std) == (command, 7, 0.5)


def test_ppo_checks_what_it_needs_before_anything_is_built(run, launched, config):
    status, _, error = run("ppo", config)
    assert (status, launched) == (2, [])
    assert error.startswith("error: ppo needs data.prompts: ")
    arguments = ["data.prompts=p", "ppo.reward_model=r", "ppo.gamma_ptx=0", "data.train=null"]
    assert run("ppo", config, *arguments, "train.global_batch_size=null") == (0, "", "")
    assert launched[0][0] == "ppo"


def test_settings_that_the_command_does_not_read_are_named(run, launched, config, caplog):
    caplog.set_level("INFO")
    arguments = ["data.prompts=p", "ppo.reward_model=r", "ppo.gamma_ptx=0", "data.train=null"]
    assert run("ppo", config, *arguments, "data.loss_on=all", "model.residual_dropout=0.2")[0] == 0
    assert caplog.messages == ["note: ppo does not read data.loss_on, model.residual_dropout"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FASTRLHF_BACKEND", "gpu"),
        ("FASTRLHF_CPU_ISA", "mmx"),
        ("FASTRLHF_LINEAR_BUDGET_MB", "much"),
        ("FASTRLHF_POOL_MB", "12MB"),
        ("SLURM_NTASKS", "2"),
        ("LOCAL_RANK", "first"),
        ("LOCAL_RANK", "\u0661"),
    ],
)
def test_a_wrong_environment_is_one_line(run, launched, config, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    status, out, error = run("sft", config)
    assert (status, out, launched) == (2, "", [])
    assert error.startswith("error: ") and variable in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_ops_error_about_a_variable_is_one_line(run, monkeypatch, launched, config, kind):
    """What only the op knows: whether this machine can do what the variable says."""

    def fail(*_: object) -> None:
        raise kind("FASTRLHF_BACKEND=triton: backend 'triton' cannot run it: no GPU\nframe 0")

    monkeypatch.setattr(sys.modules["fastrlhf.run.train"], "train", fail)
    expected = "error: FASTRLHF_BACKEND=triton: backend 'triton' cannot run it: no GPU\n"
    assert run("sft", config) == (2, "", expected)


@pytest.mark.parametrize("option", ["--seed", "--tensor", "--pipeline"])
def test_options_have_upper_bounds(run, option):
    status, _, error = run("quickstart", option, "9" * 30)
    assert status == 2
    assert error.startswith(f"error: Invalid value for '{option}': ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: Missing command; see fastrlhf --help\n"),
        (["sft"], "error: Missing argument 'CONFIG'; see fastrlhf sft --help\n"),
        (
            ["convert", "to-hf"],
            "error: Missing argument 'checkpoint'; see fastrlhf convert to-hf --help\n",
        ),
        (["bogus"], "error: No such command 'bogus'; see fastrlhf --help\n"),
        (["pp"], "error: No such command 'pp'. Did you mean 'ppo'?; see fastrlhf --help\n"),
        (["sft", "no.yaml"], "error: no.yaml: no such configuration file\n"),
        (["doctor", "--yaml"], "error: No such option: --yaml; see fastrlhf doctor --help"),
        (
            ["sft", "a.yaml", "--train.steps=1"],
            "error: No such option: --train.steps; settings have no dashes (train.",
        ),
        (["sft", "."], "error: .: a folder, expected a YAML file\n"),
        (
            ["data", "prepare", "x.jsonl"],
            "error: expected CONFIG.yaml, or record files and --out FOLDER",
        ),
        (
            ["data", "prepare", "no.jsonl", "--out", "o", "max_per_user=0"],
            "error: override 'max_per_user=0': max_per",
        ),
        (["data", "convert", "x", "--from", "pears"], "error: "),
        (["data", "show", "x.jsonl", "--tokenizer", "no"], "error: no: no such tokenizer folder"),
        (["quickstart", "--tensor", "0"], "error: Invalid value for '--tensor': "),
    ],
)
def test_mistakes_are_one_line_and_status_2(run, arguments, expected):
    status, out, error = run(*arguments)
    assert (status, out) == (2, "")
    assert error.startswith(expected)
    assert error.count("\n") == 1


def test_version_and_short_help(run):
    assert run("--version") == (0, f"fastrlhf {fastrlhf.__version__}\n", "")
    for arguments in (["-h"], ["sft", "-h"], ["data", "show", "-h"]):
        status, out, error = run(*arguments)
        assert (status, error) == (0, "")
        assert out.startswith(" ".join(["Usage: fastrlhf", *arguments[:-1]]))


@pytest.mark.parametrize("group", ["", "data", "convert", "eval"])
def test_the_list_of_commands_is_not_cut(run, group):
    _, out, _ = run(*group.split(), "--help")
    assert "..." not in out.partition("Commands:")[2]


def test_user_error_stays_on_one_line(run, monkeypatch, launched, config):
    def fail(*_: object) -> None:
        raise UserError("data.jsonl:3: bad\n   record")

    monkeypatch.setattr(sys.modules["fastrlhf.run.train"], "train", fail)
    assert run("sft", config) == (2, "", "error: data.jsonl:3: bad record\n")


def test_what_a_file_holds_disturbs_no_terminal(run, monkeypatch, launched, config):
    """A message may quote a file: control characters are escapes, a long quote is cut."""

    def fail(*_: object) -> None:
        raise UserError(f"a.json: holds \0\x1b[31m{'x' * 5000}; copy it again")

    monkeypatch.setattr(sys.modules["fastrlhf.run.train"], "train", fail)
    status, _, error = run("sft", config)
    assert status == 2 and len(error) < 1300 and error.removesuffix("\n").isprintable()
    assert error.startswith("error: a.json: holds \\x00\\x1b[31mxxx")
    assert error.endswith("xxx; copy it again\n")


def test_interrupt_is_130_and_says_nothing(run, monkeypatch, launched, config):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fastrlhf.run.train"], "train", interrupt)
    assert run("sft", config) == (130, "", "")


def test_a_defect_keeps_its_traceback_and_is_status_1(config):
    code = f"""
import sys
from fastrlhf import cli
module = type(sys)("fastrlhf.run.train")
module.train = lambda *_: 1 / 0
sys.modules["fastrlhf.run.train"] = module
sys.argv = ["fastrlhf", "sft", {str(config)!r}]
cli.main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_data_prepare_convert_and_show(run, tmp_path, tiny_tokenizer, caplog):
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rankings = tmp_path / "rankings.jsonl"
    status, _, error = run(
        "data",
        "convert",
        tmp_path / "pairs.jsonl",
        "--from",
        "pairs",
        "--kind",
        "rankings",
        "--out",
        rankings,
    )
    assert status == 0, error
    assert "40 rankings from 40 rows" in caplog.text, "what was done is said on stderr"

    out = tmp_path / "prepared"
    options = ["--kind", "rankings", "valid_fraction=0.25", "test_fraction=0.25", "seed=3"]
    status, _, error = run("data", "prepare", rankings, "--out", out, *options)
    assert status == 0, error
    assert "kept 40 of 40 records" in caplog.text
    manifest = json.loads((out / "manifest.json").read_text())
    settings = manifest["settings"]
    assert manifest["kind"] == "rankings"
    assert (settings["valid_fraction"], settings["test_fraction"], settings["seed"]) == (
        0.25,
        0.25,
        3,
    )
    assert (
        sum(
            len((out / f"{split}.jsonl").read_text().splitlines())
            for split in ("train", "valid", "test")
        )
        == 40
    )

    status, shown, _ = run(
        "data", "show", out / "train.jsonl", "--tokenizer", tiny_tokenizer, "-n", "2"
    )
    assert (status, shown.count("train.jsonl: ranking")) == (0, 2)
    assert "Question" in shown

    back = tmp_path / "back.jsonl"
    status, _, error = run(
        "data", "convert", rankings, "--to", "pairs", "--kind", "rankings", "--out", back
    )
    assert status == 0, error
    assert [json.loads(line) for line in back.read_text().splitlines()] == rows
    status, _, error = run("data", "convert", rankings, "--kind", "rankings", "--out", back)
    assert (status, error) == (2, "error: expected one of --from LAYOUT and --to LAYOUT\n")

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row["chosen"]}) + "\n" for row in rows))
    status, _, error = run(
        "data", "tokenize", text, "--tokenizer", tiny_tokenizer, "--out", tmp_path / "corpus"
    )
    assert status == 0, error
    assert (tmp_path / "corpus.idx").stat().st_size > 0


@pytest.mark.parametrize(
    ("direction", "function"), [("from-hf", "convert_from_hf"), ("to-hf", "convert_to_hf")]
)
def test_convert_passes_folders_and_layout(run, monkeypatch, direction, function):
    calls: list = []
    module = type(sys)("fastrlhf.commands.convert")
    monkeypatch.setattr(module, function, lambda *arguments: calls.append(arguments), raising=False)
    monkeypatch.setitem(sys.modules, "fastrlhf.commands.convert", module)
    option = {"from-hf": [], "to-hf": ["--tokenizer", "t"]}[direction]
    assert run("convert", direction, "a", "b", "--tensor", 2, "--pipeline", 3, *option)[0] == 0
    [(source, target, parallel, *tokenizer)] = calls
    assert tokenizer == [Path(folder) for folder in option[1:]]
    assert (source, target, parallel.tensor, parallel.pipeline) == (Path("a"), Path("b"), 2, 3)


def test_only_rank_0_prints(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("sft", "no.yaml") == (2, "", "")


def test_under_torchrun_the_line_is_said_once(tmp_path):
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fastrlhf",
        "sft",
        "no.yaml",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, "torchrun has one status for all failures"
    # Reported by rank 0, unless torchrun stopped it first for another rank's failure; then it is
    # in torchrun's summary.
    assert "no.yaml: no such configuration file" in result.stderr
    assert result.stderr.count("error: no.yaml: no such configuration file") <= 1


def test_what_only_another_rank_knows_reaches_torchruns_summary(tmp_path):
    script = tmp_path / "only_rank_1.py"
    script.write_text(
        "import os, sys, time\n"
        "from fastrlhf import cli\n"
        "sys.argv = ['fastrlhf', 'sft', 'no.yaml']\n"
        "time.sleep(60) if os.environ['RANK'] == '0' else cli.main()\n"
    )
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "no.yaml: no such configuration file" in result.stderr
