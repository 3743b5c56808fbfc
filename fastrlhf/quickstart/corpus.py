"""A corpus of English text from the documentation of the installed Python packages.

`gather` parses the source files of the standard library and of the installed packages with `ast`
(nothing is imported or run). It extracts paragraphs of prose for the tokenizer and pretraining, and
demonstrations: the prompt is a function's name and arguments in words, the response is the first
sentence of its docstring.

The unit of every split is the "user": the folder of a file, as a dotted name of at most three
parts. No user is in two splits. The held-out text is that of the users whose prompts are held out,
so neither evaluation sees a line of training text. The result depends only on the installed files
and the seed.

Out of scope: tests, vendored copies of other packages, and a limit in seconds, which would make the
result depend on the machine's load; bytes are limited instead.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import email
import gc
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastrlhf.errors import UserError
from fastrlhf.quickstart.text import (
    first_sentence,
    is_prose,
    name_words,
    plain,
    prose_paragraphs,
    words,
)

_SKIPPED = (
    "test tests testing idle_test __pycache__ site-packages dist-packages _vendor _vendored "
    "vendored third_party licenses externals pgen2 encodings fastrlhf"
)
SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
# Share of the users in each split. "eval" is held out of all training, pretraining included.
SPLITS = {"sft": 0.58, "ranking": 0.20, "ppo": 0.14, "eval": 0.08}


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Limits:
    """Maximum amounts that are read and kept; the defaults take about 15 s on one core."""

    source_bytes: int = 48_000_000
    """Python source in total."""
    package_bytes: int = 6_000_000
    """Python source of one top-level package, so that the largest do not dominate."""
    file_bytes: int = 800_000
    """Size of a file; nearly all larger files are generated tables."""
    text_characters: int = 12_000_000
    """Prose in total."""
    demonstrations_per_user: int = 200
    """As in the paper (section 3.2): at most 200 prompts per user."""
    demonstrations_per_name: int = 4
    """Per function name, so that a package's hundred `forward` methods do not fill a split."""


@dataclass(frozen=True)
class Demonstration:
    """One function: its name as the prompt, its author's summary as the response."""

    prompt: str
    response: str
    user_id: str

    def record(self) -> dict[str, str]:
        """Return the record of a demonstrations file."""
        return {"prompt": self.prompt, "response": self.response, "user_id": self.user_id}


@dataclass(frozen=True)
class Corpus:
    """Text and demonstrations, as returned by `gather`."""

    train_text: list[str] = field(default_factory=list)
    """Documents for the tokenizer and pretraining, one per source file; paragraphs are separated by
    an empty line."""
    heldout_text: list[str] = field(default_factory=list)
    """Documents of the "eval" users, for the pretraining loss."""
    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    """Demonstrations of each split: "sft", "ranking", "ppo", "eval"."""


def make_prompt(name: str, arguments: list[str]) -> str:
    """Return the prompt of a function: its name in words, up to four arguments, and a cue.

    The name is written in words ("parse header" for `parse_header`), so that a model of a million
    parameters can learn to copy them into the summary.
    """
    shown = [" ".join(name_words(argument)) for argument in arguments[:4]]
    inside = ", ".join(argument for argument in shown if argument) or "nothing"
    return f"Function: {' '.join(name_words(name))}\nTakes: {inside}\nSummary:\n"


def prompt_name(prompt: str) -> list[str]:
    """Return the words of the function's name in a prompt made by `make_prompt`."""
    return words(prompt.partition("\n")[0].partition(":")[2])


