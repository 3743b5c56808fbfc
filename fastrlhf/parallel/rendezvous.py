"""The store through which ranks meet before they have process groups.

torchrun's store outlives the processes: with --max-restarts, or when one node's agent is started
again, the next processes find the keys of those before them. The agents' restart counts may differ,
so rank 0 draws a name for each start, and every other rank asks for it (`join`). Each rank sends a
constant number of messages; rank 0 one per rank.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from fastrlhf.errors import UserError

_NOTE_AFTER_S = 30.0
"""Seconds between notes about ranks that have not arrived."""
_FAREWELL_S = 30.0
"""Seconds for which a rank that has failed tries to report it, and rank 0 waits for the others."""
FAILED = "failed"
"""Key of the first failure, as one line; ranks that wait read it."""


@dataclass(frozen=True)
class Session:
    """One start of all ranks: a store that only they use."""

    store: dist.Store
    rank: int
    world_size: int
    _names: Iterator[int] = field(default_factory=itertools.count)

    def name(self, kind: str) -> str:
        """Return a new name for an exchange; the same on ranks that ask in the same order."""
        return f"{kind}.{next(self._names)}"

    def fail(self, line: str) -> None:
        """Report a failure of this rank to ranks that wait in the store; the first one counts."""
        self.store.compare_set(FAILED, "", line)

    def failure(self) -> str:
        """Return the first failure that a rank has reported, "" if there is none."""
        return self.store.get(FAILED).decode() if self.store.check([FAILED]) else ""

    def wait(self, key: str, timeout_s: float, missing: Callable[[], str]) -> str:
        """Return the value of `key` once it is set.

        Raises UserError if another rank reports a failure, the store is gone, or `timeout_s`
        seconds have passed; `missing` then says which ranks have not arrived.
        """
        end = time.monotonic() + timeout_s
        note = time.monotonic() + _NOTE_AFTER_S
        for _ in _polls():
            if self.store.check([key]):
                break
            if failure := self.failure():
                raise UserError(failure)
            if time.monotonic() > end:
                line = f"{missing()} not arrived after {timeout_s:g} s"
                self.fail(f"{line}; parallel.startup_timeout_s sets this limit")
                raise UserError(self.failure())
            if self.rank == 0 and time.monotonic() > note:
                note += _NOTE_AFTER_S
                print(f"waiting: {missing()} not arrived yet", file=sys.stderr, flush=True)
        return self.store.get(key).decode()

    def exchange(
        self, name: str, value: str, timeout_s: float, judge: Callable[[Sequence[str]], str]
    ) -> str:
        """Return what `judge` makes of the values of all ranks, the same on every rank.

        The last rank to arrive judges. `name` is unique in the session. Raises UserError as `wait`.
        """
        store, ranks = dist.PrefixStore(name, self.store), range(self.world_size)
        store.set(f"value/{self.rank}", value)
        if store.add("arrived", 1) == self.world_size:
            values = store.multi_get([f"value/{rank}" for rank in ranks])
            store.set("verdict", judge([value.decode() for value in values]))

        def missing() -> str:
            return _have([rank for rank in ranks if not store.check([f"value/{rank}"])])

        return self.wait(f"{name}/verdict", timeout_s, missing)


_session: Session | None = None
_runs = itertools.count()


def begin_run(timeout_s: float) -> Session:
    """Join the ranks for a new run of this process; failures of earlier runs do not count in it."""
    global _session
    session = join(timeout_s)
    if session.world_size == 1:
        return session
    store = dist.PrefixStore(f"run{next(_runs)}", session.store)
    _session = Session(store, session.rank, session.world_size)
    return _session


def join(timeout_s: float) -> Session:
    """Meet all ranks that torchrun has started with this one; a later call returns the same.

    A process without torchrun is alone. Raises UserError if ranks have not arrived after
    `timeout_s` seconds, or one has reported a failure.
    """
    global _session
    if "RANK" not in os.environ:
        return Session(dist.HashStore(), 0, 1)
    if _session is None:
        with store_errors():
            _session = _meet(*_torchrun_store(timeout_s), timeout_s)
    return _session


def joined() -> Session | None:
    """Return the session that this process has joined, if any."""
    return _session


def leave() -> None:
    """Forget the session, so that `join` meets the ranks again."""
    global _session
    _session = None


def publish_failure(line: str) -> None:
    """Report an error of this rank to ranks that wait for it, also if it has not joined them.

    Does nothing if there is no other rank, or if they cannot be reached.
    """
    line = f"rank {os.environ.get('RANK')} on host {socket.gethostname()}: {line}"
    with contextlib.suppress(RuntimeError, ValueError):  # torch's errors of a store
        if _session is not None:
            _session.fail(line)
        elif (
            int(os.environ.get("WORLD_SIZE", "1")) > 1
            and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        ):
            store, rank, world_size = _torchrun_store(_FAREWELL_S)
            if rank == 0:
                with contextlib.suppress(UserError):
                    _Welcome(_in_use(store), world_size).run(_FAREWELL_S, line)
            else:
                _ask(_in_use(store), rank, line)


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Raise UserError for errors of a store whose server has ended."""
    try:
        yield
    except dist.DistNetworkError:
        raise UserError(store_is_gone()) from None


