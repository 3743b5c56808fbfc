"""Pages and comments keep to the language rules of CONTRIBUTING.md; pages name existing paths.

Links and commands of the pages are checked in tests/examples/test_pages.py.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("bench/README.md", "tests/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
CODE_FOLDERS: tuple[str, ...] = (
    "fastrlhf",
    "kernels",
    "csrc",
    "tests",
    "bench",
    "configs",
    "examples",
)
"""Folders whose comments and docstrings are checked."""
CODE = sorted(
    path
    for folder in CODE_FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".cu", ".h") and not path.is_symlink()
)

LONGEST_PARAGRAPH = 90  # words
BANNED = re.compile(r"\b(told|beside|goes on|anew|left out on purpose|so many)\b", re.IGNORECASE)
WORDS_FOR_THEM = (
    "told: report or pass; beside: next to, with; goes on: continues; anew: again; "
    "Left out on purpose: Not supported, Out of scope; so many: the number"
)
LISTS_THEM = ("CONTRIBUTING.md", "test_language.py")
"""Files that must name the words."""
TOP_FOLDERS = ("fastrlhf", "kernels", "csrc", "tests", "bench", "configs", "docs", "examples")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def paragraphs(text: str) -> Iterator[str]:
    """Yield the prose paragraphs and list items of a page, without code, tables and headings."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\$\$.*?\$\$$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||#|    )", line)]
        yield from re.split(r"^\s*(?:[-*]|\d+\.) ", "\n".join(lines), flags=re.MULTILINE)


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment and docstring of a source file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        for match in re.finditer(r"//[^\n]*|/\*.*?\*/", source, re.DOTALL):
            yield source.count("\n", 0, match.start()) + 1, match[0]
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_paragraph_is_long(page: Path):
    long = [
        f"{len(text.split())} words: {' '.join(text.split()[:8])} ..."
        for text in paragraphs(page.read_text(encoding="utf-8"))
        if len(text.split()) > LONGEST_PARAGRAPH
    ]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_backticks_exist(page: Path):
    """A path of the repository, or a source file given from the package or the page's folder.

    A part in capitals (NAME, DEVICE) is a placeholder.
    """
    missing = []
    for quoted in re.findall(r"`([\w./*-]+)`", page.read_text(encoding="utf-8")):
        if re.search(r"\b[A-Z]+\b", quoted.replace("README", "")) or "_NAME" in quoted:
            continue
        if quoted.split("/")[0] in TOP_FOLDERS and "/" in quoted:
            found = any(ROOT.glob(quoted.rstrip("/")))
        elif "/" in quoted and quoted.endswith((".py", ".md", ".h", ".cpp", ".cu")):
            found = (ROOT / "fastrlhf" / quoted).exists() or (page.parent / quoted).exists()
        else:
            continue
        if not found:
            missing.append(quoted)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_use_the_fields_words(page: Path):
    if page.name in LISTS_THEM:
        return
    lines = page.read_text(encoding="utf-8").splitlines()
    found = [f"{page.name}:{n}: {line}" for n, line in enumerate(lines, 1) if BANNED.search(line)]
    assert found == [], WORDS_FOR_THEM


@pytest.mark.parametrize("path", CODE, ids=name)
def test_comments_use_the_fields_words(path: Path):
    if path.name in LISTS_THEM:
        return
    found = [f"{path.name}:{n}: {text}" for n, text in comments(path) if BANNED.search(text)]
    assert found == [], WORDS_FOR_THEM


def test_pre_commit_runs_the_pinned_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    [ruff] = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={ruff.removeprefix('v')}" in pins
    local = {
        hook["id"]: hook for repo in hooks if repo["repo"] == "local" for hook in repo["hooks"]
    }
    assert local["mypy"]["entry"].startswith(".venv/bin/")  # the version that make installs
