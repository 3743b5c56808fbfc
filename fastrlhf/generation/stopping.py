"""Stop strings: text that ends a response, in addition to the stop token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARGIN = 4
"""Tokens decoded in addition to those of the longest stop string.

The token at the edge of the window may decode incorrectly (part of a multi-byte character, a
leading space that some tokenizers drop); the margin keeps it outside of the match.
"""


class StopStrings:
    """Detector of stop strings; decodes a window of tokens that is independent of the length."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        # Every token of a match covers at least one byte of it.
        self.window = max(len(text.encode()) for text in stop) + MARGIN

    def completed_by(self, tokens: list[int]) -> bool:
        """Return whether the last token completes a stop string.

        The text without the last token must not contain one.
        """
        text = self.tokenizer.decode(
            tokens[-self.window :], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(stop in text for stop in self.stop)