def store_is_gone() -> str:
    """Describe the loss of torchrun's store."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"the store of torchrun at {place} cannot be reached: the torchrun of the first node has"
        " ended or its host is down; read the output of that node"
    )


def _polls(first_s: float = 0.005, longest_s: float = 0.5) -> Iterator[None]:
    """Yield at once, then after longer and longer pauses.

    Waits of the store itself ignore signals, block its other users, and print two warnings whenever
    their time is over.
    """
    pause = first_s
    while True:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, longest_s)


def numbers(ranks: Sequence[int]) -> str:
    """Return sorted ranks as text, such as "0-3, 6"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _have(ranks: Sequence[int]) -> str:
    """Return "ranks 4-7 (node 1) have" for the beginning of a sentence."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    nodes = sorted({rank // per_node for rank in ranks}) if per_node else []
    where = f" (node{'s' * (len(nodes) > 1)} {numbers(nodes)})" if nodes else ""
    noun, verb = ("rank", "has") if len(ranks) == 1 else ("ranks", "have")
    return f"{noun} {numbers(ranks)}{where} {verb}"


def _torchrun_store(timeout_s: float) -> tuple[dist.Store, int, int]:
    """Return torchrun's store, this rank and the world size."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return next(dist.rendezvous("env://", timeout=timeout))


def _in_use(store: dist.Store) -> dist.Store:
    return dist.PrefixStore("fastrlhf", store)


def _meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Session:
    """Agree on the name of this start, which rank 0 draws."""
    store = _in_use(store)
    if rank == 0:
        return _Welcome(store, world_size).run(timeout_s)
    answer = f"welcome/{_ask(store, rank)}"
    name = Session(store, rank, world_size).wait(answer, timeout_s, lambda: _have([0]))
    session = Session(dist.PrefixStore(name, store), rank, world_size)
    session.store.set(f"joined/{rank}", "")
    if session.store.add("joined", 1) == world_size - 1:
        session.store.set("complete", "")
    return session


def _ask(store: dist.Store, rank: int, failure: str = "") -> str:
    """Ask rank 0 for the name of this start, or report a failure to it; return the question."""
    token = secrets.token_hex(8)
    number = store.add("asked", 1)
    store.set(f"ask/{number}", json.dumps({"token": token, "rank": rank, "failure": failure}))
    return token


class _Welcome:
    """Rank 0's side of the start: it draws the name and answers every rank that asks.

    Questions of earlier starts are answered too; nobody reads these answers.
    """

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self.store = store
        self.name = secrets.token_hex(8)
        self.session = Session(dist.PrefixStore(self.name, store), 0, world_size)
        self.failure = ""
        self._asked = 0
        self._open: set[int] = set()
        self._failed: set[int] = set()

    def run(self, timeout_s: float, failure: str = "") -> Session:
        """Answer until every rank has joined, or report a `failure` of rank 0 to those that ask.

        Raises UserError with the first failure, or if ranks have not arrived after `timeout_s` s.
        """
        end, note = time.monotonic() + timeout_s, time.monotonic() + _NOTE_AFTER_S
        own = Session(self.store, 0, self.session.world_size)
        if failure:
            own.fail(failure)  # for ranks that ask after this one has ended
        else:
            self.store.delete_key(FAILED)  # of an earlier start
        self._fail(failure)
        for _ in _polls(longest_s=0.1):
            if self.session.world_size == 1 or self.session.store.check(["complete"]):
                break
            self._answer()
            now = time.monotonic()
            if self.failure and (
                not self._missing() or now > min(end, self._failed_at + _FAREWELL_S)
            ):
                break
            if now > end:
                self._fail(
                    f"{_have(self._missing())} not arrived after {timeout_s:g} s;"
                    " parallel.startup_timeout_s sets this limit"
                )
                break
            if now > note:
                note += _NOTE_AFTER_S
                line = f"waiting: {_have(self._missing())} not arrived yet"
                print(line, file=sys.stderr, flush=True)
        if self.failure:
            raise UserError(self.failure)
        return self.session

    def _answer(self) -> None:
        latest = self.store.add("asked", 0)
        self._open |= set(range(self._asked + 1, latest + 1))
        self._asked = latest
        for number in sorted(self._open):
            if not self.store.check([key := f"ask/{number}"]):
                continue  # a rank is about to write it, or has died before
            self._open.discard(number)
            question = json.loads(self.store.get(key))
            if question["failure"]:
                self._failed.add(question["rank"])
                self._fail(question["failure"])
                # The next start must not read it.
                self.store.set(key, json.dumps({**question, "failure": ""}))
            self.store.set(f"welcome/{question['token']}", self.name)

    def _fail(self, line: str) -> None:
        if line and not self.failure:
            self.failure, self._failed_at = line, time.monotonic()
            self.session.fail(line)

    def _missing(self) -> list[int]:
        return [
            rank
            for rank in range(1, self.session.world_size)
            if rank not in self._failed and not self.session.store.check([f"joined/{rank}"])
        ]
