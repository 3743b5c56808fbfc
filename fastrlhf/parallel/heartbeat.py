"""Heartbeats of ranks in the store: who waits where, who is busy, who has gone silent.

Each rank writes one key every few seconds. They are read only for a report: by the rank whose wait
has failed first, which stores the report for the others.

Ages are differences of two hosts' clocks: nodes whose clocks differ shift them by as much.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from fastrlhf.parallel.rendezvous import Session, numbers, store_is_gone

_SILENT_AFTER = 2.5
"""Heartbeats that a rank may miss before it counts as silent."""
_REPORT_WITHIN_S = 8.0
_SHOWN = 8
"""Ranks that a report describes one by one."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank was doing when it last reported."""

    rank: int
    host: str
    phase: str
    position: str
    """file:line and function, or the collective."""
    waits: bool
    """Whether it waits for other ranks or for its device."""
    since_s: float
    """Seconds at this position."""
    count: int
    time: float
    """Seconds since 1970 by the clock of the rank's host."""

    def describe(self, now: float) -> str:
        """Return where the rank was, and how long ago."""
        verb = "waiting in" if self.waits else "at"
        stayed = f" for {self.since_s:.0f} s" if self.since_s >= 1 else ""
        return (
            f"rank {self.rank} on host {self.host}, last seen {max(0.0, now - self.time):.0f} s ago"
            f" in phase '{self.phase}' {verb} {self.position}{stayed}"
        )


class Heartbeats:
    """The heartbeats of one session; `interval_s` is the same on all ranks.

    Has a connection of its own: a wait in another thread does not delay a heartbeat.
    """

    def __init__(self, session: Session, interval_s: float) -> None:
        self.interval_s = interval_s
        store = session.store.clone()  # type: ignore[attr-defined]
        self.session = Session(store, session.rank, session.world_size)
        self._host = socket.gethostname()
        self._count = 0

    def beat(self, phase: str, position: str, waits: bool, since_s: float) -> None:
        """Write this rank's heartbeat."""
        self._count += 1
        rank, now = self.session.rank, time.time()
        beat = Heartbeat(rank, self._host, phase, position, waits, since_s, self._count, now)
        self.session.store.set(f"heartbeat/{rank}", json.dumps(asdict(beat)))

    def read(self) -> dict[int, Heartbeat]:
        """Return the last heartbeat of each rank that has written one."""
        store, ranks = self.session.store, range(self.session.world_size)
        keys = [f"heartbeat/{rank}" for rank in ranks]
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        values = store.multi_get(keys) if keys else []
        beats = [Heartbeat(**json.loads(value)) for value in values]
        return {beat.rank: beat for beat in beats}

    def report(self) -> str:
        """Return which ranks have not arrived, the same on all ranks that ask; "" if unknown.

        The first rank that asks writes it; this takes a few heartbeats if a rank has just died.
        """
        with contextlib.suppress(RuntimeError):  # torch's errors of a store
            store, own = self.session.store, str(self.session.rank)
            if store.compare_set("reporter", "", own).decode() == own:
                store.set("report", self._observe())
            end = time.monotonic() + _REPORT_WITHIN_S
            while not store.check(["report"]):  # a blocking wait would delay heartbeats
                if time.monotonic() > end:
                    return ""
                time.sleep(0.1)
            return store.get("report").decode()
        return store_is_gone()

    def _observe(self) -> str:
        """Watch the heartbeats until a rank is known to be silent or to have failed."""
        before, patience = self.read(), self.interval_s * _SILENT_AFTER
        end = time.monotonic() + patience
        if not _silent(before, before, self.session, patience):
            while time.monotonic() < end and not self.session.failure():
                time.sleep(0.1)
        after = self.read()
        changed = time.monotonic() >= end
        silent = _silent(before, after, self.session, patience, unchanged=changed)
        return describe(after, silent, self.session, self.session.failure())


def _silent(
    before: Mapping[int, Heartbeat],
    after: Mapping[int, Heartbeat],
    session: Session,
    patience: float,
    unchanged: bool = False,
) -> list[int]:
    """Return the ranks without a heartbeat for `patience` seconds, by their age or by watching."""
    now = time.time()

    def is_silent(rank: int) -> bool:
        if rank not in after or now - after[rank].time > patience:
            return True
        return unchanged and rank in before and before[rank].count == after[rank].count

    return [r for r in range(session.world_size) if r != session.rank and is_silent(r)]


def describe(
    beats: Mapping[int, Heartbeat], silent: Sequence[int], session: Session, failure: str
) -> str:
    """Return one line about the ranks that keep the others waiting.

    These are the ranks that have failed or are silent; without one, those that do not wait; without
    one, where each group of ranks waits.
    """
    now = time.time()
    parts = [failure] if failure else []
    if silent:
        parts.append("no heartbeat: " + _list(silent, beats, now))
    busy = [rank for rank, beat in sorted(beats.items()) if not beat.waits and rank not in silent]
    busy = [rank for rank in busy if rank != session.rank]
    if busy and not failure:
        parts.append("not arrived: " + _list(busy, beats, now))
    if not parts:
        places: dict[str, list[int]] = {}
        for rank, beat in sorted(beats.items()):
            places.setdefault(f"{beat.position} in phase '{beat.phase}'", []).append(rank)
        waits = [f"rank {numbers(ranks)} in {place}" for place, ranks in places.items()]
        parts.append("all ranks wait: " + "; ".join(waits[:_SHOWN]))
    return "; ".join(parts)


def _list(ranks: Sequence[int], beats: Mapping[int, Heartbeat], now: float) -> str:
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    texts = []
    for rank in ranks[:_SHOWN]:
        node = f" (node {rank // per_node})" if per_node else ""
        never = f"rank {rank}{node} has never been seen"
        texts.append(beats[rank].describe(now) if rank in beats else never)
    more = len(ranks) - _SHOWN
    return "; ".join(texts) + (f"; and {more} more: {numbers(ranks[_SHOWN:])}" if more > 0 else "")
