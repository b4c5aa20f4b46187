"""The watch's store: nothing is lost, nothing is counted twice, and one gateway folds at a time."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.quality.cells import Cell, CellKey, EventKind, Outcome, WatchEvent
from gateway.quality.store import BUCKET_S, Store
from gateway.store.database import StoreError

KEY = CellKey(variant="int4", version="0" * 12, role="classifier")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without anything in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'watch.db'}"
    empty: str = request.getfixturevalue("empty_postgresql")
    return empty


Open = Callable[[str], Store]


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    """Opens the database under a holder's name, and closes it in the end."""
    stores: list[Store] = []

    def open_store(holder: str) -> Store:
        stores.append(Store(url, holder))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def outcomes(count: int, at: float = 0.0) -> list[Outcome]:
    return [Outcome(KEY, "shadow", number % 4 == 0, at + number, 0.5) for number in range(count)]


def test_outcomes_come_in_order_and_go_when_they_are_folded(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    given = outcomes(25)
    one.append(given[:10])
    other.append(given[10:])
    rows, cells = one.unfolded()
    assert [outcome for _, outcome in rows] == given
    assert cells == {}
    cell = Cell(key=KEY)
    event = WatchEvent(EventKind.ALARM, KEY, 3.0, "shadow alone", {"shadow": 9.0})
    one.folded([number for number, _ in rows], given, [cell], [event])
    assert other.unfolded() == ([], {KEY: cell})
    assert other.events() == [event]
    buckets = other.buckets(0)
    assert [(bucket.start, bucket.answers, bucket.bad) for bucket in buckets] == [
        (0, 10, 3),
        (BUCKET_S, 10, 2),
        (2 * BUCKET_S, 5, 2),
    ]
    assert sum(bucket.total for bucket in buckets) == pytest.approx(12.5)


def test_the_second_who_folds_the_same_gives_way_and_writes_nothing(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    one.append(outcomes(3))
    rows, _ = one.unfolded()
    ids = [number for number, _ in rows]
    event = WatchEvent(EventKind.DEMOTED, KEY, 1.0, "x")
    one.folded(ids, [], [Cell(key=KEY)], [])
    with pytest.raises(StoreError, match="gives way"):
        other.folded(ids, outcomes(3), [Cell(key=KEY, why="twice")], [event])
    assert one.cells()[KEY].why == ""
    assert one.events() == []
    assert one.buckets(0) == []


def test_who_was_taken_for_dead_gives_way_with_what_it_has_in_memory(opened: Open) -> None:
    """A leader folds its own outcomes without writing them first: no row tells it of another leader."""
    one, other = opened("one"), opened("other")
    leads, beats = one.lead(-1, False)
    assert leads
    one.folded([], outcomes(1), [Cell(key=KEY, why="mine")], [], beats)
    assert other.lead(beats, True)[0], "one has been silent for too long"
    with pytest.raises(StoreError, match="gives way"):
        one.folded([], outcomes(3), [Cell(key=KEY, why="late")], [], beats)
    assert other.cells()[KEY].why == "mine"
    assert sum(bucket.answers for bucket in other.buckets(0)) == 1


def test_a_decision_is_noticed(opened: Open) -> None:
    store = opened("one")
    before = store.decisions()
    cell = Cell(key=KEY)
    store.change([cell], [])
    cell.why = "nothing that matters"
    store.change([cell], [])
    undecided = store.decisions()
    cell.demote("harm", 1.0)
    store.change([cell], [])
    assert store.decisions() > undecided >= before


def test_one_leads_until_it_is_silent_or_resigns(opened: Open) -> None:
    one, other = opened("one"), opened("other")
    leads, beats = one.lead(-1, lost=False)
    assert leads
    assert other.lead(-1, lost=False) == (False, beats)
    leads, more = one.lead(beats, lost=False)
    assert leads
    assert more > beats
    # The other one believes it lost, but it has been heard of since.
    assert other.lead(beats, lost=True) == (False, more)
    leads, _ = other.lead(more, lost=True)
    assert leads
    assert not one.lead(more, lost=False)[0]
    other.resign()
    assert one.lead(more, lost=False)[0]


def test_state_survives_a_restart(opened: Open) -> None:
    store = opened("one")
    cell = Cell(key=KEY)
    cell.demote("harm", 1.0)
    store.change([cell], [])
    store.append(outcomes(2))
    store.close()
    again = opened("two")
    assert again.cells() == {KEY: cell}
    assert len(again.unfolded()[0]) == 2


def test_gateways_that_start_at_once_share_a_new_database(opened: Open) -> None:
    together = threading.Barrier(6)

    def start(holder: str) -> str:
        together.wait(60)
        opened(holder).append(outcomes(1))
        return holder

    holders = [f"gateway {number}" for number in range(together.parties)]
    with ThreadPoolExecutor(together.parties) as pool:
        assert list(pool.map(start, holders)) == holders
    assert len(opened("another").unfolded()[0]) == together.parties


def test_old_sums_and_events_are_forgotten(opened: Open) -> None:
    store = opened("one")
    store.folded([], outcomes(1, at=1000.0) + outcomes(1, at=2e6), [], [])
    store.prune(2e6)
    assert [bucket.start for bucket in store.buckets(0)] == [2_000_000]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("this is no database" * 100), "not a database"),
        (lambda path: path.mkdir(), "unable to open"),
        (
            lambda path: sqlite3.connect(path).executescript(
                "create table watch_facts (name varchar(40) primary key, value text not null);"
                "insert into watch_facts values ('format', '9');"
            ),
            "format 9, not 1",
        ),
    ],
)
def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, make: object, words: str) -> None:
    assert callable(make)
    make(tmp_path / "watch.db")
    with pytest.raises(StoreError, match=rf"watch\.db.*{words}"):
        Store(f"sqlite:///{tmp_path / 'watch.db'}", "one")


def test_a_password_is_not_said() -> None:
    with pytest.raises(StoreError) as caught:
        Store("nosuchdatabase://user:secret@host/name", "one")
    assert "user:…@host/name" in str(caught.value)
    assert "install its driver" in str(caught.value)
