"""The settings reference: complete, equal to docs/configuration.md, printed by the command."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from fastrlhf import cli
from fastrlhf.config import COMMANDS, Config, load_config, reference
from fastrlhf.config.yaml_file import known_keys
from fastrlhf.errors import UserError

ROOT = Path(__file__).parents[2]


def settings() -> dict[str, reference.Setting]:
    return {s.key: s for section in reference.sections() for s in section.settings}


def test_every_setting_has_a_type_a_default_and_a_meaning():
    found = settings()
    sections = {section.name for section in reference.sections()}
    assert found.keys() | sections - {""} == set(known_keys(Config))
    for setting in found.values():
        assert setting.type and setting.default and setting.meaning.endswith("."), setting


@pytest.mark.parametrize(
    ("key", "type", "default"),
    [
        ("model.num_layers", "int > 0", "required"),
        ("model.num_kv_heads", "int > 0", "derived"),
        ("model.family", "gpt | llama", "required"),
        ("model.vocab_size", "int > 0 or null", "null"),
        ("optimizer.beta1", "float in [0, 1)", "0.9"),
        ("train.seed", "int >= 0", "1234"),
        ("data.train", "list of str or mapping of str to float > 0 or null", "null"),
        ("data.pretrain", "list of str or mapping of str to float > 0 or null", "null"),
        ("ppo.reward_model", "str or list of str or null", "null"),
        ("sample.k", "[int > 0, int > 0]", "[4, 9]"),
        ("generation.stop", "list of str", "[]"),
        ("output_dir", "str", "required"),
    ],
)
def test_types_and_defaults(key: str, type: str, default: str):
    setting = settings()[key]
    assert (setting.type, setting.default) == (type, default)


def test_the_page_is_the_reference():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    cure = "python -m fastrlhf.config.reference > docs/configuration.md"
    assert page == reference.markdown(), f"docs/configuration.md is out of date; run {cure}"


def test_every_environment_variable_is_in_the_reference():
    """Macros of the C++ files (HAVE_, INLINE, TABLE) look like variables and are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "fastrlhf", "kernels", "csrc", "setup.py", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in files if path.name != "reference.py"
    )
    found = set(re.findall(r"\bFASTRLHF_[A-Z_]*[A-Z]\b", text))
    macros = {
        name for name in found if re.search(rf"#\s*(define|ifdef|ifndef)\s+{name}|-D{name}", text)
    }
    macros |= {name for name in found if name.startswith("FASTRLHF_HAVE")}
    assert found - macros == reference.ENVIRONMENT.keys()


def test_sections_of_commands_exist():
    names = {section.name for section in reference.sections()}
    for command in COMMANDS.values():
        assert set(command.sections) <= names
        for required in command.required:
            assert set(required.keys) <= settings().keys()


def test_a_resolved_configuration_with_origins(minimal: Path):
    text = reference.show(minimal, ["train.seed=7", "generation.stop=['#', 'a: b']"])
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["num_layers"].endswith(f"# {minimal}:3")
    assert lines["seed"].endswith("# override train.seed=7")
    assert lines["ffn_size"].endswith("# derived") and lines["beta1"].endswith("# default")
    shown = minimal.with_name("shown.yaml")
    shown.write_text(text, encoding="utf-8")
    expected = load_config(minimal, ["train.seed=7", "generation.stop=['#', 'a: b']"])
    assert load_config(shown) == expected
    assert yaml.safe_load(text)["train"]["seed"] == 7


def test_describe_a_section_a_key_and_a_misspelt_one():
    assert "schedule.warmup_steps: int >= 0 (default: 0)" in reference.describe("schedule")
    assert reference.describe("train.seed").startswith("train.seed: int >= 0 (default: 1234)")
    with pytest.raises(UserError, match=r"train\.sed: no such .* did you mean train\.seed\?"):
        reference.describe("train.sed")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show"], "config show: expected the path"),
        (["train", "ppo"], "config train: unexpected ppo"),
        (["show", "/nowhere.yaml"], "/nowhere.yaml: no such configuration file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("sys.argv", ["fastrlhf", "config", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert expected in capsys.readouterr().err
