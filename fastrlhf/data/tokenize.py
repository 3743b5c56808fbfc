"""Text to token ids: load a tokenizer folder, template a prompt, end a response with eos, train a byte-level BPE.

Two rules keep training safe. Nothing is ever padded (batches are packed), so eos is never used as padding. Responses
and documents are data: "<|endoftext|>" written inside one is encoded as plain characters, so that the only eos is the
one we append. Left out on purpose: truncation (datasets.py) and slow (pure Python) tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrlhf.data.records import PromptLike
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in the local folder `path`; UserError when it is missing, unreadable or has no eos
    token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such tokenizer folder; expected one saved by transformers (tokenizer.json), "
            "or train one with train_bpe"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _check_json(folder / name)
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        here = (folder / "tokenizer.json").is_file()
        reason = str(error).strip().splitlines()[0] if here else "it has no tokenizer.json"
        raise UserError(
            f"{folder}: not a tokenizer folder ({reason}); expected the files transformers saves"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: this tokenizer has no fast version; save one that writes tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f'{folder}: the tokenizer has no eos token; set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def conflicting_id(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> int | None:
    """A token id that means another token in the tokenizer saved in `folder`. None if there is none (either may have
    tokens that the other lacks), or if nothing is saved there any more.
    """
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        return None
    meant = {number: token for token, number in load_tokenizer(folder).get_vocab().items()}
    mine = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return next((number for number, token in mine if meant.get(number, token) != token), None)


def _check_json(path: Path) -> None:
    if not path.exists():
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None


def prompt_text(prompt: PromptLike) -> str:
    """The prompt as plain text: a string as it is, turns as "role: content" lines, each ended by a newline."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in prompt)


def read_prefix(path: str | Path | None) -> str:
    """The text of `data.prompt_prefix`, such as a few worked examples; "" for None. UserError when unreadable."""
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
    """Token ids of each prompt. Turns go through the tokenizer's chat template, which opens the assistant's turn, or
    through `prompt_text` when it has none. A string is encoded as it is: special tokens written in it count as such
    (people keep prompts already templated) and none are added. `prefix` stands before each, as it is.
    """
    texts = [prefix + _templated(tokenizer, prompt) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[PromptLike], with_spans: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """As `encode_prompts`, and `with_spans` the spans [start, end) of tokens that the assistant wrote in its earlier
    turns (else none).

    What the template puts behind a turn, such as an end-of-turn token, belongs to it. UserError when the template
    writes a turn otherwise once another follows, so that there is no such span.
    """
    if not with_spans:
        return [(ids, []) for ids in encode_prompts(tokenizer, prompts)]
    texts = [_templated(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = []
    for prompt, text, ids, offsets in zip(
        prompts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        spans = []
        for start, end in _assistant_spans(tokenizer, prompt, text):
            inside = [
                place for place, (first, last) in enumerate(offsets) if first < end and last > start
            ]
            if inside:
                spans.append((inside[0], inside[-1] + 1))
        found.append((ids, spans))
    return found


def _assistant_spans(
    tokenizer: PreTrainedTokenizerFast, prompt: PromptLike, text: str
) -> list[tuple[int, int]]:
    """Where the assistant's turns of a prompt stand in its templated text, in characters."""
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
                f"the tokenizer's chat template writes turn {number + 1} of a prompt otherwise when more turns follow; "
                "use data.loss_on=last"
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
            f"the tokenizer's chat template refuses a prompt with turns {roles}: {error}"
        ) from None


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike) -> list[int]:
    """Token ids of one prompt, as `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_responses(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each response with eos at its end. An eos already written there is not doubled."""
    bare = [text.removesuffix(tokenizer.eos_token) for text in texts]
    return [[*ids, tokenizer.eos_token_id] for ids in encode_plain(tokenizer, bare)]


def encode_response(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of one response, as `encode_responses`."""
    return encode_responses(tokenizer, [text])[0]


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, taken literally: nothing added, no special token recognised."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path) -> None:
    """Train a byte-level BPE (every string encodes, no unknown token) on `texts` and save it as a transformers folder
    `out`.

    `vocab_size` counts the 256 bytes and the eos token "<|endoftext|>" (id 0); fewer tokens come out when the texts
    are too small to give so many merges. The same texts always give the same tokenizer.
    """
    if vocab_size < 257:
        raise UserError(
            f"a byte-level BPE needs a vocab_size of at least 257 (256 bytes and eos), not {vocab_size}"
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
