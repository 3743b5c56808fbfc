"""How ranks meet, what they compare, and what a report says about those that are missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from fastrlhf.errors import UserError
from fastrlhf.parallel import rendezvous
from fastrlhf.parallel.agreement import Folder, check_shared, describe_differences
from fastrlhf.parallel.heartbeat import Heartbeat, describe
from fastrlhf.parallel.rendezvous import Session, numbers

HOSTS = ["a", "a", "b", "b", "c"]


def on_all_ranks(world: int, work: Callable[[int], object]) -> list[object]:
    """Run `work` for each rank in a thread; return the results, errors among them."""

    def attempt(rank: int) -> object:
        try:
            return work(rank)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(attempt, range(world)))


def meet(store: dist.Store, timeout_s: float, rank: int, world: int = 3) -> Session:
    return rendezvous._meet(store, rank, world, timeout_s)


def test_each_start_has_a_name_of_its_own() -> None:
    """The second start finds the keys of the first one, as after a restart by torchrun."""
    store = dist.HashStore()
    names = []
    for _ in range(2):
        sessions = on_all_ranks(3, partial(meet, store, 600))
        first, *others = [session for session in sessions if isinstance(session, Session)]
        first.store.set("name", str(len(names)))
        names.append([session.store.get("name") for session in others])
    assert names == [[b"0", b"0"], [b"1", b"1"]]


def test_a_question_without_an_answer_of_an_earlier_start_is_no_arrival() -> None:
    """A rank that died after it asked does not count; nor does one that died before it wrote."""
    store = dist.HashStore()
    rendezvous._ask(rendezvous._in_use(store), 1)
    rendezvous._in_use(store).add("asked", 1)
    texts = on_all_ranks(2, lambda n: meet(store, (5.0, 600.0)[n], 2 * n))
    expected = "rank 1 has not arrived after 5 s; parallel.startup_timeout_s sets this limit"
    assert texts[0] == expected and isinstance(texts[1], Session)


def test_without_rank_0_the_others_say_so() -> None:
    store = dist.HashStore()
    assert set(on_all_ranks(2, lambda n: meet(store, 0.5, n + 1))) == {
        "rank 0 has not arrived after 0.5 s; parallel.startup_timeout_s sets this limit"
    }


def test_a_failure_before_the_start_reaches_all_ranks_and_not_the_next_start() -> None:
    store = dist.HashStore()

    def work(rank: int) -> Session:
        if rank == 2:
            rendezvous._ask(rendezvous._in_use(store), 2, "rank 2 on host b: no such file")
            raise UserError("its own line")
        session = meet(store, 600, rank)
        session.wait("something", 600, lambda: "")
        return session

    expected = "rank 2 on host b: no such file"
    assert on_all_ranks(3, work) == [expected, expected, "its own line"]
    assert all(isinstance(s, Session) for s in on_all_ranks(3, partial(meet, store, 600)))


def test_a_failure_of_rank_0_reaches_ranks_that_come_later_and_not_the_next_start() -> None:
    store = dist.HashStore()
    with pytest.raises(UserError, match="a mistake"):
        rendezvous._Welcome(rendezvous._in_use(store), 3).run(0.1, "rank 0 on host a: a mistake")
    late = on_all_ranks(2, lambda n: meet(store, 600, n + 1))
    assert late == ["rank 0 on host a: a mistake"] * 2
    first = rendezvous._Welcome(rendezvous._in_use(store), 1).run(600)
    assert not Session(rendezvous._in_use(store), 1, 3).failure() and first.rank == 0


def test_the_last_rank_to_arrive_judges_and_all_get_its_verdict() -> None:
    store, calls = dist.HashStore(), []

    def judge(values: Sequence[str]) -> str:
        calls.append(values)
        return "+".join(values)

    verdicts = on_all_ranks(
        4, lambda rank: Session(store, rank, 4).exchange("x", f"v{rank}", 600, judge)
    )
    assert verdicts == ["v0+v1+v2+v3"] * 4 and len(calls) == 1


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ("xxxxx", []),
        (
            "xxxxy",
            ["rank 4 (host c) differs: lr is y there, x on ranks 0-3 (hosts a, b)"],
        ),
        (
            "xyyyy",
            ["rank 0 (host a) differs: lr is x there, y on ranks 1-4 (hosts a, b, c)"],
        ),
        # Of two groups of the same size, the one with the lowest rank is right.
        ("xxyy", ["ranks 2-3 (host b) differ: lr is y there, x on ranks 0-1 (host a)"]),
        (
            "xxxyz",
            [
                "rank 3 (host b) differs: lr is y there, x on ranks 0-2 (hosts a, b)",
                "rank 4 (host c) differs: lr is z there, x on ranks 0-2 (hosts a, b)",
            ],
        ),
    ],
)
def test_the_minority_is_named(facts: str, expected: list[str]) -> None:
    digests = dict(enumerate(facts))
    known = {digest: {"lr": digest, "seed": "1"} for digest in facts}
    assert describe_differences(digests, known, HOSTS) == expected


def test_many_and_long_differences_stay_short() -> None:
    known = {d: {f"key{n}": d * 1000 for n in range(20)} for d in "xy"}
    (text,) = describe_differences({0: "x", 1: "x", 2: "y"}, known, HOSTS)
    assert text.endswith(", and 14 more") and len(text) < 1500
    missing = {"x": {"a": "1"}, "y": {}}
    (text,) = describe_differences({0: "x", 1: "x", 2: "y"}, missing, HOSTS)
    assert "a is not set there, 1 on" in text


def test_a_folder_that_rank_0_cannot_write_is_refused_on_all_ranks(tmp_path: Path) -> None:
    store, file = dist.HashStore(), tmp_path / "file"
    file.write_text("")
    folders = [Folder("output_dir", file / "out")]
    texts = on_all_ranks(2, lambda rank: check_shared(Session(store, rank, 2), folders, 600))
    assert len(set(texts)) == 1
    assert str(texts[0]).startswith(f"output_dir {file / 'out'} cannot be written: ")


def test_a_shared_folder_passes_and_keeps_nothing(tmp_path: Path) -> None:
    store, folders = dist.HashStore(), [Folder("output_dir", tmp_path / "a" / "b")]
    check = partial(check_shared, folders=folders, timeout_s=600)
    assert on_all_ranks(3, lambda rank: check(Session(store, rank, 3))) == [[], [], []]
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]


@pytest.mark.parametrize(
    ("ranks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")]
)
def test_ranks_as_text(ranks: list[int], text: str) -> None:
    assert numbers(ranks) == text


def beat(rank: int, waits: bool, age_s: float = 1.0, **values: object) -> Heartbeat:
    known = {"host": "h", "phase": "step 3", "position": "f.py:1 (g)", "since_s": 0.0, "count": 1}
    known |= {"waits": waits, "time": time.time() - age_s, **values}
    return Heartbeat(rank=rank, **known)  # type: ignore[arg-type]


def test_a_report_names_the_cause_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    session = Session(dist.HashStore(), 0, 4)
    beats = {0: beat(0, True), 1: beat(1, True, 40.0), 2: beat(2, False, since_s=12.0)}
    assert describe(beats, [1, 3], session, "rank 3 on host h: no space") == (
        "rank 3 on host h: no space; no heartbeat: rank 1 on host h, last seen 40 s ago in phase"
        " 'step 3' waiting in f.py:1 (g); rank 3 has never been seen"
    )
    busy = "rank 2 on host h, last seen 1 s ago in phase 'step 3' at f.py:1 (g) for 12 s"
    assert describe(beats, [], session, "") == f"not arrived: {busy}"
    waiting = {0: beat(0, True), 1: beat(1, True, position="barrier (b.py:2)")}
    assert describe(waiting, [], session, "") == (
        "all ranks wait: rank 0 in f.py:1 (g) in phase 'step 3'; rank 1 in barrier (b.py:2) in"
        " phase 'step 3'"
    )
