"""The store as the event loop sees it: nobody waits for a database who does not need it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_stack import eventually
from prometheus_client import CollectorRegistry
from test_responses_store import turn

from gateway.config import ResponsesSettings
from gateway.errors import BadRequestError, OverloadedError, StoreDownError, TenantOverloadedError
from gateway.responses import service
from gateway.responses.conversation import ItemPage
from gateway.responses.service import Responses
from gateway.responses.store import ResponseStore, Stored
from gateway.responses.turns import Shares, Turn
from gateway.store.database import MEMORY, StoreError
from gateway.telemetry.metrics import Metrics


def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), ())


@pytest.fixture
async def responses() -> AsyncIterator[Responses]:
    made = Responses(ResponsesSettings(), MEMORY, metrics())
    yield made
    await made.close()


class Gate:
    """Holds the database's threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.open = threading.Event()
        self.waiting = 0
        self.asked: list[object] = []
        """The first argument of each call."""
        real = getattr(ResponseStore, method)

        def held(store: ResponseStore, *arguments: object) -> object:
            self.waiting += 1
            self.asked.append(arguments[0])
            assert self.open.wait(30)
            return real(store, *arguments)

        monkeypatch.setattr(ResponseStore, method, held)


def dropped(responses: Responses, reason: str) -> float:
    return responses._metrics.responses_dropped.labels(reason).value


async def test_what_is_just_being_written_is_waited_for(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "put")
    responses.keep(turn("1", response=b"first"))
    responses.keep(turn("1", response=b"second"))
    read = asyncio.create_task(responses.get("a", "1"))
    await eventually(lambda: gate.waiting == 1)
    gate.open.set()
    found = await read
    assert found
    assert found.response == b"second", "in the order in which they were kept"
    assert responses._metrics.responses_stored.labels().value == 2


async def test_what_another_process_is_writing_is_waited_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'responses.db'}"
    one, other = (Responses(ResponsesSettings(), url, metrics()) for _ in range(2))
    await one.tend()
    await other.tend()
    read = asyncio.create_task(other.chain("a", "1", lambda chain: chain[-1].id))
    await asyncio.sleep(0)
    one.keep(turn("1"))
    assert await read == "1"
    assert await other.get("a", "never") is None
    await one.close()
    await other.close()


