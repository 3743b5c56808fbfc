"""Damaged config.json and index files are one line with the file's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrlhf.errors import UserError
from fastrlhf.models.hf.files import open_tensors
from fastrlhf.models.loading import find_model


@pytest.mark.parametrize("variant", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "101"},
        {"vocab_size": 101.5},
        {"vocab_size": {}},
        {"hidden_act": {}, "activation_function": {}},
        {"eos_token_id": "\x1b[31m"},
        {"tie_word_embeddings": "yes"},
        {"use_cache": " "},
        {"architectures": [True]},
        {"architectures": 3},
        {"architectures": {"a": 1}},
        {"activation_function": {"a": 1}, "hidden_act": {"a": 1}},
        {"architectures": [["LlamaForCausalLM"]]},
        {"model_type": []},
        {"model_type": "x" * 5000},
        {"dtype": {"a": {}}},
    ],
)
def test_values_of_other_types(
    variant: str, changes: dict[str, Any], hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(hf_folder(variant), tmp_path / "copy")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as no:
        find_model(folder)
    assert str(folder) in str(no.value)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": 1, "b": "model.safetensors"}}, "it names the file 1"),
        ({"weight_map": {"a": None, "b": None}}, "it names the file None"),
        ({"weight_map": {"a": ["model.safetensors"]}}, "unhashable"),
        ({"weight_map": {"a": {}}}, "unhashable"),
        ({"weight_map": []}, "AttributeError"),
        ({"weight_map": {"a": "../copy/model.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": "/dev/null"}}, "outside the folder"),
        ({"weight_map": {"a": "a\0b"}}, "outside the folder"),
        ({"weight_map": {"a": ""}}, "outside the folder"),
        ({"weight_map": {"a": "b" * 70_000}}, "too long for a file"),
        ({}, "KeyError"),
        ([], "TypeError"),
    ],
)
def test_index_files(
    content: Any, message: str, hf_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(hf_folder("llama"), tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as no:
        open_tensors(folder)
    assert str(no.value).startswith(f"{index}: not a safetensors index (")
    assert len(str(no.value)) < 500 and str(no.value).isprintable()


def test_a_deep_index_is_one_line(hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(hf_folder("llama"), tmp_path / "copy")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a safetensors index"):
        open_tensors(folder)
