"""`data show` marks what the loss counts, shows cuts and drops, and escapes control characters."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastrlhf.config import load_config
from fastrlhf.data.show import run, show, show_config
from fastrlhf.errors import UserError


def shown(path: Path, tokenizer: Any, colour: bool = False, n: int = 3, limit: int = 50) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=100, force_terminal=colour, color_system="standard" if colour else None
    )
    show(path, tokenizer, n=n, max_prompt_tokens=limit, max_response_tokens=limit, console=console)
    return out.getvalue()


def test_a_demonstration_marks_its_response_and_eos(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    path = jsonl({"prompt": [{"role": "user", "content": "hello"}], "response": "hi [bold]there"})
    text = shown(path, tokenizer)
    assert "data.jsonl: demonstration 1" in text
    assert "user: hello" in text
    assert "⟦hi [bold]there<|endoftext|>⟧" in text
    coloured = shown(path, tokenizer, colour=True)
    assert "\x1b[1;32mhi [bold]there<|endoftext|>\x1b[0m" in coloured
    assert "⟦" not in coloured


def test_rankings_are_shown_best_first(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    text = shown(
        jsonl({"prompt": "a dog", "responses": ["sat", "ran"], "ranks": [2, 1]}), tokenizer
    )
    assert (
        text.index("rank 1")
        < text.index("⟦ran<|endoftext|>⟧")
        < text.index("rank 2")
        < text.index("⟦sat")
    )


def test_prompts_have_no_loss_and_documents_only_loss(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    legend, _, prompts = shown(jsonl({"prompt": "the cat"}), tokenizer).partition("\n")
    assert "⟦counted by the loss⟧" in legend
    assert "the cat" in prompts
    assert "⟦" not in prompts
    assert "⟦the cat<|endoftext|>⟧" in shown(jsonl({"text": "the cat"}), tokenizer)


def test_limits_are_shown(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    path = jsonl({"prompt": "the cat sat on the mat", "response": "a dog ran after the cat"})
    text = shown(path, tokenizer, limit=2)
    assert "data.max_prompt_tokens is 2" in text
    assert "of prompt + 2 of response, cut from" in text
    assert "<|endoftext|>" not in text


def test_a_long_document_is_cut(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "book.txt").write_text("the cat " * 2000 + "END")
    text = shown(tmp_path / "book.txt", tokenizer)
    assert "END" not in text
    assert re.search(r"tokens: 500 of \d{4,} of text", text)


def test_control_characters_are_shown_as_escapes(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    text = shown(jsonl({"prompt": "a\x1b[31mb\x07c\r"}), tokenizer)
    assert "a\\x1b[31mb\\x07c\\x0d" in text


def test_n_records_are_shown_and_unknown_kinds_rejected(
    jsonl: Callable[..., Path], tokenizer: Any
) -> None:
    path = jsonl(*[{"prompt": f"number {i}"} for i in range(5)])
    text = shown(path, tokenizer, n=2)
    assert "number 1" in text
    assert "number 2" not in text
    with pytest.raises(
        UserError,
        match=r"data\.jsonl:1: no known key \(it has question\); expected one of responses",
    ):
        shown(jsonl({"question": "?"}), tokenizer)
    with pytest.raises(UserError, match="the file has no record"):
        shown(jsonl(), tokenizer)


def test_a_configuration_shows_its_files_with_its_settings(
    jsonl: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path
) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    train = jsonl({"prompt": chat, "response": "hi there"}, name="train.jsonl")
    prompts = jsonl({"prompt": "the cat"}, {"prompt": "the mat"}, name="prompts.jsonl")
    (tmp_path / "prefix.txt").write_text("a dog ran. ")
    (tmp_path / "run.yaml").write_text(
        "model: {family: gpt, num_layers: 2, hidden_size: 64, num_heads: 4, max_positions: 2048}\n"
        f"data: {{tokenizer: {tokenizer_folder}, train: {train}, prompts: {prompts}}}\n"
        f"optimizer: {{lr: 1.0e-3}}\noutput_dir: {tmp_path / 'out'}\n"
    )

    def shown(*overrides: str) -> str:
        out = io.StringIO()
        console = Console(file=out, width=100, color_system=None)
        show_config(load_config(tmp_path / "run.yaml", overrides), 1, console)
        return out.getvalue()

    plain = shown()
    assert "⟦hi there<|endoftext|>⟧" in plain
    assert not re.search("⟦ ?b", plain)
    assert plain.index("data.train") < plain.index("data.prompts") < plain.index("the cat")
    assert "the mat" not in plain
    text = shown(
        "data.loss_on=all",
        f"data.prompt_prefix={tmp_path / 'prefix.txt'}",
        "data.max_response_tokens=1",
    )
    assert re.search("⟦ ?b", text)
    assert "a dog ran. the cat" in text
    assert "cut from" in text
    with pytest.raises(UserError, match="the data section names no records; set"):
        shown("data.train=null", "data.prompts=null")
    with pytest.raises(
        UserError, match=r"expected CONFIG.yaml, or record files and --tokenizer FOLDER"
    ):
        run([str(train)], None, 1)
