"""The end of a response: the template's own, stop tokens, markers written in data; bos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AddedToken

from fastrlhf.data.batches import pack_demonstrations
from fastrlhf.data.datasets import load_demonstrations, load_prompts, load_rankings
from fastrlhf.data.pretrain import TokenStream
from fastrlhf.data.records import Counts
from fastrlhf.data.tokenize import (
    bos_ids,
    encode_plain,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_responses,
    load_tokenizer,
    stop_token_ids,
)
from fastrlhf.errors import UserError

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}
LIMITS: dict[str, Any] = {"max_prompt_tokens": 200, "max_response_tokens": 50}


@pytest.fixture
def chat(tokenizer_folder: Path) -> Any:
    """Return a tokenizer with eos <|endoftext|> whose template ends turns with <|im_end|>."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}  # type: ignore[dict-item]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def with_bos(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Return a tokenizer folder with the bos <s>, which the tokenizer adds to text."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.save_pretrained(tmp_path / "bos")
    return tmp_path / "bos"


def counted(tokenizer: Any, demonstration: Any) -> str:
    batch = pack_demonstrations([demonstration])
    return str(tokenizer.decode(batch.labels[batch.loss_mask]))


def test_the_templates_end_of_turn_is_trained_and_stops(
    jsonl: Callable[..., Path], chat: Any
) -> None:
    path = jsonl(
        {"prompt": [USER, ANSWER, USER], "response": "It is."}, {"prompt": "x", "response": "y"}
    )
    for loss_on, earlier in (("last", ""), ("all", "sat on<|im_end|>\n")):
        (turns, plain), _ = load_demonstrations(path, chat, loss_on=loss_on, **LIMITS)
        assert counted(chat, turns) == earlier + "It is.<|im_end|>"
        assert counted(chat, plain) == "y<|endoftext|>"  # a string is in no template
    im_end = chat.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(chat) == [chat.eos_token_id, im_end]
    pairs = jsonl({"prompt": [USER], "chosen": "sat", "rejected": "ran"}, name="pairs.jsonl")
    (ranking,), _ = load_rankings(pairs, chat, **LIMITS)
    assert [response[-1] for response in ranking.responses] == [im_end, im_end]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}", "eos"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "eos"),
        # Trimmed contents, two markers, and a template that insists on a user's turn first.
        ("{% for m in messages %}{{ m.content|trim }} <|im_end|>{% endfor %}<|endoftext|>", "turn"),
        (
            "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}",
            "turn",
        ),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}",
            "turn",
        ),
        ("{{ raise_exception('never') }}", "eos"),
        ("{% for m in messages %}{{ m.content|upper }}<|im_end|>{% endfor %}", "eos"),
    ],
)
def test_the_end_of_turn_is_read_off_the_template(chat: Any, template: str, end: str) -> None:
    chat.chat_template = template
    im_end = chat.convert_tokens_to_ids("<|im_end|>")
    stops = [chat.eos_token_id, im_end] if end == "turn" else [chat.eos_token_id]
    assert stop_token_ids(chat) == stops
    assert encode_response(chat, "x", [USER])[-1] == stops[-1]


def test_without_a_template_eos_alone_stops(tokenizer: Any) -> None:
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "marked",
    [
        "hi there<|endoftext|>",
        "hi there<|endoftext|><|endoftext|>",
        "hi there<|endoftext|> <|endoftext|>",
        "hi there<|endoftext|>\n",
        "hi there<|im_end|>",
        "hi there<|im_end|>\n<|endoftext|>\n\n",
    ],
)
@pytest.mark.parametrize("template", [CHATML, None])
def test_end_markers_written_in_a_response_are_removed_and_counted(
    jsonl: Callable[..., Path], chat: Any, marked: str, template: str | None
) -> None:
    chat.chat_template = template
    end = "<|im_end|>" if template else "<|endoftext|>"
    path = jsonl({"prompt": [USER], "response": "hi there"}, {"prompt": [USER], "response": marked})
    (clean, found), counts = load_demonstrations(path, chat, **LIMITS)
    assert counted(chat, found) == counted(chat, clean) == "hi there" + end
    assert counts == Counts(read=2, kept=2, end_markers=1)
    assert "1 end markers removed from responses" in str(counts)


def test_only_end_markers_are_removed(chat: Any) -> None:
    for text in ("hi \n", "a<|im_end|> b", "<unk", "x <|im_end", " "):
        (ids,) = encode_responses(chat, [text])
        assert ids == [*encode_plain(chat, [text])[0], chat.eos_token_id]
        assert chat.decode(ids[:-1]) == text
    assert encode_response(chat, "hi \n<|im_end|>") == encode_response(chat, "hi \n")


def test_the_header_of_a_first_assistant_turn_is_not_trained(
    jsonl: Callable[..., Path], chat: Any
) -> None:
    path = jsonl({"prompt": [ANSWER, USER], "response": "ran"})
    (found,), _ = load_demonstrations(path, chat, loss_on="all", **LIMITS)
    assert counted(chat, found) == "sat on<|im_end|>\nran<|im_end|>"
    chat.chat_template = None
    (found,), _ = load_demonstrations(path, chat, loss_on="all", **LIMITS)
    assert counted(chat, found) == " sat on\nran<|endoftext|>"


@pytest.mark.parametrize(("setting", "added"), [(None, True), (True, True), (False, False)])
def test_bos_begins_strings_and_documents(
    jsonl: Callable[..., Path], tmp_path: Path, with_bos: Path, setting: bool | None, added: bool
) -> None:
    tokenizer = load_tokenizer(with_bos, add_bos=setting)
    bos = [tokenizer.bos_token_id] * added
    assert bos_ids(tokenizer) == bos
    plain = encode_plain(tokenizer, ["the cat"])[0]
    assert encode_prompt(tokenizer, "the cat") == bos + plain
    assert encode_prompts(tokenizer, ["cat"], "the ") == [bos + plain]
    assert encode_prompt(tokenizer, "<s>the cat") == [tokenizer.bos_token_id, *plain]
    path = jsonl({"text": "the cat"}, {"text": "the cat"})
    (tokens,) = TokenStream.open(path, tokenizer, tmp_path / "cache").parts
    assert tokens.tolist() == [*bos, *plain, tokenizer.eos_token_id] * 2
    turns = jsonl({"prompt": [USER, ANSWER, USER], "response": "ran"}, name="turns.jsonl")
    (found,), _ = load_demonstrations(turns, tokenizer, loss_on="all", **LIMITS)
    assert found.tokens[: len(bos) + 1] == bos + encode_plain(tokenizer, ["user"])[0][:1]
    assert counted(tokenizer, found) == " sat on\nran<|endoftext|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_prompt(tokenizer, [USER]) == plain  # templates write their own bos
    (prompts, _) = load_prompts(jsonl({"prompt": "the cat"}), tokenizer, max_prompt_tokens=99)
    assert prompts == [bos + plain]


def test_bos_is_only_added_where_the_tokenizer_has_and_adds_one(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    assert bos_ids(load_tokenizer(tokenizer_folder)) == []
    with pytest.raises(UserError, match=r"data.add_bos is true, .* has no bos token"):
        load_tokenizer(tokenizer_folder, add_bos=True)
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    tokenizer.save_pretrained(tmp_path / "unused")  # it has a bos, and adds none, like GPT-2's
    config = json.loads((tmp_path / "unused" / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<s>"
    assert bos_ids(load_tokenizer(tmp_path / "unused")) == []
    unused = load_tokenizer(tmp_path / "unused", add_bos=True)
    assert bos_ids(unused) == [unused.bos_token_id]
