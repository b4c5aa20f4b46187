"""The store of responses: each owner's own, bounded, in the order of use, in every kind of database."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import inspect

from gateway.config import ResponsesSettings
from gateway.responses.store import RESPONSES, SILENT_S, ResponseStore, Stored
from gateway.store.database import StoreError


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without anything in it."""
    if request.param == "memory":
        return "sqlite://"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'responses.db'}"
    empty: str = request.getfixturevalue("empty_postgresql")
    return empty


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Open = Callable[..., ResponseStore]


@pytest.fixture
def opened(url: str, clock: Clock) -> Iterator[Open]:
    stores: list[ResponseStore] = []

    def open_store(**limits: Any) -> ResponseStore:
        stores.append(ResponseStore(url, ResponsesSettings(**limits), clock))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def turn(name: str, owner: str = "a", previous: Stored | None = None, **changes: Any) -> Stored:
    fields: dict[str, Any] = {
        "owner": owner,
        "id": name,
        "status": "completed",
        "input": b'[{"role":"user","content":"%b \\u0000 \xc3\xa9"}]' % name.encode(),
        "response": b'{"id":"%b"}' % name.encode(),
        "previous": previous.id if previous else None,
        "depth": previous.depth + 1 if previous else 1,
    }
    return Stored(**fields | changes)


def test_what_is_put_is_found_again_by_its_owner_alone(opened: Open) -> None:
    store = opened()
    kept = turn("resp_1")
    store.put(kept)
    assert store.get("a", "resp_1") == kept
    assert store.get("b", "resp_1") is None
    assert store.chain("b", "resp_1") == []
    assert not store.delete("b", "resp_1")
    store.put(turn("resp_1", owner="b", response=b"{}"))
    assert store.get("a", "resp_1") == kept
    assert store.delete("a", "resp_1")
    assert not store.delete("a", "resp_1")
    assert store.get("a", "resp_1") is None
    assert store.get("b", "resp_1") is not None


def test_the_same_id_again_takes_the_place_of_the_former(opened: Open) -> None:
    store = opened()
    store.put(turn("x"))
    store.put(turn("x", response=b'{"second":1}'))
    found = store.get("a", "x")
    assert found
    assert found.response == b'{"second":1}'
    assert store.usage() == (1, found.size)


def test_a_chain_is_read_from_its_first_turn_and_may_fork(opened: Open) -> None:
    store = opened()
    first = turn("1")
    second = turn("2", previous=first)
    left, right = turn("3", previous=second), turn("4", previous=second)
    for stored in (first, second, left, right):
        store.put(stored)
    assert store.chain("a", "3") == [first, second, left]
    assert store.chain("a", "4") == [first, second, right]
    assert store.chain("a", "1") == [first]


def test_a_chain_that_lost_a_turn_shows_it(opened: Open) -> None:
    store = opened()
    first = turn("1")
    second = turn("2", previous=first)
    third = turn("3", previous=second)
    for stored in (first, second, third):
        store.put(stored)
    store.delete("a", "2")
    assert store.chain("a", "3") == [third]


def test_ids_that_a_client_made_into_a_ring_come_to_an_end(opened: Open) -> None:
    store = opened()
    first = turn("1")
    second = turn("2", previous=first)
    store.put(second)
    store.put(turn("1", previous=second))
    assert [stored.id for stored in store.chain("a", "2")] == ["2"]
    assert [stored.id for stored in store.chain("a", "1")] == ["2", "1"]


