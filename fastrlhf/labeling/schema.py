"""The tables of the label database and the migrations between their versions."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fastrlhf.errors import UserError

MIGRATIONS = (
    """
    CREATE TABLE items (
        id TEXT PRIMARY KEY,
        position INTEGER NOT NULL,
        priority REAL NOT NULL DEFAULT 0,
        needed INTEGER NOT NULL,
        taken INTEGER NOT NULL DEFAULT 0,  -- answers + locks, so that the queue is one index scan
        gold TEXT,                         -- JSON of the expected answer
        row TEXT NOT NULL                  -- JSON of the imported row
    );
    CREATE INDEX queue ON items (priority DESC, position) WHERE taken < needed;
    CREATE TABLE labelers (
        id TEXT PRIMARY KEY,
        token_hash TEXT NOT NULL UNIQUE,
        admin INTEGER NOT NULL DEFAULT 0,
        revoked INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE work (
        item_id TEXT NOT NULL REFERENCES items,
        labeler_id TEXT NOT NULL REFERENCES labelers,
        state TEXT NOT NULL CHECK (state IN ('locked', 'expired', 'answered', 'skipped')),
        started REAL NOT NULL,
        expires REAL NOT NULL,
        finished REAL,
        revision INTEGER NOT NULL DEFAULT 0,
        draft TEXT,
        answer TEXT,
        reason TEXT,
        seconds REAL,
        PRIMARY KEY (item_id, labeler_id)
    );
    CREATE INDEX locks ON work (expires) WHERE state = 'locked';
    CREATE INDEX own ON work (labeler_id, state);
    """,
)
"""Migration number n brings version n to version n + 1. Published ones never change."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the database at `path`, create or migrate its tables, and return the connection.

    Raises UserError if a newer version of fastrlhf wrote it, or if it is no database.
    """
    connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # FULL syncs the log at each commit: an answer that was confirmed survives a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise UserError(f"{path}: cannot be opened as a label database: {error}") from None
    except UserError:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise UserError(
            f"{path}: has schema version {version}, this fastrlhf knows up to {len(MIGRATIONS)}; "
            "update fastrlhf"
        )
    if version == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have migrated it while this one waited for the lock.
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for number in range(version, len(MIGRATIONS)):
            for statement in _statements(MIGRATIONS[number]):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    # executescript() commits first, and would leave a half-made schema after a crash.
    statements, current = [], ""
    for line in script.splitlines():
        current += line + "\n"
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements
