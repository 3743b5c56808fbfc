"""Checks at the start of a run that all ranks do the same: equal facts, shared folders.

Two torchrun agents with different learning rates or files would train to the end without an error.
Here each rank publishes digests of what it knows, the last to arrive compares them, and all ranks
raise the same line, which names the ranks and hosts that differ, and in what. A rank sends a
constant number of messages, before any process group exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from fastrlhf.errors import UserError
from fastrlhf.parallel.rendezvous import Session, numbers, store_errors

Facts = Mapping[str, str]
"""Name -> value; equal on all ranks."""
_SHOWN_FACTS, _SHOWN_CHARACTERS = 6, 90
_VISIBLE_WITHIN_S = 5.0
"""Time for a new file to appear on another node of a network file system."""


def check_facts(session: Session, facts: Facts, node_facts: Facts, timeout_s: float) -> None:
    """Check that `facts` are the same on all ranks, and `node_facts` on all nodes. A collective.

    One rank per node gives `node_facts`, the others pass none. Raises the same UserError on every
    rank; it names the ranks that differ from the majority, their host, and both values.
    """
    if session.world_size == 1:
        return
    name = session.name("facts")
    store = dist.PrefixStore(name, session.store)

    def published(known: Facts) -> str:
        if not known:
            return ""
        text = json.dumps(known, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        # The first rank with these facts stores them: usually there is one set.
        if store.add(f"count/{digest}", 1) == 1:
            store.set(f"facts/{digest}", text)
        return digest

    def judge(values: Sequence[str]) -> str:
        places = [json.loads(value) for value in values]
        hosts = [place["host"] for place in places]
        found = []
        for kind in ("facts", "node_facts"):
            digests = {rank: place[kind] for rank, place in enumerate(places) if place[kind]}
            known = {d: json.loads(store.get(f"facts/{d}")) for d in set(digests.values())}
            found += describe_differences(digests, known, hosts)
        return "; ".join(found)

    with store_errors():
        value = {"facts": published(facts), "node_facts": published(node_facts)}
        value["host"] = socket.gethostname()
        line = session.exchange(name, json.dumps(value), timeout_s, judge)
    if line:
        raise UserError(f"{line}; start all nodes with the same command, files and packages")


def describe_differences(
    digests: Mapping[int, str], known: Mapping[str, Facts], hosts: Sequence[str]
) -> list[str]:
    """Return one text for each group of ranks whose facts differ from those of the majority.

    `digests` has the digest of each rank, `known` the facts of each digest. Of two groups of the
    same size, the one with the lowest rank is right.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, digest in sorted(digests.items()):
        groups[digest].append(rank)
    usual = max(groups, key=lambda digest: (len(groups[digest]), -groups[digest][0]), default="")
    texts = []
    for digest, ranks in groups.items():
        if digest == usual:
            continue
        theirs, ours = known[digest], known[usual]
        keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        parts = [
            f"{key} is {_shown(theirs.get(key))} there, {_shown(ours.get(key))} on"
            f" {_ranks(groups[usual], hosts)}"
            if number == 0
            else f"{key} {_shown(theirs.get(key))} there, {_shown(ours.get(key))}"
            for number, key in enumerate(keys[:_SHOWN_FACTS])
        ]
        more = len(keys) - _SHOWN_FACTS
        parts += [f"and {more} more"] if more > 0 else []
        verb = "differs" if len(ranks) == 1 else "differ"
        texts.append(f"{_ranks(ranks, hosts)} {verb}: {', '.join(parts)}")
    return texts


@dataclass(frozen=True)
class Folder:
    """A folder that rank 0 can write and other ranks read."""

    key: str
    """The setting that names it."""
    path: Path
    per_node: bool = False
    """Whether it may be a folder of each node's own."""


def check_shared(session: Session, folders: Sequence[Folder], timeout_s: float) -> list[Folder]:
    """Check that every rank reads what rank 0 writes into `folders`. A collective.

    Returns the folders that are not shared and need not be. Raises the same UserError on every
    rank if another one is not shared, or rank 0 cannot write one.
    """
    if session.world_size == 1 or not folders:
        return []
    name = session.name("folders")
    with store_errors(), _written(session, name, folders) as nonce:
        if session.rank > 0:
            nonce = session.wait(f"{name}/nonce", timeout_s, lambda: "rank 0 has")
        unseen = [n for n, folder in enumerate(folders) if not _is_visible(folder.path, nonce)]
        value = json.dumps({"host": socket.gethostname(), "unseen": unseen})

        def judge(values: Sequence[str]) -> str:
            return json.dumps(_unshared([json.loads(value) for value in values], folders))

        verdict = json.loads(session.exchange(name, value, timeout_s, judge))
    if verdict["error"]:
        raise UserError(verdict["error"])
    return [folders[number] for number in verdict["own"]]


def _unshared(values: Sequence[dict], folders: Sequence[Folder]) -> dict[str, object]:
    hosts = [value["host"] for value in values]
    own = []
    for number, folder in enumerate(folders):
        ranks = [rank for rank, value in enumerate(values) if number in value["unseen"]]
        if ranks and folder.per_node:
            own.append(number)
        elif ranks:
            error = (
                f"{folder.key} {folder.path} is not shared: {_ranks(ranks, hosts)} cannot read what"
                f" rank 0 on host {hosts[0]} wrote there; put it on a file system that all nodes"
                " mount under this path"
            )
            return {"error": error, "own": []}
    return {"error": "", "own": own}


@contextlib.contextmanager
def _written(session: Session, name: str, folders: Sequence[Folder]) -> Iterator[str]:
    """Write a file with a new name into each folder, as rank 0, and remove it after the block."""
    if session.rank > 0:
        yield ""
        return
    nonce, written = secrets.token_hex(8), []
    try:
        for folder in folders:
            path = _file(folder.path, nonce)
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                path.write_text(nonce)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                line = f"{where}{error.strerror or error}"
                line = f"{folder.key} {folder.path} cannot be written: {line}"
                session.fail(line)
                raise UserError(line) from None
            written.append(path)
        session.store.set(f"{name}/nonce", nonce)
        yield nonce
    finally:
        for path in written:
            path.unlink(missing_ok=True)


def _file(folder: Path, nonce: str) -> Path:
    # A new name: network file systems remember for a while that a name did not exist.
    return folder / f".shared_{nonce}"


def _is_visible(folder: Path, nonce: str) -> bool:
    end = time.monotonic() + _VISIBLE_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if _file(folder, nonce).read_text() == nonce:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks and their hosts as text, such as "ranks 4-7 (host b)"."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    host = f"host{'s' * (len(names) > 1)} {shown}"
    return f"rank{'s' * (len(ranks) > 1)} {numbers(ranks)} ({host})"


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."
