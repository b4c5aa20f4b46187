"""The store as the event loop sees it: nobody waits for a database who does not need it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_stack import eventually
from prometheus_client import CollectorRegistry
from test_responses_store import turn

from gateway.config import ResponsesSettings
from gateway.errors import StoreDownError
from gateway.responses import service
from gateway.responses.service import Responses
from gateway.responses.store import ResponseStore
from gateway.store.database import MEMORY
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
        real = getattr(ResponseStore, method)

        def held(store: ResponseStore, *arguments: object) -> object:
            self.waiting += 1
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
    monkeypatch.setattr(service, "MOST_WAITING", 3)
    monkeypatch.setattr(service, "MOST_WAITING_BYTES", 10_000)
    responses.keep(turn("large", response=b"x" * 20_000))
    assert dropped(responses, "busy") == 1
    for number in range(5):
        responses.keep(turn(str(number)))
    assert dropped(responses, "busy") == 3
    gate.open.set()
    for number in range(3):
        assert await responses.get("a", str(number))
    responses.keep(turn("again"))
    assert await responses.get("a", "again"), "room comes back"


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
