"""`/v1/responses`, kept: conversations go on at whichever replica, variant or gateway is asked next."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_stack import Stack, eventually, make_config
from responses_engine import responses_gateway
from test_keys import bearer, key

from gateway.config import ConfigError
from gateway.responses.service import store_url
from gateway.responses.store import SILENT_S

NOT_FOUND = "previous_response_not_found"


@contextlib.asynccontextmanager
async def client_of(stack: Stack, name: str = "any") -> AsyncIterator[openai.AsyncOpenAI]:
    secret = f"sk-{name}"
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key=secret, max_retries=0) as client:
        yield client


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with responses_gateway() as (running,):
        yield running


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(stack) as client:
        yield client


def asked(stack: Stack) -> list[dict[str, Any]]:
    """What engines were asked, whichever of them."""
    return [body for variant in stack.engines for body in stack.asked(variant)]


async def refusal(call: Any) -> Any:
    """The status, code and message of an error."""
    with pytest.raises(openai.APIStatusError) as caught:
        await call
    return caught.value.status_code, caught.value.code, caught.value.body["message"]  # type: ignore[index]


async def test_a_conversation_goes_on_at_another_replica_and_another_variant(
    stack: Stack, client: openai.AsyncOpenAI
) -> None:
    first = await client.responses.create(model="assistant", input="one", instructions="Be brief.")
    assert first.previous_response_id is None
    assert first.model_extra == {"store": True} | (first.model_extra or {})
    second = await client.responses.create(
        model="assistant", input=[{"role": "user", "content": "two"}], previous_response_id=first.id
    )
    third = await client.responses.create(
        model="summarizer", input="three", previous_response_id=second.id, stream=False
    )
    assert {first.output_text[0], second.output_text[0]} == {"a", "b"}, "one replica after the other"
    assert first.output_text.endswith("one")
    assert second.output_text.endswith("3 items, the last two")
    assert third.output_text == "int8: 5 items, the last three"
    assert second.previous_response_id == first.id
    assert third.previous_response_id == second.id
    sent = stack.asked("int8")[-1]
    assert sent["store"] is False
    assert sent["previous_response_id"] is None
    assert "instructions" not in sent, "they are of one request"
    assert [item["role"] for item in sent["input"]] == ["user", "assistant", "user", "assistant", "user"]
    assert sent["input"][0]["content"] == "one"
    assert sent["input"][1]["content"] == [
        {"type": "output_text", "text": first.output_text, "annotations": []}
    ], "log-probabilities stay behind"


async def test_streams_are_kept_and_show_what_they_go_on_from(
    stack: Stack, client: openai.AsyncOpenAI
) -> None:
    first = await client.responses.create(model="assistant", input="one")
    previous = first.id
    for word, items in (("two", 3), ("three", 5)):
        events = []
        async with client.responses.stream(
            model="assistant", input=word, previous_response_id=previous
        ) as stream:
            async for event in stream:
                events.append(event)
            final = await stream.get_final_response()
        shown = [event.response for event in events if hasattr(event, "response")]
        assert len(shown) == 3
        assert {one.previous_response_id for one in shown} == {previous}
        assert {one.id for one in shown} == {final.id}
        assert all((one.model_extra or {})["store"] is True for one in shown)
        assert final.output_text.endswith(f"{items} items, the last {word}")
        previous = final.id
    kept = await client.responses.retrieve(previous)
    assert kept.output_text.endswith("5 items, the last three")
    assert stack.sample("tiercel_responses_stored_total") == 3


async def test_tools_and_reasoning_go_back_to_the_engine(stack: Stack, client: openai.AsyncOpenAI) -> None:
    engine = stack.engines["int8"]
    engine.calls = ["weather"]
    engine.extra = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [], "encrypted_content": None},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ]
    first = await client.responses.create(model="summarizer", input="the weather?")
    call = first.output[-1]
    assert call.type == "function_call"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = await client.responses.create(model="summarizer", input=[output], previous_response_id=first.id)
    assert second.output_text == "int8: 4 items, the last sunny"
    kinds = [item["type"] for item in stack.asked("int8")[-1]["input"]]
    assert kinds == ["message", "reasoning", "function_call", "function_call_output"]


async def test_two_may_go_on_from_the_same_response(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="assistant", input="one")
    forks = await asyncio.gather(
        *(
            client.responses.create(model="assistant", input=word, previous_response_id=first.id)
            for word in ("left", "right")
        )
    )
    for fork, word in zip(forks, ("left", "right"), strict=True):
        again = await client.responses.create(model="assistant", input="again", previous_response_id=fork.id)
        items = await client.responses.input_items.list(again.id, order="asc")
        texts = [item.content[0].text for item in items.data]  # type: ignore[union-attr]
        assert [texts[0], texts[2], texts[4]] == ["one", word, "again"]


async def test_what_is_kept_can_be_seen_paged_and_deleted(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="assistant", input="one", metadata={"a": "b"})
    second = await client.responses.create(model="assistant", input="two", previous_response_id=first.id)
    assert await client.responses.retrieve(second.id) == second
    page = await client.responses.input_items.list(second.id, limit=2)
    assert page.has_more
    ids = [item.id async for item in page]
    assert len(set(ids)) == len(ids) == 3
    assert ids == [item.id async for item in await client.responses.input_items.list(second.id)]
    upwards = await client.responses.input_items.list(second.id, order="asc")
    assert [item.id for item in upwards.data] == ids[::-1]
    assert upwards.data[0].content[0].text == "one"  # type: ignore[union-attr]
    assert (await refusal(client.responses.input_items.list(second.id, after="x")))[0] == 400
    await client.responses.delete(first.id)
    for call in (
        client.responses.retrieve(first.id),
        client.responses.delete(first.id),
        client.responses.input_items.list(first.id),
        client.responses.cancel(first.id),
    ):
        assert (await refusal(call))[0] == 404
    status, code, message = await refusal(
        client.responses.create(model="assistant", input="x", previous_response_id=second.id)
    )
    assert (status, code) == (400, NOT_FOUND)
    assert first.id in message, "a turn before it is gone, and which"


async def test_store_false_is_not_kept_and_passes_as_it_is(stack: Stack, client: openai.AsyncOpenAI) -> None:
    body = {"model": "assistant", "input": "one", "store": False, "include": ["reasoning.encrypted_content"]}
    async with stack.http.post(stack.url + "/v1/responses", json=body) as response:
        answer = await response.json()
    assert "store" not in answer
    assert asked(stack) == [body]
    assert (await refusal(client.responses.retrieve(answer["id"])))[0] == 404
    first = await client.responses.create(model="assistant", input="one")
    second = await client.responses.create(
        model="assistant", input="two", previous_response_id=first.id, store=False
    )
    assert second.previous_response_id == first.id
    assert second.model_extra
    assert second.model_extra["store"] is False
    assert second.output_text.endswith("3 items, the last two")
    assert (await refusal(client.responses.retrieve(second.id)))[0] == 404


async def test_what_is_not_there_cannot_be_gone_on_from(client: openai.AsyncOpenAI) -> None:
    for name in ("resp_unknown", "a\x00b", "x" * 500, ""):
        status, code, message = await refusal(
            client.responses.create(model="assistant", input="x", previous_response_id=name)
        )
        assert (status, code) == (400, NOT_FOUND)
        assert message.startswith("Previous response with id '")
    for name in ("resp_unknown", "%00", "x" * 500):
        assert (await refusal(client.responses.retrieve(name)))[0] == 404


async def test_an_engines_refusal_is_its_own_and_nothing_is_kept(
    stack: Stack, client: openai.AsyncOpenAI
) -> None:
    first = await client.responses.create(model="summarizer", input="one")
    stack.engines["int8"].refuses = {"message": "too long", "type": "BadRequestError", "code": 400}
    for stream in (False, True):
        call = client.responses.create(
            model="summarizer", input="two", previous_response_id=first.id, stream=stream
        )
        assert (await refusal(call))[2] == "too long"
    assert stack.sample("tiercel_responses_stored_total") == 1


async def test_a_stream_that_is_cut_short_is_not_kept(stack: Stack) -> None:
    engine = stack.engines["int8"]
    engine.held = asyncio.Event()
    body = {"model": "summarizer", "input": "one", "stream": True}
    async with stack.http.post(stack.url + "/v1/responses", json=body) as response:
        line = b""
        while not line.startswith(b"data: "):
            line = await response.content.readline()
        name = json.loads(line[6:])["response"]["id"]
    await eventually(lambda: engine.aborted == 1)
    async with stack.http.get(f"{stack.url}/v1/responses/{name}") as response:
        assert response.status == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"previous_response_id": 7}, "previous_response_id"),
        ({"previous_response_id": "resp_1", "previous_input_messages": []}, "previous_response_id"),
        ({"store": "perhaps"}, "store"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": True}, "background"),
    ],
)
async def test_what_cannot_be_done_is_refused(stack: Stack, fields: dict[str, Any], param: str) -> None:
    body = {"model": "assistant", "input": "one", **fields}
    async with stack.http.post(stack.url + "/v1/responses", json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param
    assert not asked(stack)


async def test_what_is_asked_about_a_request_goes_on_as_well(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="assistant", input="one")
    counted = await client.responses.input_tokens.count(
        model="assistant", input="two", previous_response_id=first.id
    )
    assert counted.input_tokens == 3, "items, as this engine counts"
    alone = await client.responses.input_tokens.count(model="assistant", input=[])
    assert alone.input_tokens == 0


@pytest.mark.parametrize("background", [False, True])
async def test_bodies_may_be_compressed(stack: Stack, client: openai.AsyncOpenAI, background: bool) -> None:
    first = await client.responses.create(model="summarizer", input="one")
    body = {"model": "summarizer", "input": "two", "previous_response_id": first.id}
    body |= {"background": background, "store": True}
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    raw = gzip.compress(json.dumps(body).encode())
    async with stack.http.post(stack.url + "/v1/responses", data=raw, headers=headers) as response:
        assert response.status == 200
        name = (await response.json())["id"]
    done = await poll(client, name)
    assert done.output_text == "int8: 3 items, the last two"


async def test_a_websocket_is_refused_so_that_its_client_goes_on_over_http(stack: Stack) -> None:
    headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    async with stack.http.get(stack.url + "/v1/responses", headers=headers) as response:
        assert response.status == 426
        assert response.headers["upgrade"] == "HTTP/1.1"
        assert (await response.json())["error"]["code"] == "no_websocket"
    async with stack.http.get(stack.url + "/v1/responses") as response:
        assert response.status == 405


async def test_tenants_do_not_see_each_others_responses() -> None:
    keys = (key("a1", tenant="a"), key("a2", tenant="a"), key("b", tenant="b"), key("c"), key("d"))
    async with responses_gateway(keys=keys) as (stack,), contextlib.AsyncExitStack() as exits:
        clients = {
            name: await exits.enter_async_context(client_of(stack, name))
            for name in ("a1", "a2", "b", "c", "d")
        }
        kept = await clients["a1"].responses.create(model="assistant", input="a secret")
        assert (await clients["a2"].responses.retrieve(kept.id)).id == kept.id
        without = await clients["c"].responses.create(model="assistant", input="a secret")
        for name, response in (("b", kept), ("c", kept), ("a1", without), ("d", without)):
            client = clients[name].responses
            for call in (
                client.retrieve(response.id),
                client.delete(response.id),
                client.input_items.list(response.id),
                client.cancel(response.id),
            ):
                status, _, message = await refusal(call)
                assert status == 404
                assert message == f"Response with id '{response.id}' not found."
            status, code, message = await refusal(
                client.create(model="assistant", input="x", previous_response_id=response.id)
            )
            assert (status, code) == (400, NOT_FOUND)
            assert message == f"Previous response with id '{response.id}' not found."
        async with stack.http.get(f"{stack.url}/v1/responses/{kept.id}") as response:
            assert response.status == 401
        async with stack.http.get(f"{stack.url}/v1/responses/{kept.id}", headers=bearer("a1")) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("limits", "setting"),
    [
        ({"max_turns": 3}, "max_turns allows 3"),
        ({"max_conversation_bytes": 2000}, "max_conversation_bytes allows 2000"),
    ],
)
async def test_a_conversation_that_is_too_long_is_refused(limits: dict[str, int], setting: str) -> None:
    async with responses_gateway(responses=limits) as (stack,), client_of(stack) as client:
        previous = None
        for number in range(3):
            done = await client.responses.create(
                model="assistant", input=f"turn {number}", previous_response_id=previous
            )
            previous = done.id
        status, code, message = await refusal(
            client.responses.create(model="assistant", input="x", previous_response_id=previous)
        )
        assert (status, code) == (400, "context_length_exceeded")
        assert setting in message


async def test_what_is_too_large_or_too_many_is_not_kept() -> None:
    limits = {"max_responses": 2, "max_tenant_bytes": 4096}
    async with responses_gateway(responses=limits) as (stack,), client_of(stack) as client:
        large = await client.responses.create(model="assistant", input="x" * 5000)
        assert (await refusal(client.responses.retrieve(large.id)))[0] == 404
        assert stack.sample("tiercel_responses_dropped_total", reason="too_large") == 1
        names = [(await client.responses.create(model="assistant", input="x")).id for _ in range(4)]
        assert (await client.responses.retrieve(names[3])).id == names[3]
        assert (await refusal(client.responses.retrieve(names[0])))[0] == 404


async def test_nothing_is_kept_where_that_is_switched_off() -> None:
    async with responses_gateway(responses={"enabled": False}) as (stack,), client_of(stack) as client:
        first = await client.responses.create(model="assistant", input="one")
        assert "store" not in (first.model_extra or {})
        assert (await refusal(client.responses.retrieve(first.id)))[0] == 404
        for more in ({"previous_response_id": first.id}, {"background": True}):
            status, _, message = await refusal(
                client.responses.create(model="assistant", input="x", **more)  # type: ignore[call-overload]
            )
            assert status == 400
            assert "responses.enabled is false" in message
    settings = {"by_default": False}
    async with responses_gateway(responses=settings) as (stack,), client_of(stack) as client:
        first = await client.responses.create(model="assistant", input="one")
        assert (await refusal(client.responses.retrieve(first.id)))[0] == 404
        first = await client.responses.create(model="assistant", input="one", store=True)
        assert (await client.responses.retrieve(first.id)).id == first.id


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_two_gateways_share_a_database(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'responses.db'}"
    if database == "postgresql":
        url = request.getfixturevalue("postgresql")
    async with (
        responses_gateway(2, responses={"store": url}) as (one, other),
        client_of(one) as here,
        client_of(other) as there,
    ):
        previous = None
        for number in range(6):
            client = (here, there)[number % 2]
            done = await client.responses.create(
                model="assistant", input=f"turn {number}", previous_response_id=previous
            )
            assert f"{1 + 2 * number} items" in done.output_text
            previous = done.id
        one.engines["int8"].held = asyncio.Event()
        running = await here.responses.create(model="summarizer", input="long", background=True)
        await eventually(lambda: one.engines["int8"].running == 1)
        assert (await there.responses.retrieve(running.id)).status in ("queued", "in_progress")
        cancelled = await there.responses.cancel(running.id)
        assert cancelled.status == "cancelled"
        await eventually(lambda: one.engines["int8"].aborted == 1)
        assert (await here.responses.retrieve(running.id)).status == "cancelled"


async def test_a_database_that_is_down_stops_nobody_who_does_not_need_it() -> None:
    settings = {"store": "postgresql+psycopg://me:hunter2@127.0.0.1:1/none"}
    async with responses_gateway(responses=settings) as (stack,), client_of(stack) as client:
        await eventually(lambda: not stack.gateway.responses.usable)
        first = await client.responses.create(model="assistant", input="one")
        assert (first.model_extra or {})["store"] is False
        assert stack.sample("tiercel_responses_dropped_total", reason="store_down") == 1
        for call in (
            client.responses.create(model="assistant", input="x", previous_response_id=first.id),
            client.responses.create(model="assistant", input="x", background=True),
            client.responses.retrieve(first.id),
            client.responses.delete(first.id),
            client.responses.input_items.list(first.id),
        ):
            status, code, message = await refusal(call)
            assert (status, code) == (503, "store_down")
            assert "127.0.0.1" not in message
        async with stack.http.get(f"{stack.url}/v1/responses/{first.id}") as response:
            assert (response.status, response.headers["retry-after"]) == (503, "1")
        async with stack.http.get(stack.url + "/health") as response:
            assert response.status == 200


async def test_a_database_that_comes_back_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("in the way")
    settings = {"store": f"sqlite:///{tmp_path / 'place' / 'responses.db'}"}
    async with responses_gateway(responses=settings) as (stack,), client_of(stack) as client:
        await eventually(lambda: not stack.gateway.responses.usable)
        (tmp_path / "place").unlink()
        await eventually(lambda: stack.gateway.responses.usable)
        first = await client.responses.create(model="assistant", input="one")
        assert (await client.responses.retrieve(first.id)).id == first.id


def test_where_responses_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def url(**changes: Any) -> str:
        return store_url(make_config(run_dir=tmp_path, **changes))

    assert url() == "sqlite://", "memory: nothing of anybody's on a disk"
    assert url(gateway={"workers": 2}) == f"sqlite:///{tmp_path / 'responses.db'}"
    assert url(responses={"store": "sqlite:///x.db"}) == "sqlite:///x.db"
    monkeypatch.setenv("KEPT", "sqlite:///y.db")
    assert url(responses={"store_env": "KEPT"}) == "sqlite:///y.db"
    monkeypatch.delenv("KEPT")
    with pytest.raises(ConfigError, match=r"responses.store_env: the environment has no 'KEPT'"):
        url(responses={"store_env": "KEPT"})


async def poll(client: openai.AsyncOpenAI, name: str) -> Any:
    """A response in the background, once it is done."""
    found: list[Any] = []

    async def done() -> bool:
        found.append(await client.responses.retrieve(name))
        return found[-1].status not in ("queued", "in_progress")

    await eventually(done)
    return found[-1]


async def test_in_the_background(stack: Stack, client: openai.AsyncOpenAI) -> None:
    engine = stack.engines["int8"]
    first = await client.responses.create(model="summarizer", input="one")
    engine.held = asyncio.Event()
    queued = await client.responses.create(
        model="summarizer",
        input="two",
        background=True,
        previous_response_id=first.id,
        instructions="Be brief.",
        temperature=0.5,
    )
    assert (queued.status, queued.output, queued.background) == ("queued", [], True)
    assert (queued.previous_response_id, queued.temperature) == (first.id, 0.5)
    await eventually(lambda: engine.running == 1)
    assert (await client.responses.retrieve(queued.id)).status in ("queued", "in_progress")
    status, code, message = await refusal(
        client.responses.create(model="assistant", input="x", previous_response_id=queued.id)
    )
    assert (status, code) == (400, NOT_FOUND)
    assert "wait until it is done" in message
    engine.held.set()
    done = await poll(client, queued.id)
    assert (done.status, done.id, done.background) == ("completed", queued.id, True)
    assert done.output_text == "int8: 3 items, the last two"
    assert done.created_at == queued.created_at
    assert done.previous_response_id == first.id
    third = await client.responses.create(model="assistant", input="three", previous_response_id=queued.id)
    assert third.output_text.endswith("5 items, the last three")
    assert (await client.responses.cancel(queued.id)).status == "completed", "too late, and no error"
    status, _, message = await refusal(client.responses.cancel(first.id))
    assert (status, message) == (400, "Cannot cancel a synchronous response.")
    assert (
        stack.sample(
            "tiercel_requests_total", role="summarizer", requested="summarizer", variant="int8", outcome="200"
        )
        >= 2
    )


async def test_cancelled_and_deleted_work_stops_at_the_engine(
    stack: Stack, client: openai.AsyncOpenAI
) -> None:
    engine = stack.engines["int8"]
    engine.held = asyncio.Event()
    one, other = [
        await client.responses.create(model="summarizer", input="long", background=True) for _ in range(2)
    ]
    await eventually(lambda: engine.running == 2)
    cancelled = await client.responses.cancel(one.id)
    assert (cancelled.status, cancelled.id) == ("cancelled", one.id)
    await eventually(lambda: engine.aborted == 1)
    await client.responses.delete(other.id)
    await eventually(lambda: engine.aborted == 2)
    assert (await client.responses.retrieve(one.id)).status == "cancelled"
    assert (await client.responses.cancel(one.id)).status == "cancelled"
    assert (await refusal(client.responses.retrieve(other.id)))[0] == 404


async def test_work_in_the_background_that_fails_says_why(stack: Stack, client: openai.AsyncOpenAI) -> None:
    engine = stack.engines["int8"]
    engine.refuses = {"message": "too long", "type": "BadRequestError", "code": 400}
    queued = await client.responses.create(model="summarizer", input="x", background=True)
    failed = await poll(client, queued.id)
    assert failed.status == "failed"
    assert failed.error.message == "too long"
    engine.refuses, engine.breaks = None, True
    queued = await client.responses.create(model="summarizer", input="x", background=True)
    failed = await poll(client, queued.id)
    assert failed.status == "failed"
    assert "engine" in failed.error.message
    status, code, _ = await refusal(client.responses.create(model="nothing", input="x", background=True))
    assert (status, code) == (404, "model_not_found"), "at once"


async def test_work_in_the_background_is_bounded() -> None:
    async with responses_gateway(responses={"max_background": 1}) as (stack,), client_of(stack) as client:
        engine = stack.engines["int8"]
        engine.held = asyncio.Event()
        one = await client.responses.create(model="summarizer", input="x", background=True)
        status, code, _ = await refusal(
            client.responses.create(model="summarizer", input="x", background=True)
        )
        assert (status, code) == (429, "too_many_in_background")
        await client.responses.cancel(one.id)
        engine.held = None
        again = await client.responses.create(model="summarizer", input="x", background=True)
        assert (await poll(client, again.id)).status == "completed"


async def test_a_gateway_that_stops_or_dies_leaves_failed_work(tmp_path: Path) -> None:
    settings = {"store": f"sqlite:///{tmp_path / 'responses.db'}"}
    async with responses_gateway(responses=settings) as (stack,), client_of(stack) as client:
        stack.engines["int8"].held = asyncio.Event()
        stopped = await client.responses.create(model="summarizer", input="x", background=True)
        await eventually(lambda: stack.engines["int8"].running == 1)
    async with responses_gateway(responses=settings) as (stack,), client_of(stack) as client:
        found = await client.responses.retrieve(stopped.id)
        assert found.status == "failed"
        assert found.error
        assert "shutting down" in found.error.message
        stack.engines["int8"].held = asyncio.Event()
        dead = await client.responses.create(model="summarizer", input="x", background=True)
        await eventually(lambda: stack.engines["int8"].running == 1)
        responses = stack.gateway.responses
        store = responses._store
        assert store
        real = store._clock
        store._clock = lambda: real() + SILENT_S + 1
        found = await client.responses.retrieve(dead.id)
        assert found.status == "failed"
        assert found.error
        assert "has stopped" in found.error.message
