"""Fixtures of the data tests: a small tokenizer and a writer of JSONL files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.data.tokenize import load_tokenizer, train_bpe

CORPUS = [
    "the cat sat on the mat. ",
    "a dog ran after the cat.\n",
    "user: hello\nassistant: hi there\n",
] * 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(CORPUS, 300, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return a function of rows and a name that writes one line per row (a str as it is)."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
        return path

    return write
