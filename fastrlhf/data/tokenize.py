"""Text to token ids: tokenizer folders, chat templates, eos, byte-level BPE training.

Two rules keep training safe. Nothing is ever padded (batches are packed), so eos is never used as
padding. Responses and documents are data: "<|endoftext|>" written inside one is encoded as plain
characters, so that the only eos is the one appended here.

Out of scope: truncation (datasets.py). Not supported: slow (pure Python) tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastrlhf.data.records import PromptLike
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer saved in the local folder `path`.

    Raises UserError if it is missing, unreadable, slow, or has no eos token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such tokenizer folder; "
            "expected one saved by transformers (tokenizer.json), or train one with train_bpe"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _check_json(folder / name)
    from transformers import AutoTokenizer

    try:
        tokenizer = cast(
            "PreTrainedTokenizerFast",
            AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            ),
        )
    except (OSError, ValueError, KeyError) as error:
        here = (folder / "tokenizer.json").is_file()
        reason = str(error).strip().splitlines()[0] if here else "it has no tokenizer.json"
        raise UserError(
            f"{folder}: not a tokenizer folder ({reason}); expected the files transformers saves"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: the tokenizer has no fast version; save one that writes tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos token; "
            'set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def conflicting_id(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> int | None:
    """Return a token id that is a different token in the tokenizer saved in `folder`.

    Returns None if there is no such id (either may have tokens that the other lacks), or if the
    folder no longer has a tokenizer.
    """
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        return None
    saved = {number: token for token, number in load_tokenizer(folder).get_vocab().items()}
    current = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return next((number for number, token in current if saved.get(number, token) != token), None)


def _check_json(path: Path) -> None:
    if not path.exists():
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None


def prompt_text(prompt: PromptLike) -> str:
    """Return the prompt as plain text: turns become lines "role: content", each with a newline."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt)


def read_prefix(path: str | Path | None) -> str:
    """Return the text of `data.prompt_prefix`, such as a few worked examples; "" for None.

    Raises UserError if the file cannot be read.
    """
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as the prompt prefix ({error}); expected a UTF-8 text file"
        ) from None


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[PromptLike], prefix: str = ""
) -> list[list[int]]:
    """Return the token ids of each prompt, with `prefix` prepended to its text.

    Turns are formatted by the tokenizer's chat template, which opens the assistant's turn, or by
    `prompt_text` if it has none. A string is encoded as it is: special tokens written in it are
    recognized (people keep prompts already templated), and none are added.
    """
    texts = [prefix + _templated(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[PromptLike], with_spans: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the token ids of each prompt, and the token spans of the assistant's earlier turns.

    The spans are [start, end); the list is empty without `with_spans`. What the template appends to
    a turn, such as an end-of-turn token, belongs to the turn. Raises UserError if the template
    formats a turn differently when another turn follows, so that it has no such span.
    """
    if not with_spans:
        return [(ids, []) for ids in encode_prompts(tokenizer, prompts)]
    texts = [_templated(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    conversations = []
    for prompt, text, ids, offsets in zip(
        prompts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        spans = []
        for start, end in _assistant_spans(tokenizer, prompt, text):
            inside = [t for t, (first, last) in enumerate(offsets) if first < end and last > start]
            if inside:
                spans.append((inside[0], inside[-1] + 1))
        conversations.append((ids, spans))
    return conversations


def _assistant_spans(
    tokenizer: PreTrainedTokenizerFast, prompt: PromptLike, text: str
) -> list[tuple[int, int]]:
    """Return the character spans [start, end) of the assistant's turns in the templated text."""
    spans = []
    for number, turn in enumerate([] if isinstance(prompt, str) else prompt):
        if turn["role"] != "assistant":
            continue
        before = _templated(tokenizer, prompt[:number]) if number else ""
        if not tokenizer.chat_template:
            before += "assistant: "
        through = _templated(tokenizer, prompt[: number + 1], opens=False)
        if not (
            text.startswith(before) and text.startswith(through) and len(before) < len(through)
        ):
            raise UserError(
                f"the tokenizer's chat template formats turn {number + 1} of a prompt differently "
                "when more turns follow; use data.loss_on=last"
            )
        spans.append((len(before), len(through)))
    return spans


def _templated(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike, opens: bool = True) -> str:
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return prompt_text(prompt)
    from jinja2 import TemplateError

    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens)
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in prompt)
        raise UserError(
            f"the tokenizer's chat template rejects a prompt with turns {roles}: {error}"
        ) from None


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike) -> list[int]:
    """Return the token ids of one prompt; see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_responses(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each response with eos at its end.

    An eos already written there is not doubled.
    """
    bare = [text.removesuffix(tokenizer.eos_token) for text in texts]
    return [[*ids, tokenizer.eos_token_id] for ids in encode_plain(tokenizer, bare)]


def encode_response(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the token ids of one response; see `encode_responses`."""
    return encode_responses(tokenizer, [text])[0]


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text; no special token is added or recognized."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path) -> None:
    """Train a byte-level BPE on `texts` and save it as the transformers folder `out`.

    It encodes every string and has no unknown token. `vocab_size` includes the 256 bytes and the
    eos token "<|endoftext|>" (id 0). The result is smaller if the texts are too small for that many
    merges. The same texts always give the same tokenizer. Raises UserError if `vocab_size` is below
    257.
    """
    if vocab_size < 257:
        raise UserError(
            f"vocab_size is {vocab_size}; "
            "a byte-level BPE needs at least 257 (256 bytes and the eos token)"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(str(out))