async def test_a_database_that_hangs_holds_nobody(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMEOUT_S", 1.0)
    await responses.tend()
    gate = Gate(monkeypatch, "get")
    with pytest.raises(StoreDownError):
        await responses.get("a", "1")
    assert not responses.usable
    with pytest.raises(StoreDownError):
        await responses.get("a", "1")
    responses.keep(turn("2"))
    assert gate.waiting == 1, "it is not asked again"
    assert dropped(responses, "store_down") == 1
    gate.open.set()

    async def back() -> bool:
        try:
            await responses.tend()
        except StoreDownError:
            return False
        return responses.usable

    await eventually(back)
    responses.keep(turn("3"))
    assert await responses.get("a", "3")


async def test_a_loop_that_was_held_up_does_not_take_its_database_for_dead(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    await responses.tend()
    monkeypatch.setattr(service, "TIMEOUT_S", 1.0)
    read = asyncio.create_task(responses.get("a", "1"))
    await asyncio.sleep(0)
    time.sleep(1.5)  # noqa: ASYNC251
    assert await read is None
    assert responses.usable


async def test_what_waits_to_be_written_is_bounded(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    await responses.tend()
    gate = Gate(monkeypatch, "put")
    responses._writing, responses._writing_bytes = Shares(6), Shares(10_000)
    responses.keep(turn("large", response=b"x" * 20_000))
    assert dropped(responses, "busy") == 1
    for number in range(5):
        responses.keep(turn(str(number)))
    assert dropped(responses, "busy") == 3
    responses.keep(turn("others", owner="b"))
    assert dropped(responses, "busy") == 3, "there is room left for others"
    gate.open.set()
    for number in range(3):
        assert await responses.get("a", str(number))
    assert await responses.get("b", "others")
    responses.keep(turn("again"))
    assert await responses.get("a", "again"), "room comes back"
    await eventually(lambda: not responses._writing.taken and not responses._writing_bytes.taken)


async def test_one_who_asks_much_is_told_so_and_others_are_answered(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(service, "TURN_S", 60.0)
    await responses.tend()
    gate = Gate(monkeypatch, "get")
    responses._reading = Shares(8)
    reads = [asyncio.create_task(responses.get("a", "1")) for _ in range(4)]
    await eventually(lambda: gate.waiting == 1)
    for ask in (
        responses.get("a", "1"),
        responses.delete("a", "1"),
        responses.chain("a", "1", len),
        responses.items("a", "1", ItemPage("1", 1)),
        responses.put(turn("1")),
    ):
        with pytest.raises(TenantOverloadedError, match="4 requests of this tenant wait for the store"):
            await ask
    other = asyncio.create_task(responses.get("b", "1"))
    await eventually(lambda: responses._reading.taken["b"] == 1)
    gate.open.set()
    assert await other is None
    await asyncio.gather(*reads)
    assert gate.asked == ["a", "b", "a", "a", "a"], "whoever comes does not wait for all of another's"
    assert responses.usable
    assert not responses._reading.taken


async def test_one_owner_never_has_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = Responses(ResponsesSettings(), f"sqlite:///{tmp_path / 'responses.db'}", metrics())
    monkeypatch.setattr(service, "TIMEOUT_S", 60.0)
    await responses.tend()
    gate = Gate(monkeypatch, "get")
    reads = [asyncio.create_task(responses.get("a", "1")) for _ in range(6)]
    await eventually(lambda: gate.waiting == 2)
    await responses.put(turn("1", owner="b"))
    assert gate.waiting == 2
    gate.open.set()
    await asyncio.gather(*reads)
    await responses.close()


async def test_to_wait_for_a_thread_is_not_to_wait_for_the_database(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(service, "TURN_S", 0.05)
    monkeypatch.setattr(service, "WRITE_TURN_S", 0.05)
    gate = Gate(monkeypatch, "get")
    held = asyncio.create_task(responses.get("a", "1"))
    await eventually(lambda: gate.waiting == 1)
    with pytest.raises(OverloadedError):
        await responses.get("b", "1")
    responses.keep(turn("1"))
    await eventually(lambda: dropped(responses, "busy") == 1)
    assert responses.usable
    gate.open.set()
    assert await held is None
    monkeypatch.setattr(service, "TURN_S", 60.0)
    assert await responses.get("b", "1") is None


async def test_what_is_made_of_an_answer_is_not_the_databases_time(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, real = threading.local(), Turn.within

    async def within(turn: Turn, timeout_s: float, work: Callable[[], Any]) -> Any:
        def marked() -> Any:
            here.timed = True
            try:
                return work()
            finally:
                here.timed = False

        return await real(turn, timeout_s, marked)

    monkeypatch.setattr(Turn, "within", within)
    await responses.put(turn("1"))
    assert await responses.chain("a", "1", lambda chain: (len(chain), here.timed)) == (1, False)

    def refuses(chain: list[Stored]) -> None:
        raise BadRequestError("it is too long")

    with pytest.raises(BadRequestError, match="it is too long"):
        await responses.chain("a", "1", refuses)
    assert responses.usable


async def test_whoever_leaves_gives_back_what_he_waited_for(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(service, "TURN_S", 60.0)
    gate = Gate(monkeypatch, "get")
    reads = [asyncio.create_task(responses.get(owner, "1")) for owner in "aab"]
    await eventually(lambda: gate.waiting == 1)
    for read in reads:
        read.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    assert not responses._reading.taken
    last = asyncio.create_task(responses.get("c", "1"))
    gate.open.set()
    assert await last is None
    assert gate.asked == ["a", "c"]


async def test_a_database_that_cannot_be_opened_is_tried_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    opened = threading.Event()

    def cannot(url: str, *_: object) -> ResponseStore:
        tried.append(url)
        assert opened.wait(30)
        raise StoreError("responses.store: it is no database")

    monkeypatch.setattr(service, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(service, "ResponseStore", cannot)
    responses = Responses(ResponsesSettings(), f"sqlite:///{tmp_path / 'responses.db'}", metrics())
    reads = [asyncio.create_task(responses.get(owner, "1")) for owner in "abcdef"]
    await eventually(lambda: len(tried) == 1)
    opened.set()
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(one) for one in found] == [StoreDownError] * 6
    assert len(tried) == 1
    with pytest.raises(StoreDownError):
        await responses.tend()
    assert len(tried) == 2, "by whoever looks after it"
    await responses.close()


async def pages(responses: Responses, limit: int, *, newest_first: bool) -> list[Any]:
    """All items, page by page."""
    found: list[Any] = []
    after = None
    while True:
        page = ItemPage("9", limit, after, newest_first=newest_first)
        assert await responses.items("a", "9", page)
        assert page.begun
        found += [json.loads(bytes(memoryview(item))) for item in page.items]
        assert page.ids == [item["id"] for item in found[-len(page.ids) :]]
        if not page.has_more:
            return found
        after = page.ids[-1]


async def test_a_page_reads_no_more_of_a_conversation_than_it_shows(
    responses: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = None
    for number in range(10):
        said = {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": []}
        response = json.dumps({"output": [said, {"type": "custom_tool_call"}]}).encode()
        previous = turn(str(number), previous=previous, response=response)
        await responses.put(previous)
    chain = await pages(responses, 100, newest_first=False)
    assert len(chain) == 28
    monkeypatch.setattr(service, "PAGE_BYTES", 1)
    for limit in (1, 3, 5, 100):
        assert await pages(responses, limit, newest_first=False) == chain
        assert await pages(responses, limit, newest_first=True) == chain[::-1]
    read: list[str] = []
    real = ResponseStore.some

    def some(store: ResponseStore, owner: str, ids: list[str]) -> list[Stored]:
        read.extend(ids)
        return real(store, owner, ids)

    monkeypatch.setattr(ResponseStore, "some", some)
    for newest_first, expected in ((True, ["9", "8"]), (False, ["0"])):
        read.clear()
        assert await responses.items("a", "9", ItemPage("9", 2, newest_first=newest_first))
        assert read == expected
    page = ItemPage("9", 2, "nothing")
    assert await responses.items("a", "9", page)
    assert not page.begun
    assert not await responses.items("b", "9", ItemPage("9", 2))


async def test_what_has_expired_goes_without_anybody_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    responses = Responses(ResponsesSettings(keep_s=100), MEMORY, metrics(), lambda: now[0])
    monkeypatch.setattr(service, "PRUNE_S", 0.0)
    await responses.put(turn("1"))
    now[0] += 101
    await responses.tend()
    assert responses._store
    assert responses._store.usage() == (0, 0)
    await responses.close()


async def test_what_was_kept_is_written_before_the_end(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'responses.db'}"
    responses = Responses(ResponsesSettings(), url, metrics())
    for number in range(20):
        responses.keep(turn(str(number)))
    await responses.close()
    store = ResponseStore(url, ResponsesSettings())
    assert store.usage()[0] == 20
    store.close()
