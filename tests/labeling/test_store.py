"""Assignment, locks and migrations of the label database."""

from __future__ import annotations

import sqlite3

import pytest

from fastrlhf.errors import UserError
from fastrlhf.labeling.store import Item, StaleRevision, Store


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = Store(tmp_path / "labels.sqlite3", 60, clock)
    for name in "ab":
        store.add_labeler(name)
    yield store
    store.close()


def item(name, needed=1, **settings):
    return Item(name, {"prompt": name}, needed, **settings)


def test_two_labelers_share_a_queue_by_priority(store):
    store.add_items([item("x"), item("y", priority=2.0)])
    assert store.next_item("a").item_id == "y"
    assert store.next_item("b").item_id == "x"
    assert store.next_item("a").item_id == "y"
    store.submit("a", "y", 0, {"response": "1"})
    assert store.next_item("a") is None


def test_an_expired_lock_goes_to_another_labeler(store, clock):
    store.add_items([item("x")])
    assert store.next_item("a").item_id == "x"
    assert store.next_item("b") is None
    clock.now += 40
    assert store.save_draft("a", "x", 0, {"response": "half"}) == 1
    clock.now += 40  # the draft extended the lock
    assert store.next_item("b") is None
    clock.now += 21
    assert store.next_item("b").item_id == "x"
    with pytest.raises(StaleRevision):
        store.submit("a", "x", 1, {"response": "late"})
    store.submit("b", "x", 0, {"response": "b"})
    assert [row["answer"] for row in store.answers()] == [{"response": "b"}]


def test_two_tabs_do_not_overwrite_each_other(store):
    store.add_items([item("x")])
    store.next_item("a")
    store.save_draft("a", "x", 0, {"response": "first tab"})
    with pytest.raises(StaleRevision):
        store.save_draft("a", "x", 0, {"response": "second tab"})
    assert store.next_item("a").draft == {"response": "first tab"}


def test_skip_gives_the_item_to_others_only(store):
    store.add_items([item("x")])
    store.next_item("a")
    store.skip("a", "x", 0, "not my language")
    assert store.next_item("a") is None
    assert store.next_item("b").item_id == "x"


def test_needed_answers_come_from_different_labelers(store):
    store.add_items([item("x", needed=2)])
    for name in "ab":
        store.next_item(name)
        store.submit(name, "x", 0, {"response": name})
        store.submit(name, "x", 0, {"response": name})  # sent again: counted once
        with pytest.raises(StaleRevision):
            store.submit(name, "x", 0, {"response": "other"})
    assert [row["labeler_id"] for row in store.answers()] == ["a", "b"]
    assert store.progress()["answered"] == store.progress()["needed"] == 2


def test_revoked_link_is_refused_and_frees_its_item(store, tmp_path):
    token = store.add_labeler("c")
    store.add_items([item("x")])
    assert store.labeler(token).id == "c"
    store.next_item("c")
    store.revoke("c")
    assert store.labeler(token) is None
    assert store.next_item("a").item_id == "x"
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("labels.sqlite3*"))
    assert token.encode() not in stored


def test_backup_holds_the_answers_and_is_not_overwritten(store, tmp_path):
    store.add_items([item("x")])
    store.next_item("a")
    store.submit("a", "x", 0, {"response": "1"})
    store.backup(tmp_path / "copy.sqlite3")
    copy = Store(tmp_path / "copy.sqlite3", 60)
    assert [row["answer"] for row in copy.answers()] == [{"response": "1"}]
    copy.close()
    with pytest.raises(UserError, match="exists"):
        store.backup(tmp_path / "copy.sqlite3")


def test_database_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "new.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="schema version 99"):
        Store(path, 60)
