"""Hand-written docstrings: markup is removed, prose is kept."""

from __future__ import annotations

import pytest

from fastrlhf.quickstart.text import (
    first_sentence,
    is_prose,
    name_words,
    plain,
    prose_paragraphs,
    words,
)


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("parse_header", ["parse", "header"]),
        ("parseHTTPHeader", ["parse", "http", "header"]),
        ("_private2nd", ["private", "nd"]),
        ("URL", ["url"]),
        ("__", []),
    ],
)
def test_name_words(identifier: str, expected: list[str]) -> None:
    assert name_words(identifier) == expected


def test_words_keep_apostrophes_and_drop_numbers() -> None:
    assert words("Don't use 3 X-rays!") == ["don't", "use", "x", "rays"]


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("Return a :class:`~pkg.mod.Reader`.", "Return a Reader."),
        ("See :py:meth:`run` and ``x = 1``.", "See run and x = 1."),
        ("Read `the manual <https://example.org>`_ first.", "Read the manual first."),
        ("Read [the manual](https://example.org) first.", "Read the manual first."),
        ("A *very* **bold** word.", "A very bold word."),
        ("It\u2019s \u201cquoted\u201d\u2026", 'It\'s "quoted"...'),
        ("two\n  lines", "two lines"),
    ],
)
def test_plain(markup: str, expected: str) -> None:
    assert plain(markup) == expected


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the size. It is cached.", "Return the size."),
        ("Return the size\n    of a file.\n\n    More.", "Return the size of a file."),
        ("Use a separator, e.g. Comma, to split.", "Use a separator, e.g. Comma, to split."),
        ("Divide by 2.5 and round.", "Divide by 2.5 and round."),
        (":param x: the input", ""),
        ("Title\n=====\n", ""),
        (">>> f(1)\n2", ""),
        ("", ""),
    ],
)
def test_first_sentence(doc: str, expected: str) -> None:
    assert first_sentence(doc) == expected


def test_prose_paragraphs_keep_sentences_and_drop_the_rest() -> None:
    doc = """Read the lines of a file and return them as a list.

        The file is closed when the last of the lines has been read.
        >>> read_lines("x")
        ['a line that is not of the prose in the text']

        Parameters
        ----------

        .. note:: this directive is not kept as it is in the list of the fields

        ```
        for the code in the fence of a block: is not a part of it
        ```

            indented = the(code, of, an, example)

        Copyright is held by the authors of the software and all of the contributors.

        Liste des mots dont la page fait partie sans phrase anglaise."""
    assert prose_paragraphs(doc) == [
        "Read the lines of a file and return them as a list.",
        "The file is closed when the last of the lines has been read.",
    ]


@pytest.mark.parametrize(
    ("paragraph", "prose"),
    [
        ("The value of the option is read from the file.", True),
        ("x = [1, 2, 3]; y = {a: b}; z = (x, y)", False),
        ("alpha beta gamma delta epsilon zeta eta theta", False),
        ("Permission is hereby granted to any person to use the software.", False),
        ("The caf\u00e9 is in the street of the town.", False),
        ("Too short.", False),
    ],
)
def test_is_prose(paragraph: str, prose: bool) -> None:
    assert is_prose(paragraph) is prose
