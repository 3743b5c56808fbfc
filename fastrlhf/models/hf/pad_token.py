"""The pad token of an exported model, and its tokenizer as transformers' batched calls need it.

Training here never pads. transformers pads every batch, and its reward models score the last token
that is not the pad token. If eos pads, they score the token before eos; without a pad token, they
refuse batches. An exported model therefore has a pad token at which no response ends.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastrlhf.data.tokenize import stop_token_ids
from fastrlhf.errors import UserError
from fastrlhf.models.heads import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
_RESERVED = ("pad", "reserved", "unused")
"""Parts of the names of special tokens that are for padding, or for nothing yet, best first."""


@dataclass(frozen=True)
class ExportTokenizer:
    """A tokenizer with a pad token, and the rows that the embedding lacks for it."""

    tokenizer: PreTrainedTokenizerFast
    rows: int
    note: str
    """What was changed, for the user; "" for nothing."""


def export_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, max_positions: int, head: Head
) -> ExportTokenizer:
    """Return a copy of `tokenizer` for a model with `vocab_size` rows.

    Its pad token is, in this order: its own, if no response ends at it; a special token that is
    reserved for padding or unused; a new token "<|pad|>", in a free row of the embedding if there
    is one. Texts longer than the model's positions can be truncated. Batches of a reward model are
    padded on the right, since transformers' GPT-2 counts padding on the left as positions.

    Raises UserError if the tokenizer's ids leave no room for a new token.
    """
    tokenizer = copy.deepcopy(tokenizer)
    stops = stop_token_ids(tokenizer)
    note = ""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stops:
        was = f"in place of {tokenizer.pad_token}, " if tokenizer.pad_token else ""
        found = _reserved_token(tokenizer, vocab_size, stops)
        if found is None:
            _add_token(tokenizer)
        else:
            tokenizer.pad_token = found
        what = "a new token" if found is None else "a special token without another use"
        note = f"the pad token is {tokenizer.pad_token} (id {tokenizer.pad_token_id}), {was}{what}"
    pad = int(tokenizer.pad_token_id)
    rows = max(0, pad + 1 - vocab_size)
    if rows:
        note += f"; the embedding has {rows} more row{'s' * (rows > 1)}, {vocab_size + rows} in all"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_positions)
    if head == "scalar":
        tokenizer.padding_side = "right"
    return ExportTokenizer(tokenizer, rows, note)


def _reserved_token(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, stops: list[int]
) -> str | None:
    used = {*stops, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template or ""
    free = [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        and number < vocab_size
        and number not in used
        and token.content not in template
    ]
    for part in _RESERVED:
        for text in free:
            if part in text.lower():
                return text
    return None


def _add_token(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary, text, number = tokenizer.get_vocab(), PAD, 0
    while text in vocabulary:
        number += 1
        text = f"<|pad_{number}|>"
    tokenizer.add_special_tokens({"pad_token": text})
    if tokenizer.pad_token_id in vocabulary.values():
        raise UserError(
            f"the tokenizer has no pad token other than eos, and its ids have gaps, so that a new "
            f"token gets the id {tokenizer.pad_token_id} of another; set its pad_token"
        )