def test_what_nobody_has_used_for_long_is_gone(opened: Open, clock: Clock) -> None:
    store = opened(keep_s=100)
    first = turn("1")
    second = turn("2", previous=first)
    store.put(first)
    store.put(second)
    store.put(turn("other"))
    clock.now += 90
    assert len(store.chain("a", "2")) == 2
    clock.now += 90
    assert store.get("a", "other") is None
    assert not store.delete("a", "other")
    assert len(store.chain("a", "2")) == 2, "going on from a response counts for all that it stands on"
    clock.now += 101
    assert store.chain("a", "2") == []
    store.prune()
    assert store.usage() == (0, 0)


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_responses": 3}, {"a": 3, "b": 1}),
        ({"max_tenant_bytes": 1500}, {"a": 1, "b": 1}),
        ({"max_bytes": 2500}, {"a": 1, "b": 1}),
    ],
)
def test_the_oldest_leave(opened: Open, clock: Clock, limits: dict[str, int], left: dict[str, int]) -> None:
    store = opened(**limits)
    for number in range(20):
        clock.now += 1
        store.put(turn(f"a{number}", response=b"x" * 1000))
    store.put(turn("b0", owner="b", response=b"x" * 1000))
    store.prune()
    assert {owner: store.usage([owner])[0] for owner in "ab"} == left
    assert store.get("a", "a19") is not None
    assert store.get("a", "a0") is None


def test_limits_hold_without_anybody_asking(opened: Open, clock: Clock) -> None:
    store = opened(max_responses=10, max_tenant_bytes=20_000)
    most = 0
    for number in range(100):
        clock.now += 0.001
        store.put(turn(f"a{number}", response=b"x" * 1000))
        most = max(most, store.usage()[0])
    assert most <= 12


def test_a_response_under_way_is_finished_once(opened: Open, clock: Clock) -> None:
    store = opened(max_responses=1)
    store.put(turn("1", status="queued", response=b"", background=True, runner="me", beat=clock.now))
    assert store.beat("me", [("a", "1")]) == set()
    found = store.get("a", "1")
    assert found
    assert found.status == "in_progress"
    assert store.finish("a", "1", "cancelled", b"{}")
    assert not store.finish("a", "1", "completed", b'{"late":1}')
    assert store.beat("me", [("a", "1")]) == {("a", "1")}
    found = store.get("a", "1")
    assert found
    assert (found.status, found.response) == ("cancelled", b"{}")
    assert store.usage() == (1, found.size)


def test_only_what_somebody_works_on_stays_beyond_a_limit(opened: Open, clock: Clock) -> None:
    """An engine may call an answer ``in_progress``, and a process may have gone."""
    store = opened(max_tenant_bytes=1024)
    large: dict[str, Any] = {"response": b"x" * 2000, "status": "in_progress"}
    store.put(turn("an engine's", **large))
    store.put(turn("nobody's", **large, background=True, runner="gone", beat=clock.now - SILENT_S - 1))
    store.put(turn("mine", **large, background=True, runner="me", beat=clock.now))
    store.prune()
    assert store.usage()[0] == 1
    assert store.get("a", "mine") is not None
    clock.now += SILENT_S + 1
    store.prune()
    assert store.usage()[0] == 0


def test_a_chain_can_be_read_in_parts(opened: Open, clock: Clock) -> None:
    store = opened(keep_s=100)
    first = turn("1")
    second = turn("2", previous=first, response=b"{}")
    third = turn("3", previous=second)
    for stored in (first, second, third, turn("2", owner="b")):
        store.put(stored)
    assert store.links("a", "3") == [(stored.id, stored.size) for stored in (first, second, third)]
    assert store.links("b", "3") == []
    assert store.some("a", ["3", "1", "gone"]) == [first, third]
    clock.now += 90
    store.links("a", "3")
    clock.now += 90
    assert store.chain("a", "3") == [first, second, third], "they have been used"


def test_a_response_whose_process_has_gone_is_known_by_its_silence(opened: Open, clock: Clock) -> None:
    store = opened()
    store.put(turn("1", status="queued", background=True, runner="me", beat=clock.now))
    found = store.get("a", "1")
    assert found
    assert not store.silent(found)
    clock.now += SILENT_S + 1
    assert store.silent(found)
    assert not store.silent(turn("2", beat=0.0))


