"""Prompts that no engine counted are booked afterwards, and nothing is guessed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from gateway_stack import eventually, running_gateway
from prometheus_client import CollectorRegistry

from gateway import control
from gateway.proxy.record import NO_USAGE, Usage
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.logs import AccessLog
from gateway.telemetry.metrics import Metrics
from gateway.upstream import settle
from gateway.upstream.fake import FakeEngine
from gateway.upstream.settle import Settlement, Unreported, owes_usage, questions_for

CHAT = {"model": "m", "messages": [{"role": "user", "content": "one two three"}], "stream": True, "n": 2}


class Books:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry, ["core"])
        self.settlement = Settlement(metrics, Ledger(metrics, AccessLog()).spend)

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    @property
    def unreported(self) -> float:
        return self.sample("tiercel_usage_unreported_total", role="core", model="assistant", variant="int8")

    @property
    def prompt(self) -> float:
        return self.sample(
            "tiercel_tokens_total", role="core", model="assistant", variant="int8", kind="prompt"
        )

    def settled(self, outcome: str) -> float:
        labels = {"role": "core", "model": "assistant", "variant": "int8", "outcome": outcome}
        return self.sample("tiercel_usage_settled_total", **labels)

    @property
    def with_an_outcome(self) -> float:
        return sum(map(self.settled, ("known", "booked", "unknown", "failed", "dropped")))


def unreported(url: str, body: Any = CHAT, path: str = "/v1/chat/completions", **more: Any) -> Unreported:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Unreported(
        **{"usage": NO_USAGE, "key": "k"} | more,
        role="core",
        labels=("assistant", "int8"),
        url=url,
        path=path,
        body=(raw,),
    )


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Books, FakeEngine, str]]:
    engine, books = FakeEngine(), Books()
    async with engine.serving() as url, aiohttp.ClientSession() as session:
        task = asyncio.create_task(books.settlement.run(session))
        yield books, engine, url
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        assert books.settlement.idle
        assert books.with_an_outcome == books.unreported, "each has one"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "m", "prompt": "one two"}),
        ("/v1/completions", {"model": "m", "prompt": ["one", "two three"], "n": 3}),
        ("/v1/completions", {"model": "m", "prompt": [[1, 2, 3], [4]]}),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3]}),
        ("/v1/messages", {"model": "m", "system": "be brief", "messages": CHAT["messages"], "max_tokens": 5}),
    ],
)
async def test_a_prompt_is_booked_as_the_engine_took_it_in(path: str, body: Any) -> None:
    async with running() as (books, engine, url):
        async with aiohttp.ClientSession() as http, http.post(url + path, json=body) as response:
            assert response.status == 200
        (work,) = engine.account
        books.settlement.report(unreported(url, body, path))
        await eventually(lambda: books.settled("booked"))
        assert books.prompt == work.prompt_tokens
        key = {"key": "k", "role": "core", "model": "assistant", "variant": "int8", "kind": "prompt"}
        assert books.sample("tiercel_key_tokens_total", **key) == work.prompt_tokens
        assert books.unreported == 1


async def test_an_engine_that_asks_for_a_key_is_given_it() -> None:
    async with running() as (books, engine, url):
        engine.script.key = "sk-engine"
        known = unreported(url, headers={"authorization": "Bearer sk-engine"})
        assert "sk-engine" not in repr(known)
        books.settlement.report(known)
        await eventually(lambda: books.settled("booked"))


async def test_what_is_known_is_not_asked_for() -> None:
    async with running() as (books, _, url):
        books.settlement.report(unreported(url, usage=Usage(5, 0, 2, exact=False)))
        assert (books.unreported, books.settled("known"), books.settlement.idle) == (1, 1, True)


async def test_what_cannot_be_known_is_counted_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "AGAIN_AFTER_S", ())
    async with running() as (books, _, url):
        books.settlement.report(unreported(url, {"input": "a"}, "/v1/responses"))
        books.settlement.report(unreported(url, b"{"))
        books.settlement.report(unreported("http://127.0.0.1:1"))
        await eventually(lambda: books.settled("failed") == 2 and books.settled("unknown") == 1)
        books.settlement.report(
            Unreported("core", ("assistant", "int8"), None, "", "/v1/chat/completions", None, NO_USAGE)
        )
        assert books.settled("unknown") == 2, "nobody can ask a provider"
        assert (books.unreported, books.prompt) == (4, 0)
        books.settlement.report(unreported(url))
        await eventually(lambda: books.settled("booked"))


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    monkeypatch.setattr(settle, "MOST_WAITING", 3)
    for _ in range(5):
        books.settlement.report(unreported("http://127.0.0.1:1"))
    assert books.settled("dropped") == 2
    monkeypatch.setattr(settle, "MOST_WAITING", 100)
    monkeypatch.setattr(settle, "LARGEST_BYTES", 1000)
    books.settlement.report(unreported("http://127.0.0.1:1", b"x" * 1001))
    monkeypatch.setattr(settle, "MOST_BYTES", 0)
    books.settlement.report(unreported("http://127.0.0.1:1"))
    assert (books.settled("dropped"), books.unreported) == (4, 7)


async def test_an_engine_that_is_up_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "AGAIN_AFTER_S", (0.01,) * 100_000)
    async with running() as (books, engine, _):
        with socket.socket() as kept:  # nobody listens there, and nobody else can
            kept.bind(("127.0.0.1", 0))
            port = kept.getsockname()[1]
            books.settlement.report(unreported(f"http://127.0.0.1:{port}"))
            await asyncio.sleep(0.1)
            assert not books.settlement.idle
        async with engine.serving(port=port):
            await eventually(lambda: books.settled("booked"))


async def test_an_engine_that_refuses_the_question_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settle, "AGAIN_AFTER_S", (1000.0,))
    async with running() as (books, _, url):
        books.settlement.report(unreported(url + "/nothing/here"))
        await eventually(lambda: books.settled("failed"))


@asynccontextmanager
async def slow_to_count(seconds: float) -> AsyncIterator[str]:
    """Counts five tokens, after a while."""

    async def tokenize(_: web.Request) -> web.Response:
        await asyncio.sleep(seconds)
        return web.json_response({"count": 5})

    app = web.Application()
    app.router.add_post("/tokenize", tokenize)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_what_waits_when_the_gateway_stops_is_still_booked() -> None:
    async with slow_to_count(0.1) as url, running() as (books, _, _):
        for _ in range(80):
            books.settlement.report(unreported(url))
        await asyncio.sleep(0)
        await books.settlement.drain(20.0)
        assert (books.settled("booked"), books.prompt) == (80, 400)


async def test_what_is_to_be_asked_for_again_is_asked_for_once_more_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settle, "AGAIN_AFTER_S", (1000.0,))
    async with running() as (books, _, _):
        books.settlement.report(unreported("http://127.0.0.1:1"))
        await eventually(lambda: books.settlement._later)
        assert not books.settlement.idle
        await books.settlement.drain(20.0)
        assert books.settled("failed") == 1


async def test_what_cannot_be_counted_in_time_is_counted_as_dropped() -> None:
    async with slow_to_count(1000.0) as url, running() as (books, _, _):
        for _ in range(20):
            books.settlement.report(unreported(url))
        await asyncio.sleep(0)
        await books.settlement.drain(0.1)
        assert books.settled("dropped") == 20 - settle.AT_ONCE
    assert books.settled("dropped") == 20


async def test_no_end_of_the_gateway_loses_a_prompt() -> None:
    """Engines under load take long over a count, and other jobs take all of the time that jobs have to
    end."""
    async with slow_to_count(0.3) as url:
        async with running_gateway() as stack:
            begun = asyncio.Event()

            async def obstinate() -> None:
                begun.set()
                try:
                    await asyncio.sleep(1000)
                finally:
                    await asyncio.sleep(control.STOP_S + 0.5)

            stack.gateway.supervisor.keep("obstinate", obstinate)  # the first that is ended
            await begun.wait()
            for _ in range(100):
                stack.gateway.settlement.report(unreported(url))
        labels = {"role": "core", "model": "assistant", "variant": "int8"}
        sample = stack.registry.get_sample_value
        assert sample("tiercel_usage_settled_total", labels | {"outcome": "booked"}) == 100
        assert sample("tiercel_tokens_total", labels | {"kind": "prompt"}) == 500


@asynccontextmanager
async def answering(answer: web.Response) -> AsyncIterator[tuple[str, list[str]]]:
    """Says that of every prompt. The paths that were asked for come with it."""
    asked: list[str] = []

    async def count(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    app = web.Application()
    app.router.add_post("/{path:.*}", count)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/"), asked


@pytest.mark.parametrize("count", [-1000, -1, 10**300, (1 << 40) + 1, True, None, "7", 3.9, 5.0, [3], {}])
async def test_what_is_no_count_is_not_booked(count: Any) -> None:
    async with answering(web.json_response({"count": count})) as (url, asked), running() as (books, _, _):
        books.settlement.report(unreported(url))
        await eventually(lambda: books.settled("failed"))
        assert (books.prompt, books.settled("booked"), asked) == (0, 0, ["/tokenize"])


async def test_counts_that_are_none_together_are_not_booked() -> None:
    most = web.json_response({"count": 1 << 40})
    async with answering(most) as (url, _), running() as (books, _, _):
        for prompts in (["one"], ["one", "two"]):
            books.settlement.report(unreported(url, {"prompt": prompts}, "/v1/completions"))
        await eventually(lambda: books.settled("failed") and books.settled("booked"))
        assert (books.settled("failed"), books.prompt) == (1, 1 << 40)


@pytest.mark.parametrize("status", [204, 301, 302, 303, 307, 308])
async def test_a_prompt_goes_nowhere_else_to_be_counted(status: int) -> None:
    answer = web.json_response({"count": 5}, status=status, headers={"location": "/elsewhere"})
    async with answering(answer) as (url, asked), running() as (books, _, _):
        books.settlement.report(unreported(url, headers={"authorization": "Bearer sk-engine"}))
        await eventually(lambda: books.settled("failed"))
        assert (asked, books.prompt) == (["/tokenize"], 0)


def test_what_shapes_the_prompt_of_a_chat_is_asked_about() -> None:
    body = {
        **CHAT,
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"a": 1},
        "reasoning_effort": "low",
        "temperature": 1,
    }
    (question,) = questions_for("/v1/chat/completions", json.dumps(body).encode()) or ()
    assert isinstance(question, tuple)
    assert question[1] == {
        "model": "m",
        "messages": CHAT["messages"],
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": True, "a": 1},
    }


def test_counting_has_no_usage() -> None:
    assert not any(map(owes_usage, ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/messages/count_tokens")))
    assert all(map(owes_usage, ("/v1/messages", "/v1/embeddings", "/score")))
