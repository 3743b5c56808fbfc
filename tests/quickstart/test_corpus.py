"""The corpus of a synthetic source tree: its contents, its splits, and its determinism."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from fastrlhf.errors import UserError
from fastrlhf.quickstart import corpus
from fastrlhf.quickstart.corpus import (
    Limits,
    demonstrate,
    gather,
    make_prompt,
    prompt_name,
    read_source,
    split_of,
    user_of,
)

NOUNS = [
    "file",
    "header",
    "socket",
    "table",
    "window",
    "matrix",
    "buffer",
    "record",
    "packet",
    "folder",
    "token",
    "cursor",
]
VERBS = ["Read", "Write", "Parse", "Close", "Create", "Remove", "Update", "Sort", "Copy", "Merge"]


def module(number: int) -> str:
    """Return a source file of ten functions whose sentences differ from those of other files."""
    handled = f"{NOUNS[number % 12]} of number {spell(number)}"
    lines = [f'"""Helpers to handle the {handled} in the program."""', ""]
    for verb in VERBS:
        noun = NOUNS[(number + len(verb)) % 12]
        lines += [f"def {verb.lower()}_{noun}_{spell(number)}(self, path, mode=1):"]
        text = f"{verb} the {noun} of the {spell(number)} and return it to the caller."
        seen = f"{noun} {spell(number)} that {verb.lower()} has seen"
        more = f"All the text of the {seen} is kept in the memory of it."
        lines += [f'    """{text}', "", f"    {more}", '    """']
    return "\n".join(lines)


def spell(number: int) -> str:
    """Return a made-up word for a number: 0 -> "aax", 27 -> "bbx"."""
    return chr(97 + number // 26) + chr(97 + number % 26) + "x"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lib")
    for number in range(160):
        folder = root / f"package{spell(number)}"
        folder.mkdir()
        (folder / "code.py").write_text(module(number))
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text('"""The words of the tests are not of the corpus."""')
    (root / "broken.py").write_text("def f(:")
    (root / "binary.py").write_bytes(b"\x00\xff\x00")
    return root


@pytest.fixture(scope="module")
def found(tree: Path) -> corpus.Corpus:
    return gather([tree])


def test_every_function_becomes_a_demonstration(found: corpus.Corpus) -> None:
    demonstrations = [d for split in found.demonstrations.values() for d in split]
    assert len(demonstrations) == 1600
    assert len({d.prompt for d in demonstrations}) == 1600
    first = min(demonstrations, key=lambda d: (d.user_id, d.prompt))
    assert first.prompt == "Function: close buffer aax\nTakes: path, mode\nSummary:\n".replace(
        "buffer", NOUNS[len("Close") % 12]
    )
    assert first.response == f"Close the {NOUNS[5]} of the aax and return it to the caller."
    assert first.record().keys() == {"prompt", "response", "user_id"}


def test_no_user_is_in_two_splits(found: corpus.Corpus) -> None:
    users = [{d.user_id for d in split} for split in found.demonstrations.values()]
    assert sum(map(len, users)) == len(set.union(*users)) == 160


def test_heldout_text_is_that_of_the_eval_users(found: corpus.Corpus) -> None:
    spelled = {d.user_id.removeprefix("package") for d in found.demonstrations["eval"]}
    assert len(found.heldout_text) == len(spelled)
    assert all(any(f"number {name} " in text for name in spelled) for text in found.heldout_text)
    assert not any(f"number {name} " in text for name in spelled for text in found.train_text)


def test_tests_and_broken_files_are_skipped(found: corpus.Corpus) -> None:
    assert not any("words of the tests" in text for text in found.train_text + found.heldout_text)
    assert len(found.train_text) + len(found.heldout_text) == 160


def test_the_corpus_depends_on_the_files_and_the_seed(tree: Path, found: corpus.Corpus) -> None:
    assert gather([tree]) == found
    other = gather([tree], seed=1)
    assert other.demonstrations != found.demonstrations
    assert sum(map(len, other.demonstrations.values())) == 1600


def test_repeated_text_is_kept_once(tree: Path, tmp_path: Path, found: corpus.Corpus) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for source in sorted(tree.glob("package*/code.py")):
        target = twin / ("other" + source.parent.name)
        target.mkdir()
        (target / "code.py").write_text(source.read_text())
    doubled = gather([tree, twin])
    assert sum(map(len, doubled.demonstrations.values())) == 1600
    assert len(doubled.train_text) + len(doubled.heldout_text) == 160


def test_limits(tree: Path) -> None:
    few = gather([tree], limits=Limits(demonstrations_per_user=3))
    assert sum(map(len, few.demonstrations.values())) == 3 * 160
    with pytest.raises(UserError, match="characters of documentation"):
        gather([tree], limits=Limits(source_bytes=20_000))


def test_links_are_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(module(0))
    os.symlink(tree, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="characters of documentation"):
        gather([tmp_path])


def test_prompt_round_trip() -> None:
    prompt = make_prompt("parseHTTPHeader", ["line_no", "_", "x1", "encoding", "fifth"])
    assert prompt == "Function: parse http header\nTakes: line no, x, encoding\nSummary:\n"
    assert prompt_name(prompt) == ["parse", "http", "header"]
    assert make_prompt("run", []) == "Function: run\nTakes: nothing\nSummary:\n"


@pytest.mark.parametrize(
    ("name", "doc"),
    [
        ("__init__", "Create the object from a file."),
        ("f", "Create the object from a file."),
        ("create", "Create."),
        ("create", "Create the following:"),
        ("create", "Create " + "a very long sentence of many words " * 5 + "."),
        ("create", "x = {1: 2}; y = [3, 4]; z = x + y"),
    ],
)
def test_unsuitable_functions_give_no_demonstration(name: str, doc: str) -> None:
    assert demonstrate(name, [], doc, "user") is None


@pytest.mark.parametrize(
    ("path", "user"),
    [
        ("argparse.py", "argparse"),
        ("torch/nn/modules/conv.py", "torch.nn.modules"),
        ("a/b/c/d/e.py", "a.b.c"),
        ("numpy-2.1.dist-info/METADATA", "numpy"),
    ],
)
def test_user_of(path: str, user: str) -> None:
    assert user_of(Path(path)) == user


def test_splits_have_their_shares() -> None:
    splits = [split_of(f"user{i}", seed=0) for i in range(4000)]
    for split, share in corpus.SPLITS.items():
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.03)


def test_metadata_yields_its_description_without_headers(tmp_path: Path) -> None:
    path = tmp_path / "METADATA"
    path.write_text("Metadata-Version: 2.1\nName: thing\n\nThing reads the files of the folder.\n")
    assert read_source(path, "thing") == (["Thing reads the files of the folder.\n"], [])


def test_long_constants_are_text(tmp_path: Path) -> None:
    path = tmp_path / "topics.py"
    text = "The statement is used in the body of the loop. " * 20
    path.write_text(f"topics = {{'if': {text!r}, 'x': 'short'}}")
    assert read_source(path, "pydoc") == ([text], [])


def test_source_files_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "dangerous.py"
    path.write_text("raise SystemExit('this module was run')\ndef f(): pass\n")
    assert read_source(path, "dangerous") == ([], [])


def test_real_demonstrations_of_the_standard_library() -> None:
    path = Path(ast.__file__)
    docs, demonstrations = read_source(path, "ast")
    by_name = {" ".join(prompt_name(d.prompt)): d.response for d in demonstrations}
    assert len(docs) > 20
    assert by_name["parse"] == "Parse the source into an AST node."
