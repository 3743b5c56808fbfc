"""What README.md and docs/ print is true: links lead somewhere, commands and settings exist, records are records."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from fastrlhf.cli import app
from fastrlhf.config import Config, load_config, require
from fastrlhf.config.yaml_file import known_keys
from fastrlhf.data.records import Demonstration, Prompt, Ranking, Text, parse_record

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SETTINGS = set(known_keys(Config))
CONFIG_COMMANDS = ("pretrain", "sft", "rm", "ppo", "sample")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words after `fastrlhf` of every command in the page's shell blocks, comments and loop variables left out."""
    found = []
    for line in "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ").splitlines():
        for command in re.findall(r"fastrlhf (\w.*)", line.partition("#")[0]):
            words = shlex.split(command.partition(";")[0])
            if not any("$" in word for word in words):
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_their_settings_are_valid(page):
    for words in commands(page):
        group = typer.main.get_command(app)
        path = list(words)
        while hasattr(group, "commands"):
            assert path and path[0] in group.commands, f"{page.name}: no command {words}"
            group = group.commands[path.pop(0)]
        settings = {
            word.partition("=")[0] for word in words if "=" in word and not word.startswith("-")
        }
        assert settings <= SETTINGS or words[0] == "data", (
            f"{page.name}: no settings {settings - SETTINGS}"
        )
        if words[0] in CONFIG_COMMANDS and (ROOT / words[1]).is_file():
            require(load_config(ROOT / words[1], words[2:]), words[0])


def test_the_readme_has_commands_and_records():
    text = (ROOT / "README.md").read_text()
    named = {words[0] for words in commands(ROOT / "README.md")}
    assert {"sft", "rm", "ppo", "sample", "convert"} <= named
    [lines] = blocks(text, "json")
    kinds = ("demonstrations", "rankings", "rankings", "prompts", "text")
    records = [
        parse_record(json.loads(line), kind)
        for line, kind in zip(lines.splitlines(), kinds, strict=True)
    ]
    assert [type(record) for record in records] == [Demonstration, Ranking, Ranking, Prompt, Text]
