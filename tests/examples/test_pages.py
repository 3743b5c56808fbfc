"""What README.md and docs/ print is true: links, commands, settings, records and Python code."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from fastrlhf.cli import app
from fastrlhf.config import Config, load_config, require
from fastrlhf.config.yaml_file import known_keys
from fastrlhf.data.records import Demonstration, Prompt, Ranking, Text, parse_record
from fastrlhf.data.tokenize import load_tokenizer, train_bpe
from fastrlhf.parallel import mesh as meshes

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("bench/README.md", "tests/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
SETTINGS = set(known_keys(Config))
CONFIG_COMMANDS = ("pretrain", "sft", "rm", "ppo", "sample")


def blocks(text: str, language: str) -> list[str]:
    """Return the code of the page's blocks in `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """Return the words after `fastrlhf` of every command in the page's shell blocks.

    Comments and commands with shell variables are skipped.
    """
    found = []
    for line in "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ").splitlines():
        for command in re.findall(r"fastrlhf (\w.*)", line.partition("#")[0]):
            words = shlex.split(command.partition(";")[0])
            if not any("$" in word for word in words):
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        if "://" in target:
            continue
        if not linked.exists() or (anchor and anchor not in headings(linked)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist_and_their_settings_are_valid(page: Path):
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


# ---- Python code ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return an empty working folder from which configs/ is reached as in the repository."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    meshes.finalize()


def run(code: str, page: Path, namespace: dict[str, Any]) -> None:
    exec(compile(code, name(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=name
)
def test_python_blocks_compile(page: Path):
    for code in blocks(page.read_text(), "python"):
        compile(code, name(page), "exec")


def test_readme_op(capsys: pytest.CaptureFixture[str]):
    """The example gives the gradient of the same loss in plain torch."""
    [code] = blocks((ROOT / "README.md").read_text(), "python")
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11, requires_grad=True)
    labels, advantages = torch.randint(0, 11, (2, 6)), torch.randn(2, 5)
    mask = torch.rand(2, 6) > 0.3
    namespace = {"logits": logits, "labels": labels, "mask": mask, "advantages": advantages}
    run(code, ROOT / "README.md", namespace)
    plain = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
    expected = -(plain * mask[:, 1:] * advantages).sum() / mask[:, 1:].sum()
    torch.testing.assert_close(namespace["loss"], expected)
    [ours], [theirs] = (
        torch.autograd.grad(loss, [logits]) for loss in (namespace["loss"], expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_python_api(folder: Path):
    """Run the page's blocks in order; a block that begins with `# NAME.py` is that file."""
    page = ROOT / "docs/python_api.md"
    make_data = runpy.run_path(str(ROOT / "configs/debug/make_data.py"))["main"]
    make_data(folder / "runs/debug/data")
    namespace: dict[str, Any] = {}
    for code in blocks(page.read_text(), "python"):
        if (file := re.match(r"# (\w+\.py)\n", code)) is not None:
            (folder / file[1]).write_text(code)
        else:
            run(code, page, namespace)
    assert namespace["losses"][-1] < namespace["losses"][0]
    assert namespace["losses"][0] < 7  # ln 320 is 5.8
    assert [record.prompt for record in namespace["records"][:2]] == [
        "What is 0 plus 1?",
        "What is 1 plus 1?",
    ]
    assert (folder / "runs/python/ppo/report.html").is_file()


def test_generation_page(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The page's block, with a tiny model saved by transformers in the folder that it names."""
    transformers = pytest.importorskip("transformers")
    train_bpe(["the cat sat on the mat"] * 4, 270, folder / "gpt2")
    tokenizer = load_tokenizer(folder / "gpt2")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 80}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    page = ROOT / "docs/design/generation.md"
    [code] = blocks(page.read_text(), "python")
    run(code, page, {"prompts": [[1, 2, 3], [4]], "tokenizer": tokenizer})
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"[01] .*-\d", line)]
    assert lines