def default_roots() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    found = [Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")]
    return [root for root in dict.fromkeys(found) if root.is_dir()]


def gather(
    roots: Iterable[Path] | None = None, *, seed: int = 0, limits: Limits | None = None
) -> Corpus:
    """Gather text and demonstrations from the Python sources and documentation under `roots`.

    The default roots are those of this interpreter. The same files and seed give the same corpus.
    Raises UserError if there is too little text to learn from.
    """
    limits = limits or Limits()
    roots = default_roots() if roots is None else [Path(root) for root in roots]
    with _paused_gc():
        return _gather(roots, seed, limits)


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    """Pause the cyclic garbage collector.

    A file's syntax tree would trigger it hundreds of times, although trees have no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _gather(roots: list[Path], seed: int, limits: Limits) -> Corpus:
    corpus = Corpus(demonstrations={split: [] for split in SPLITS})
    seen: set[bytes] = set()
    counts: collections.Counter[str] = collections.Counter()
    characters = 0
    for path, user in _select(roots, limits):
        split = split_of(user, seed)
        docs, demonstrations = read_source(path, user)
        for demonstration in demonstrations:
            if _admit(demonstration, counts, limits):
                corpus.demonstrations[split].append(demonstration)
        if characters < limits.text_characters:
            paragraphs = [p for doc in docs for p in prose_paragraphs(doc) if _first_time(p, seen)]
            if paragraphs:
                document = "\n\n".join(paragraphs)
                characters += len(document)
                (corpus.heldout_text if split == "eval" else corpus.train_text).append(document)
    fewest = min(len(found) for found in corpus.demonstrations.values())
    if characters < 100_000 or fewest < 20:
        raise UserError(
            f"{', '.join(map(str, roots))}: only {characters:,} characters of documentation and "
            f"{fewest} documented functions in the smallest split, expected 100,000 and 20; "
            "the quickstart learns from the docstrings of the standard library and the installed "
            "packages: install their .py files"
        )
    return corpus


def split_of(user: str, seed: int) -> str:
    """Return the split of a user, by a hash of its name and the seed.

    So it does not depend on the other installed packages.
    """
    point = int.from_bytes(_digest(f"{seed}:{user}"), "big") / 2**64
    for split, share in SPLITS.items():
        if point < share:
            return split
        point -= share
    return "eval"


def read_source(path: Path, user: str) -> tuple[list[str], list[Demonstration]]:
    """Return the documentation strings and the demonstrations of a file.

    Both are empty if the file cannot be read or parsed.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".py":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(content)
            return _documented(tree, user)
        text = content.decode("utf-8")
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        # Extremely nested source raises RecursionError or MemoryError.
        return [], []
    if path.name == "METADATA":
        text = str(email.message_from_string(text).get_payload())
    return [text], []


def _documented(tree: ast.Module, user: str) -> tuple[list[str], list[Demonstration]]:
    docs, demonstrations = [], []
    stack: list[_Documented] = [tree]
    while stack:
        node = stack.pop()
        doc = ast.get_docstring(node, clean=False)
        if doc:
            docs.append(doc)
        if doc and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            demonstration = demonstrate(node.name, arguments, doc, user)
            if demonstration:
                demonstrations.append(demonstration)
        if isinstance(node, (ast.Module, ast.ClassDef)):
            definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            stack.extend(child for child in reversed(node.body) if isinstance(child, definitions))
            docs.extend(_long_strings(node))
    return docs, demonstrations


def _long_strings(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Yield texts that are constants: `X = \"\"\"...\"\"\"` and `topics = {"if": "..."}`.

    The latter is the language reference in `pydoc_data`.
    """
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            values = (
                statement.value.values
                if isinstance(statement.value, ast.Dict)
                else [statement.value]
            )
            for value in values:
                if (
                    isinstance(value, ast.Constant)
                    and isinstance(value.value, str)
                    and len(value.value) > 500
                ):
                    yield value.value


def demonstrate(name: str, arguments: list[str], doc: str, user: str) -> Demonstration | None:
    """Return a demonstration from one function's docstring.

    Returns None if the docstring does not begin with a short sentence that summarizes the function.
    """
    spoken = name_words(name)
    response = first_sentence(doc)
    found = words(response)
    fits = (
        3 <= len(found) <= 24
        and len(response) <= 140
        and response[0].isalpha()
        and response[-1] not in ":,;"
    )
    if name.startswith("__") or not fits or not 1 <= len(spoken) <= 5 or max(map(len, spoken)) < 3:
        return None
    # A short summary may have no function word at all, so some are added for the check.
    if not is_prose(response + " of the of the"):
        return None
    return Demonstration(
        make_prompt(name, [a for a in arguments if a not in ("self", "cls")]), response, user
    )


def _admit(demonstration: Demonstration, counts: collections.Counter[str], limits: Limits) -> bool:
    """Return whether a demonstration is new and within the limits; count it if so.

    The limits are on its user and on its function's name.
    """
    name = "name " + " ".join(prompt_name(demonstration.prompt))
    user = "user " + demonstration.user_id
    once = ["prompt " + demonstration.prompt, "response " + " ".join(words(demonstration.response))]
    if any(counts[key] for key in once):
        return False
    if (
        counts[name] >= limits.demonstrations_per_name
        or counts[user] >= limits.demonstrations_per_user
    ):
        return False
    counts.update([name, user, *once])
    return True


def _first_time(paragraph: str, seen: set[bytes]) -> bool:
    """Return False for a paragraph that was seen before.

    Class names and numbers are ignored: generated docstrings often differ only in these.
    """
    key = _digest(
        " ".join(word for word in plain(paragraph).split() if word.islower() and word.isalpha())
    )
    if key in seen:
        return False
    seen.add(key)
    return True


def _select(roots: list[Path], limits: Limits) -> Iterator[tuple[Path, str]]:
    """Yield the files to read and their users, within the limits on bytes, in a fixed order.

    The standard library comes first.
    """
    left = limits.source_bytes
    for root in roots:
        packages: dict[str, list[Path]] = {}
        for path in _walk(root):
            packages.setdefault(path.relative_to(root).parts[0], []).append(path)
        for _, paths in sorted(packages.items()):
            # A package that is too large to read completely is sampled evenly, by hash, not cut at
            # some letter of the alphabet.
            package_left = limits.package_bytes
            for path in sorted(paths, key=lambda p: _digest(p.relative_to(root).as_posix())):
                size = path.stat().st_size
                if size <= min(limits.file_bytes, package_left, left):
                    package_left -= size
                    left -= size
                    yield path, user_of(path.relative_to(root))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield Python sources and documentation files; skip tests, vendored packages and links."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in SKIPPED_FOLDERS or path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix in (".py", ".rst", ".md") or path.name == "METADATA":
            yield path


def user_of(relative: Path) -> str:
    """Return the user of a file: its folders, at most three, as a dotted name.

    torch/nn/modules/conv.py -> torch.nn.modules; argparse.py -> argparse;
    numpy-2.1.dist-info/METADATA -> numpy.
    """
    folders = relative.parts[:-1][:3] or (relative.stem,)
    return ".".join((folders[0].partition("-")[0], *folders[1:])).lower()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
