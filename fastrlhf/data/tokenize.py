"""Text to token ids: prompts, conversations, responses, documents, byte-level BPE training.

Two rules keep training safe. Nothing is ever padded (batches are packed), so eos is never used as
padding. Responses and documents are data: "<|endoftext|>" written inside one is encoded as plain
characters, so that the only end marker is the one appended here.

Whatever a tokenizer or a chat template raises is an EncodeError. The `try_` functions return it in
the place of its record, so that the loaders can name the record.

Out of scope: truncation (datasets.py), loading (tokenizer_folder.py), templates (chat_template.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from fastrlhf.data.chat_template import (
    Span,
    assistant_spans,
    has_template,
    prompt_text,
    render,
    turn_end,
)
from fastrlhf.data.foreign_errors import EncodeError, foreign_errors
from fastrlhf.data.records import PromptLike
from fastrlhf.data.token_ids import check_ids, largest_id
from fastrlhf.data.tokenizer_folder import END_OF_TEXT, bos_ids, load_tokenizer, tokenizer_files
from fastrlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "END_OF_TEXT",
    "EncodeError",
    "bos_ids",
    "check_ids",
    "largest_id",
    "load_tokenizer",
    "prompt_text",
    "tokenizer_files",
]

Conversation: TypeAlias = tuple[list[int], list[Span]]
"""The token ids of a prompt, and the token spans of the assistant's turns in it."""
Item = TypeVar("Item")
Result = TypeVar("Result")


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
    recognized (people keep prompts already templated), and none are added but `bos_ids`. Raises
    EncodeError for a prompt that cannot be encoded, or that is empty once tokenized.
    """
    return [ids for ids, _ in _all_good(try_encode_prompts(tokenizer, prompts, prefix=prefix))]


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[PromptLike], with_spans: bool
) -> list[Conversation]:
    """Return the token ids of each prompt, and the token spans of the assistant's earlier turns.

    The spans are [start, end); the list is empty without `with_spans`. What the template appends to
    a turn, such as an end-of-turn token, belongs to the turn. Raises EncodeError if the template
    formats a turn differently when another turn follows, so that it has no such span.
    """
    return _all_good(try_encode_prompts(tokenizer, prompts, with_spans=with_spans))


def try_encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[PromptLike],
    *,
    prefix: str = "",
    with_spans: bool = False,
) -> list[Conversation | EncodeError]:
    """Return what `encode_prompts` or `encode_conversations` does, or the error, for each prompt."""

    def text_and_spans(prompt: PromptLike) -> tuple[str, list[Span]]:
        text = render(tokenizer, prompt)
        return prefix + text, assistant_spans(tokenizer, prompt, text) if with_spans else []

    def encode(texts: Sequence[str]) -> list[Any]:
        return _encodings(tokenizer, texts, split_special_tokens=False)

    bos = bos_ids(tokenizer)
    rendered = [_attempt(text_and_spans, prompt) for prompt in prompts]
    good = [item for item in rendered if not isinstance(item, EncodeError)]
    encodings = iter(try_each(encode, [text for text, _ in good]))
    found: list[Conversation | EncodeError] = []
    for prompt, item in zip(prompts, rendered, strict=True):
        encoding = item if isinstance(item, EncodeError) else next(encodings)
        if isinstance(encoding, EncodeError):
            found.append(encoding)
            continue
        assert not isinstance(item, EncodeError)
        ids, spans = encoding.ids, _token_spans(item[1], encoding.offsets) if item[1] else []
        if bos and ids[:1] != bos and not has_template(tokenizer, prompt):
            ids, spans = bos + ids, [(first + 1, end + 1) for first, end in spans]
        found.append((ids, spans) if ids else EncodeError(_EMPTY))
    return found


_EMPTY = "the prompt is empty once tokenized; expected text that the tokenizer has tokens for"


def _token_spans(spans: list[Span], offsets: list[Span]) -> list[Span]:
    """Return the spans of characters as spans of tokens."""
    found = []
    for start, end in spans:
        inside = [t for t, (first, last) in enumerate(offsets) if first < end and last > start]
        if inside:
            found.append((inside[0], inside[-1] + 1))
    return found


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike) -> list[int]:
    """Return the token ids of one prompt; see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_responses(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    prompts: Sequence[PromptLike] | None = None,
) -> list[list[int]]:
    """Return the token ids of each response with its end marker.

    The end of a response to turns is the chat template's end of turn (`turn_end`) if it has one.
    Else, and without `prompts`, it is eos. End markers written at the end of a text are not
    doubled: see `without_end_marker`.
    """
    ends = [end_marker(tokenizer, prompt) for prompt in prompts or [""] * len(texts)]
    plain = encode_plain(tokenizer, [without_end_marker(tokenizer, text) for text in texts])
    return [[*ids, *end] for ids, end in zip(plain, ends, strict=True)]


