"""Stop strings: text that ends a response, besides the stop token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARGIN = 4
"""Tokens decoded beyond the longest stop string, so that one cut in two by the window's edge (part of a multi-byte
character, a leading space that some tokenizers drop) is not inside the match."""


class StopStrings:
    """Says whether a response has just completed a stop string, decoding a few tokens whatever the response's
    length.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        # Every token of a match is at least one byte of it.
        self.window = max(len(text.encode()) for text in stop) + MARGIN

    def completed_by(self, tokens: list[int]) -> bool:
        """True if the text of `tokens` holds a stop string, given that it held none without the last token."""
        text = self.tokenizer.decode(
            tokens[-self.window :], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self.stop)