def test_two_gateways_share_one_database(opened: Open) -> None:
    one = opened()
    if not one.shared:
        return  # memory is one process's own
    other = opened()
    one.put(turn("1"))
    assert other.get("a", "1") is not None
    failures: list[Exception] = []

    def write(store: ResponseStore, name: str) -> None:
        try:
            for number in range(20):
                store.put(turn(f"{name}{number}"))
                store.put(turn("the same"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in ((one, "x"), (other, "y"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert one.usage()[0] == 42


def test_a_table_of_earlier_versions_goes_on_with_what_is_in_it(opened: Open) -> None:
    before = opened()
    before.put(turn("1"))
    table = RESPONSES.name
    with before._database.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN context BIGINT NOT NULL DEFAULT 0")
        if before._database.dialect == "postgresql":
            connection.exec_driver_sql(f"ALTER TABLE {table} ALTER COLUMN context DROP DEFAULT")
    if not before.shared:
        return  # nothing is left of memory to be opened again
    after = opened()
    after.put(turn("2", previous=turn("1")))
    assert [one.id for one in after.chain("a", "2")] == ["1", "2"]
    with after._database.begin() as connection:
        assert "context" not in {column["name"] for column in inspect(connection).get_columns(table)}


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "responses.db"
    store = ResponseStore(f"sqlite:///{path}", ResponsesSettings())
    store.put(turn("1"))
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}
    store.close()


def test_what_was_deleted_is_not_left_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    store = ResponseStore(f"sqlite:///{path}", ResponsesSettings())
    store.put(turn("1", response=b"a secret of theirs" * 1000))
    store.delete("a", "1")
    store.close()
    assert b"a secret of theirs" not in b"".join(one.read_bytes() for one in tmp_path.iterdir())


def test_a_database_that_cannot_be_used_is_said_without_its_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:hunter2@127.0.0.1:1/none"
    with pytest.raises(StoreError, match=r"responses.store: .*me:…@") as caught:
        ResponseStore(url, ResponsesSettings())
    assert "hunter2" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="give a database that can be written"):
        ResponseStore(f"sqlite:///{tmp_path / 'file' / 'x.db'}", ResponsesSettings())


@pytest.mark.parametrize("url", ["nonsense", "mysql://localhost/x"])
def test_a_store_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="postgresql"):
        ResponsesSettings(store=url)
    with pytest.raises(ValueError, match="give one"):
        ResponsesSettings(store="sqlite://", store_env="X")


class AgainstAModel(RuleBasedStateMachine):
    """The store, and beside it a dictionary that should say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = ResponseStore("sqlite://", ResponsesSettings(keep_s=1000), self.clock)
        self.kept: dict[tuple[str, str], Stored] = {}

    @rule(owner=st.sampled_from("ab"), name=st.sampled_from("123456"), previous=st.sampled_from("123456-"))
    def put(self, owner: str, name: str, previous: str) -> None:
        before = self.kept.get((owner, previous))
        made = turn(name, owner, before, response=f"{owner}{name}{len(self.kept)}".encode())
        self.store.put(made)
        self.kept[owner, name] = made

    @rule(owner=st.sampled_from("ab"), name=st.sampled_from("123456"))
    def delete(self, owner: str, name: str) -> None:
        assert self.store.delete(owner, name) == (self.kept.pop((owner, name), None) is not None)

    @rule(owner=st.sampled_from("ab"), name=st.sampled_from("123456"))
    def chain(self, owner: str, name: str) -> None:
        expected: list[Stored] = []
        found = self.kept.get((owner, name))
        while found is not None:
            expected.insert(0, found)
            before = self.kept.get((owner, found.previous or ""))
            found = before if before and before.depth < found.depth else None
        assert self.store.chain(owner, name) == expected

    @rule()
    def time_passes(self) -> None:
        self.clock.now += 1
        self.store.prune()

    @invariant()
    def the_same_is_kept(self) -> None:
        assert self.store.usage() == (len(self.kept), sum(one.size for one in self.kept.values()))

    def teardown(self) -> None:
        self.store.close()


AgainstAModel.TestCase.settings = hypothesis.settings(max_examples=30, stateful_step_count=30, deadline=None)
TestAgainstAModel = AgainstAModel.TestCase


def test_where_it_is_is_shown_without_its_password() -> None:
    settings = ResponsesSettings(store="postgresql+psycopg://me:hunter2@db/name?sslpassword=hunter3")
    assert "hunter" not in repr(settings)