def end_marker(tokenizer: PreTrainedTokenizerFast, prompt: PromptLike) -> list[int]:
    """Return the tokens that end a response to `prompt`: the template's end of turn, or eos."""
    eos = [int(tokenizer.eos_token_id)]
    return (turn_end(tokenizer) or eos) if has_template(tokenizer, prompt) else eos


def encode_response(
    tokenizer: PreTrainedTokenizerFast, text: str, prompt: PromptLike | None = None
) -> list[int]:
    """Return the token ids of one response; see `encode_responses`."""
    return encode_responses(tokenizer, [text], None if prompt is None else [prompt])[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens at which generation stops: eos, then the chat template's end of turn."""
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *turn_end(tokenizer)[-1:]]))


def without_end_marker(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return `text` without the end markers at its end, and without the spaces after them.

    Markers are the texts of eos, of the template's end of turn and of other special tokens: data
    sets contain them, also doubled or followed by a line end. Inside a text they stay, as plain
    characters.
    """
    markers = _end_markers(tokenizer)
    bare = text
    while (shorter := bare.rstrip()).endswith(markers):
        bare = shorter[: -len(next(marker for marker in markers if shorter.endswith(marker)))]
    return bare


_markers: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[str | None, tuple[str, ...]]]
_markers = WeakKeyDictionary()


def _end_markers(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    template = tokenizer.chat_template
    known, markers = _markers.get(tokenizer, (None, ()))
    if known != template or not markers:
        kept = {tokenizer.unk_token, tokenizer.mask_token}  # these may be words of a text
        texts = {*tokenizer.all_special_tokens} - kept
        texts |= {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and token.content not in kept
        }
        ids = stop_token_ids(tokenizer)
        texts |= {str(tokenizer.decode([token])) for token in ids}
        markers = tuple(sorted((text for text in texts if text.strip()), key=len, reverse=True))
        _markers[tokenizer] = (template, markers)
    return markers


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text; no special token is added or recognized.

    Raises EncodeError if the tokenizer fails, such as for a character that it has no token for.
    """
    return [encoding.ids for encoding in _encodings(tokenizer, texts, split_special_tokens=True)]


def _encodings(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, split_special_tokens: bool
) -> list[Any]:
    """Return the `tokenizers.Encoding` (ids, offsets) of each text; raise EncodeError."""

    def refusal(reason: str) -> UserError:
        return EncodeError(f"the tokenizer cannot encode the text: {reason}")

    if not texts:
        return []
    with foreign_errors(refusal):
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        encodings: list[Any] = encoded.encodings
    return encodings


def _attempt(function: Callable[[Item], Result], item: Item) -> Result | EncodeError:
    try:
        return function(item)
    except EncodeError as error:
        return error


def try_each(
    encode: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> list[Result | EncodeError]:
    """Return what the batch function `encode` does, with an EncodeError for each item it refuses.

    A batch that fails is halved until the items that fail are found.
    """
    try:
        return [*encode(items)]
    except EncodeError as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return try_each(encode, items[:half]) + try_each(encode, items[half:])


def _all_good(results: list[Result | EncodeError]) -> list[Result]:
    """Return `results`; raise the first error among them."""
    good = []
    for result in results:
        if isinstance(result, EncodeError):
            raise result
        good.append(result)
    return good


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
