"""Items, labelers and answers in SQLite: each change is one transaction.

Assignment: an item has `needed` places. A lock takes one, an answer keeps it, a skip or an expired
lock frees it. A labeler sees an item once. All times are seconds since the epoch.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.labeling.schema import connect


class StaleRevision(Exception):
    """The item was changed in another tab, has expired, or was answered before."""


@dataclass(frozen=True)
class Item:
    """One item to add: its row as imported, and how it is assigned."""

    id: str
    row: dict[str, Any]
    needed: int
    priority: float = 0.0
    gold: Any = None


@dataclass(frozen=True)
class Assignment:
    """An item that is locked for a labeler, with the last draft."""

    item_id: str
    row: dict[str, Any]
    revision: int
    draft: dict[str, Any] | None


@dataclass(frozen=True)
class Labeler:
    """Who a personal link belongs to."""

    id: str
    admin: bool


class Store:
    """The label database; safe to call from several threads and several processes."""

    def __init__(
        self, path: Path, lock_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._connection = connect(path)
        self._lock = threading.RLock()
        self._lock_seconds, self._clock = lock_seconds, clock

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def backup(self, target: Path) -> None:
        """Write a consistent copy of the database to `target`, also while labelers work."""
        if target.exists():
            raise UserError(f"{target}: exists; give a new file for the backup")
        copy = sqlite3.connect(target)
        try:
            with self._lock:
                self._connection.backup(copy)
        finally:
            copy.close()

    def add_items(self, items: Iterable[Item]) -> int:
        """Add the items that are not in the database yet; return how many were added."""
        with self._transaction() as db:
            before = db.total_changes
            (position,) = db.execute("SELECT COALESCE(MAX(position), -1) + 1 FROM items").fetchone()
            db.executemany(
                "INSERT OR IGNORE INTO items (id, position, priority, needed, gold, row) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (
                        item.id,
                        position + number,
                        item.priority,
                        item.needed,
                        None if item.gold is None else json.dumps(item.gold),
                        json.dumps(item.row, ensure_ascii=False),
                    )
                    for number, item in enumerate(items)
                ),
            )
            return db.total_changes - before

    def add_labeler(self, labeler_id: str, admin: bool = False) -> str:
        """Create or replace the personal link of a labeler, and return its token.

        Only the token's hash is stored, so that a link that was lost can only be replaced.
        """
        token = secrets.token_urlsafe(32)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO labelers (id, token_hash, admin) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET token_hash = excluded.token_hash, "
                "admin = excluded.admin, revoked = 0",
                (labeler_id, hash_token(token), admin),
            )
        return token

    def revoke(self, labeler_id: str) -> None:
        """Make the labeler's link invalid and free the items that are locked for it."""
        with self._transaction() as db:
            if not db.execute(
                "UPDATE labelers SET revoked = 1 WHERE id = ?", (labeler_id,)
            ).rowcount:
                raise UserError(f"labeler {labeler_id!r} does not exist")
            self._expire(db, "labeler_id = ?", labeler_id)

    def labeler(self, token: str) -> Labeler | None:
        """Return the labeler whose link has this token, None if unknown or revoked."""
        with self._lock:
            row = self._connection.execute(
                "SELECT id, admin FROM labelers WHERE token_hash = ? AND revoked = 0",
                (hash_token(token),),
            ).fetchone()
        return None if row is None else Labeler(row["id"], bool(row["admin"]))

    def next_item(self, labeler_id: str) -> Assignment | None:
        """Return the labeler's locked item, or lock the next one; None if none is left."""
        now = self._clock()
        with self._transaction() as db:
            self._expire(db, "expires <= ?", now)
            held = db.execute(
                "SELECT item_id FROM work WHERE labeler_id = ? AND state = 'locked'", (labeler_id,)
            ).fetchone()
            item_id = held["item_id"] if held else self._lock_next(db, labeler_id, now)
            if item_id is None:
                return None
            row = db.execute(
                "SELECT items.row, work.revision, work.draft FROM work "
                "JOIN items ON items.id = work.item_id WHERE item_id = ? AND labeler_id = ?",
                (item_id, labeler_id),
            ).fetchone()
        draft = None if row["draft"] is None else json.loads(row["draft"])
        return Assignment(item_id, json.loads(row["row"]), row["revision"], draft)

    def _lock_next(self, db: sqlite3.Connection, labeler_id: str, now: float) -> str | None:
        # An item whose lock expired may return to the same labeler, with its draft.
        row = db.execute(
            "SELECT id FROM items WHERE taken < needed AND NOT EXISTS (SELECT 1 FROM work "
            "WHERE item_id = items.id AND labeler_id = ? AND state != 'expired') "
            "ORDER BY priority DESC, position LIMIT 1",
            (labeler_id,),
        ).fetchone()
        if row is None:
            return None
        db.execute("UPDATE items SET taken = taken + 1 WHERE id = ?", (row["id"],))
        db.execute(
            "INSERT INTO work (item_id, labeler_id, state, started, expires) "
            "VALUES (?, ?, 'locked', ?, ?) ON CONFLICT (item_id, labeler_id) DO UPDATE SET "
            "state = 'locked', started = excluded.started, expires = excluded.expires, "
            "revision = revision + 1",
            (row["id"], labeler_id, now, now + self._lock_seconds),
        )
        return str(row["id"])

    def _expire(self, db: sqlite3.Connection, condition: str, value: object) -> None:
        where = f"state = 'locked' AND {condition}"
        for row in db.execute(f"SELECT item_id FROM work WHERE {where}", (value,)).fetchall():
            db.execute("UPDATE items SET taken = taken - 1 WHERE id = ?", (row["item_id"],))
        db.execute(f"UPDATE work SET state = 'expired' WHERE {where}", (value,))

    def save_draft(self, labeler_id: str, item_id: str, revision: int, draft: Any) -> int:
        """Save a draft, extend the lock, and return the new revision.

        Raises StaleRevision if `revision` is not the one that was handed out last.
        """
        now = self._clock()
        with self._transaction() as db:
            self._change(
                db,
                "draft = ?, expires = ?, revision = revision + 1",
                (json.dumps(draft), now + self._lock_seconds),
                (item_id, labeler_id, revision, now),
            )
        return revision + 1

    def submit(self, labeler_id: str, item_id: str, revision: int, answer: Any) -> None:
        """Save the answer to an item. Repeating the same answer changes nothing.

        Raises StaleRevision if the item is not locked for the labeler at `revision`.
        """
        now, text = self._clock(), json.dumps(answer, ensure_ascii=False)
        with self._transaction() as db:
            done = db.execute(
                "SELECT 1 FROM work WHERE item_id = ? AND labeler_id = ? AND state = 'answered' "
                "AND answer = ?",
                (item_id, labeler_id, text),
            ).fetchone()
            if done:  # a client that saw no reply, because the server was killed, sends it again
                return
            self._change(
                db,
                "state = 'answered', answer = ?, finished = ?, seconds = ? - started",
                (text, now, now),
                (item_id, labeler_id, revision, now),
            )

    def skip(self, labeler_id: str, item_id: str, revision: int, reason: str) -> None:
        """Give an item back with a reason; the labeler does not see it again."""
        now = self._clock()
        with self._transaction() as db:
            self._change(
                db,
                "state = 'skipped', reason = ?, finished = ?, seconds = ? - started",
                (reason, now, now),
                (item_id, labeler_id, revision, now),
            )
            db.execute("UPDATE items SET taken = taken - 1 WHERE id = ?", (item_id,))

    @staticmethod
    def _change(
        db: sqlite3.Connection, update: str, values: tuple[Any, ...], key: tuple[Any, ...]
    ) -> None:
        changed = db.execute(
            f"UPDATE work SET {update} WHERE item_id = ? AND labeler_id = ? AND revision = ? "
            "AND state = 'locked' AND expires > ?",
            (*values, *key),
        )
        if not changed.rowcount:
            raise StaleRevision("the item was changed elsewhere or its lock has expired")

    def row(self, item_id: str) -> dict[str, Any] | None:
        """Return the imported row of an item, None if there is none of this name."""
        with self._lock:
            found = self._connection.execute(
                "SELECT row FROM items WHERE id = ?", (item_id,)
            ).fetchone()
        return None if found is None else dict(json.loads(found["row"]))

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield each answer with its item, by position of the item and name of the labeler."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT item_id, labeler_id, answer, seconds, finished, items.row, items.gold "
                "FROM work JOIN items ON items.id = item_id WHERE state = 'answered' "
                "ORDER BY position, labeler_id"
            ).fetchall()
        for row in rows:
            found = dict(row)
            for name in ("answer", "row", "gold"):
                found[name] = None if found[name] is None else json.loads(found[name])
            yield found

    def progress(self) -> dict[str, Any]:
        """Return places that are needed and answered, and figures of each labeler."""
        with self._lock:
            needed = self._connection.execute("SELECT SUM(needed) FROM items").fetchone()[0] or 0
            rows = self._connection.execute(
                "SELECT labeler_id, SUM(state = 'answered') AS answered, "
                "SUM(state = 'skipped') AS skipped, "
                "AVG(CASE WHEN state = 'answered' THEN seconds END) AS mean_seconds "
                "FROM work GROUP BY labeler_id ORDER BY labeler_id"
            ).fetchall()
        labelers = [dict(row) for row in rows]
        answered = sum(row["answered"] for row in labelers)
        return {"needed": needed, "answered": answered, "labelers": labelers}


def hash_token(token: str) -> str:
    """Return the SHA-256 of a link's token; 256 random bits need no salt."""
    return hashlib.sha256(token.encode()).hexdigest()
