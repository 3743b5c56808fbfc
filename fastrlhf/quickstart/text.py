"""Convert documentation markup to plain English paragraphs, and function names to words.

It uses only regular expressions, tuned on reStructuredText, Markdown and numpy/Google-style
docstrings.

Not supported: complete reStructuredText. docutils would be one more dependency, and the text only
has to be good enough to pretrain a tiny GPT.
"""

from __future__ import annotations

import inspect
import re
import string

# The most frequent English function words: they are frequent in prose, but not in tables, lists of
# names and other languages.
_FUNCTION_WORDS = (
    "a an the of to in is are be if for and or with that this it on as by from not will can when "
    "which at has have you we no all any each may must should was were been its their into than "
    "then used"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

_LICENCE = re.compile(
    r"copyright|licen[sc]e|warrant(y|ies)|all rights reserved|permission is hereby|redistribut"
    r"|\(c\) (19|20)\d\d",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^(```|~~~).*?^(```|~~~)\s*$", re.DOTALL | re.MULTILINE)
_UNDERLINE = re.compile(r"^\s*([=\-~^*#+.`_\"'])\1{2,}\s*$")
_FIELD = re.compile(r"^\s*(:\w[\w ]*:|@\w+|\.\. |#+ |\|)")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s+[A-Z]|$)")
# (characters that every match contains, pattern, replacement), applied in this order. Most
# paragraphs have none of the characters, and looking for these is much faster than matching the
# pattern.
_INLINE = [
    ("![", re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),  # images
    ("[", re.compile(r"\[`?([^\]`]+)`?\](\([^)]*\)|\[[^\]]*\])"), r"\1"),  # Markdown links
    ("`", re.compile(r"`([^`<]+?)\s*<[^>`]+>`_{0,2}"), r"\1"),  # reStructuredText links
    (
        ":`",
        re.compile(r":[\w:+-]+:`~?!?(?:[\w.]*\.)?([^`]+)`"),
        r"\1",
    ),  # roles such as :class:`~a.b.C`
    ("`", re.compile(r"`+([^`]*)`+_?"), r"\1"),
    ("<", re.compile(r"</?\w[^>]*>"), ""),  # HTML tags
    ("://", re.compile(r"https?://\S+"), ""),
    ("*", re.compile(r"\*\*?(\w[^*]*?)\*\*?"), r"\1"),  # emphasis
]
_LETTERS = f"{string.ascii_letters} ".encode("ascii")
_TYPOGRAPHY = {
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: "-",
    0x2026: "...",
    0xA0: " ",
}


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: letters, with an apostrophe allowed inside."""
    return [word.lower() for word in _WORD.findall(text)]


def name_words(identifier: str) -> list[str]:
    """Split an identifier at underscores, digits and capitals.

    `parseHTTPHeader_v2` -> ["parse", "http", "header", "v"].
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)
    return [part.lower() for part in parts]


def plain(text: str) -> str:
    """Return the text on one line with ASCII quotes and without inline markup.

    The markup may be reStructuredText, Markdown or HTML.
    """
    text = text.translate(_TYPOGRAPHY)
    for contained, pattern, replacement in _INLINE:
        if contained in text:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring as plain text, "" if it begins with markup."""
    paragraph = inspect.cleandoc(text).split("\n\n", 1)[0]
    if any(
        _FIELD.match(line) or _UNDERLINE.match(line) or ">>>" in line
        for line in paragraph.splitlines()
    ):
        return ""
    sentence = plain(paragraph)
    end = _SENTENCE_END.search(sentence)
    return sentence[: end.end()] if end else sentence


def prose_paragraphs(text: str) -> list[str]:
    """Return the English paragraphs of a docstring or a documentation file, without markup.

    Doctests, code blocks, directives, headings, field lists, licence texts, tables and other
    languages are dropped.
    """
    text = _FENCE.sub("", inspect.cleandoc(text))
    kept = []
    for block in re.split(r"\n\s*\n", text):
        if ">>>" in block:
            block = block[: block.index(">>>")]
        lines = [
            line
            for line in block.splitlines()
            if not (_FIELD.match(line) or _UNDERLINE.match(line))
        ]
        indented = bool(lines) and all(line.startswith("    ") for line in lines)
        if indented and not block.rstrip().endswith("."):
            continue  # far more often code or a table than prose
        paragraph = plain("\n".join(lines))
        if is_prose(paragraph):
            kept.append(paragraph)
    return kept


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is English prose: letters, function words, no licence text."""
    if not paragraph.isascii() or _LICENCE.search(paragraph):
        return False
    found = words(paragraph)
    others = len(paragraph.encode("ascii").translate(None, _LETTERS))
    if len(found) < 4 or len(paragraph) - others < 0.85 * len(paragraph):
        return False
    return sum(word in FUNCTION_WORDS for word in found) >= 0.12 * len(found)
