"""`/v1/responses` under clients that mean harm: no traceback, and nobody else's response."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from gateway_stack import Stack, eventually
from responses_engine import responses_gateway
from test_keys import bearer, key
from yarl import URL

from gateway.errors import UnauthenticatedError, UpstreamError
from gateway.responses import conversation
from gateway.responses.conversation import LARGEST_DECODED_BYTES, LARGEST_ECHOED_BYTES, MOST_ITEMS, ItemPage
from gateway.responses.reader import ResponseObjects
from gateway.responses.store import Stored
from gateway.upstream.readers import NamedStreamReader

PATH = "/v1/responses"
BACKGROUND = '"background": true'
ODD_IDS = (
    "%00", "%0a", "resp_%0d%0ax", "..%2f..%2fetc", "%ff%fe", "%ed%a0%80", "resp_" + "a" * 5000, "%25s", "'--",
    "resp_%F0%9F%92%A9", ".", "%20", "a" * 129,
)  # fmt: skip
DEEP = "[" * 5000 + "]" * 5000
INPUTS = (
    '[{"type": {}, "role": "user", "content": "x"}]', '[{"type": "message", "id": {"a": 1}, "content": "x"}]',
    '[{"type": ["message"], "id": 7, "content": "x"}]', '[1, null, "x", [], {"content": 1e400}]',
    r'[{"role": "user", "content": "\ud800"}]', '[{"role": "user", "content": ' + DEEP + "}]",
    '{"a": 1}', "7",
    '[{"role": "user", "content": 1' + "0" * 400 + "}]",
)  # fmt: skip
FIELDS = (
    '"max_output_tokens": 100000000000000000000000000', r'"user": "\udfff"', '"temperature": 1e400',
    '"metadata": {"a": "\\ud800"}', '"tools": ' + DEEP, '"text": 1e-400', '"instructions": null',
    '"top_p": -0.0, "top_p": 3', '"request_id": "resp_\\u0000"', '"request_id": "../../x"',
)  # fmt: skip


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with responses_gateway(keys=[key("any", tenant="a"), key("other", tenant="b")]) as (running,):
        yield running


async def ask(stack: Stack, method: str, path: str, body: str | None = None, who: str = "any") -> Any:
    """Status and body of an answer, which is JSON whatever was asked."""
    headers = {**bearer(who), "content-type": "application/json"}
    url = stack.url + path
    async with stack.http.request(method, URL(url, encoded=True), data=body, headers=headers) as response:
        return response.status, json.loads(await response.read())


def after(name: str) -> str:
    return f'"previous_response_id": "{name}"'


def asking(*fields: str, given: str = '"x"') -> str:
    """A request, whose fields are JSON already."""
    return "{" + ", ".join(('"model": "assistant"', f'"input": {given}', *fields)) + "}"


async def made(stack: Stack, *fields: str, who: str = "any", given: str = '"x"') -> str:
    status, answer = await ask(stack, "POST", PATH, asking(*fields, given=given), who)
    assert status == 200, answer
    return str(answer["id"])


@pytest.mark.parametrize("name", ODD_IDS)
async def test_odd_ids_are_of_no_response(stack: Stack, name: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        status, answer = await ask(stack, method, f"{PATH}/{name}{path}")
        assert status in (404, 405), answer
        assert answer["error"]["message"]
    body = {"model": "assistant", "input": "x", "previous_response_id": name}
    status, answer = await ask(stack, "POST", PATH, json.dumps(body))
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_nobody_reaches_what_another_tenant_has_kept(stack: Stack) -> None:
    theirs = await made(stack, who="other")
    running = await made(stack, BACKGROUND, who="other")
    for name in (theirs, running):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
            assert (await ask(stack, method, f"{PATH}/{name}{path}"))[0] == 404
        for more in ("", "/input_tokens", "/compact"):
            body = {"model": "assistant", "input": "x", "previous_response_id": name}
            assert (await ask(stack, "POST", PATH + more, json.dumps(body)))[0] == 400
    taken = await made(stack, f'"request_id": "{theirs}"')
    assert taken == theirs, "the same name, and another's all the same"
    assert (await ask(stack, "DELETE", f"{PATH}/{taken}"))[0] == 200
    assert (await ask(stack, "GET", f"{PATH}/{theirs}", who="other"))[0] == 200


async def test_what_is_done_twice_is_done_once(stack: Stack) -> None:
    name = await made(stack)
    found = await asyncio.gather(*(ask(stack, "DELETE", f"{PATH}/{name}") for _ in range(8)))
    assert sorted(status for status, _ in found) == [200, *[404] * 7]
    for variant in stack.engines.values():
        variant.held = asyncio.Event()
    name = await made(stack, BACKGROUND)
    found = await asyncio.gather(*(ask(stack, "POST", f"{PATH}/{name}/cancel") for _ in range(8)))
    assert {(status, answer["status"]) for status, answer in found} == {(200, "cancelled")}
    assert (await ask(stack, "POST", f"{PATH}/{name}/cancel"))[1]["status"] == "cancelled"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("given", INPUTS)
async def test_any_input_is_answered_and_shown(stack: Stack, given: str, background: bool) -> None:
    more = (BACKGROUND,) if background else ()
    status, answer = await ask(stack, "POST", PATH, asking(*more, given=given))
    assert status in (200, 400, 502), answer
    if status != 200:
        return
    for path in ("", "/input_items", "/input_items?order=asc&limit=1", "/input_items?after=x"):
        status, shown = await ask(stack, "GET", f"{PATH}/{answer['id']}{path}")
        assert status in (200, 400, 404), (path, shown)  # not kept: what no reader of JSON takes
    assert (await ask(stack, "POST", PATH, asking(after(answer["id"]))))[0] in (200, 400, 502)


@pytest.mark.parametrize("field", FIELDS)
async def test_any_field_is_answered_in_the_background(stack: Stack, field: str) -> None:
    status, answer = await ask(stack, "POST", PATH, asking(BACKGROUND, field))
    assert status in (200, 400), answer
    if status == 200:
        assert (await ask(stack, "GET", f"{PATH}/{answer['id']}"))[0] == 200


async def test_what_python_alone_reads_is_kept_no_less(stack: Stack) -> None:
    """NaN is in no standard: a request with one is still not the engine's to keep, or to look up."""
    first = await made(stack)
    body = asking('"seed": NaN', after(first))
    status, answer = await ask(stack, "POST", PATH, body)
    assert (status, answer["previous_response_id"]) == (200, first)
    sent = [body for variant in stack.engines for body in stack.asked(variant)]
    assert len(sent) == 2
    assert not any(body["store"] or body.get("previous_response_id") for body in sent)
    assert (await ask(stack, "GET", f"{PATH}/{answer['id']}"))[0] == 200
    status, answer = await ask(stack, "POST", PATH, asking('"seed": NaN', BACKGROUND))
    assert (status, answer["error"]["param"]) == (400, "background")


LONG = json.dumps("x" * 100_000)
"""Of which only the first level is read, where it is in a body that is nearly nothing else."""


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (LONG, '"temperature": NaN'),
        ('[{"role": "user", "content": ' + LONG + "}}", '"user": "x"'),
        ("[" + "[]," * 100_000 + "NaN]", '"user": "x"'),
    ],
)
async def test_what_cannot_be_kept_of_a_large_request_takes_nobodys_place(given: str, field: str) -> None:
    async with responses_gateway(responses={"max_background": 2}) as (stack,):
        for _ in range(3):
            status, answer = await ask(stack, "POST", PATH, asking(BACKGROUND, field, given=given))
            assert (status, answer["error"]["param"]) == (400, "background"), answer
            assert "no NaN" in answer["error"]["message"]
        background = stack.gateway._background
        assert not background._count
        assert not background._running
        name = await made(stack, BACKGROUND)
        assert (await ask(stack, "GET", f"{PATH}/{name}"))[0] == 200
        store = stack.gateway.responses._store
        assert store is not None
        assert store.usage()[0] == 1, "nothing is left of the others"


async def test_a_large_request_is_put_together_elsewhere(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    real = conversation.with_fields

    def with_fields(raw: bytes, changes: Mapping[str, bytes]) -> bytes:
        if "background" in changes:
            threads.append(threading.current_thread())
        return real(raw, changes)

    monkeypatch.setattr(conversation, "with_fields", with_fields)
    await made(stack, BACKGROUND)
    await made(stack, BACKGROUND, given=json.dumps("x" * 300_000))
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, False]


async def test_what_is_too_large_to_be_kept_is_not_begun_in_the_background() -> None:
    async with responses_gateway(responses={"max_tenant_bytes": 4096}) as (stack,):
        status, answer = await ask(stack, "POST", PATH, asking(BACKGROUND, given=json.dumps("x" * 5000)))
        assert status == 413
        assert "responses.max_tenant_bytes allows 4096" in answer["error"]["message"]
        assert not stack.gateway._background._count
        assert not any(stack.asked(engine) for engine in stack.engines)
        name = await made(stack, BACKGROUND, given=json.dumps("x" * 2500))

        async def failed() -> bool:
            answer = (await ask(stack, "GET", f"{PATH}/{name}"))[1]
            return bool(
                answer["status"] == "failed" and "max_tenant_bytes allows 4096" in answer["error"]["message"]
            )

        await eventually(failed)  # the engine's answer repeats the input
        assert stack.sample("tiercel_responses_dropped_total", reason="too_large") == 1


@pytest.mark.parametrize(("how", "room"), [("background", 150_000), ("conversation", 350_000)])
async def test_what_is_held_for_a_request_takes_room_of_its_owner(how: str, room: int) -> None:
    """A conversation has the answer as well, which repeats what was said."""
    limits = {"max_buffered_bytes_per_tenant": room}
    async with responses_gateway(gateway=limits, keys=[key("any", tenant="a"), key("other", tenant="b")]) as (
        stack,
    ):
        intake, large = stack.gateway.plane.intake, json.dumps("x" * 100_000)
        body = asking(BACKGROUND, given=large)
        if how == "conversation":
            body = asking(after(await made(stack, given=large)))
        await eventually(lambda: intake.buffered == 0)
        held = asyncio.Event()
        for engine in stack.engines.values():
            engine.held = held
        first = asyncio.create_task(ask(stack, "POST", PATH, body))
        await eventually(lambda: sum(engine.running for engine in stack.engines.values()) == 1)
        await eventually(lambda: set(intake.by_tenant) == {"tenant:a"})
        assert intake.buffered > 100_000
        status, answer = await ask(stack, "POST", PATH, body)
        assert (status, answer["error"]["code"]) == (429, "tenant_overloaded"), answer
        held.set()
        assert (await first)[0] == 200
        await eventually(lambda: intake.buffered == 0)
        assert (await ask(stack, "POST", PATH, body))[0] == 200


async def test_work_that_cannot_begin_gives_its_place_back(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    background = stack.gateway._background

    def defect(*_: Any) -> None:
        raise ArithmeticError

    monkeypatch.setattr(background, "_serve", defect)
    name = await made(stack, BACKGROUND)

    async def failed() -> bool:
        return bool((await ask(stack, "GET", f"{PATH}/{name}"))[1]["status"] == "failed")

    await eventually(failed)
    assert not background._count
    assert not background._running


async def test_more_items_than_can_be_told_apart_are_not_kept(stack: Stack) -> None:
    many = "[" + "1," * MOST_ITEMS + '{"role": "user", "content": "x"}]'
    assert conversation.has_too_many_items(many.encode())
    assert not conversation.has_too_many_items(many.replace("1,", "", 1).encode())
    assert not conversation.has_too_many_items(b"[" + b"," * MOST_ITEMS + b"]")
    status, answer = await ask(stack, "POST", PATH, asking(BACKGROUND, given=many))
    assert (status, answer["error"]["param"]) == (400, "input")
    name = await made(stack, given=many)
    assert (await ask(stack, "GET", f"{PATH}/{name}"))[0] == 404
    assert stack.sample("tiercel_responses_dropped_total", reason="too_large") == 1


def test_what_is_large_is_not_echoed() -> None:
    """No more is made objects of than takes a moment."""
    fields = {
        "instructions": b"[" + b"[]," * LARGEST_ECHOED_BYTES + b"[]]",
        "metadata": b'{"a": "%b"}' % (b"x" * (LARGEST_ECHOED_BYTES - 100)),
        "temperature": b"0.5",
        "tools": b"[" + b"[]," * 100 + b"[]]",
        "user": rb'"\ud800"',
    }
    raw = conversation.unfinished(
        "resp_1", "queued", 7, lambda name: memoryview(fields.get(name, b"")), "assistant", None
    )
    shown = json.loads(raw)
    assert shown["instructions"] is None
    assert len(shown["metadata"]["a"]) > 100_000
    assert (shown["temperature"], shown["tools"], shown["user"]) == (0.5, [], None)
    assert shown["created_at"] == 7


def test_large_items_are_shown_as_they_came() -> None:
    pad = " " * LARGEST_DECODED_BYTES
    many = "[" + "[]," * LARGEST_DECODED_BYTES + "[]]"
    given = [
        f'{{"role": "user", "content": "x"{pad}}}',
        f'{{{pad}"role": "assistant", "id": null, "content": "y", "more": {many}}}',
        f'{{"type": "function_call_output", "id": "fco_own", "output": {many}, "status": "incomplete"}}',
        f'{{"type": ["a"], "id": {{"a": {many}}}}}',
        f'{{"type": "reasoning", "id": "{"i" * 2000}", "content": {many}}}',
        f"{{{pad}}}",
        many,
        f'{{"content": 1e400, "type": 1e400, "more": {many}}}',
    ]
    raw = "[" + ", ".join(given) + "]"
    page = ItemPage("resp_1", 100)
    assert not page.take([Stored("", "resp_1", "completed", raw.encode(), b"{}")])
    shown = [json.loads(bytes(memoryview(item))) for item in page.items]
    assert page.ids == [item["id"] for item in shown]
    assert page.ids == [
        *("msg_1_0", "msg_1_1", "fco_own", "item_1_3", "item_1_4", "msg_1_5", "item_1_6", "item_1_7"),
    ]
    kinds = ("message", "message", "function_call_output", "unknown", "reasoning", "message", "unknown")
    assert [item["type"] for item in shown] == [*kinds, "unknown"]
    assert shown[0]["content"] == [{"type": "input_text", "text": "x"}]
    assert shown[1]["content"] == [{"type": "output_text", "text": "y", "annotations": []}]
    assert (shown[1]["status"], shown[2]["status"]) == ("completed", "incomplete")
    assert len(shown[1]["more"]) == len(shown[6]["value"]) == LARGEST_DECODED_BYTES + 1
    after = ItemPage("resp_1", 1, "fco_own")
    assert after.take([Stored("", "resp_1", "completed", raw.encode(), b"{}")])
    assert after.ids == ["item_1_3"]


@pytest.mark.parametrize("status", ["in_progress", "queued", "a status that is longer than any", "\0", ""])
def test_an_answer_that_has_come_is_no_longer_under_way_whatever_its_engine_calls_it(status: str) -> None:
    kept: list[tuple[str, str]] = []
    objects = ResponseObjects({}, lambda name, status, _: kept.append((name, status)))
    said = {"id": "resp_1", "object": "response", "status": status}
    assert json.loads(objects.whole(json.dumps(said).encode())) == said
    assert kept == [("resp_1", "incomplete")]


def test_what_comes_in_one_piece_with_an_error_is_set_right() -> None:
    objects = ResponseObjects(
        {"previous_response_id": b'"resp_0"', "store": b"true"}, lambda *_: None, "ours"
    )
    reader = objects.around(NamedStreamReader(), stream=True)
    said = {"id": "resp_engine", "object": "response", "status": "in_progress", "store": False}
    created = json.dumps({"type": "response.created", "response": said})
    error = json.dumps({"type": "error", "code": 500, "message": "boom"})
    with pytest.raises(UpstreamError):
        reader.feed(
            f"event: response.created\ndata: {created}\n\nevent: error\ndata: {error}\n\n".encode(), 0
        )
    shown = json.loads(reader.flush().split(b"data: ")[1])["response"]
    assert shown == said | {"id": "ours", "previous_response_id": "resp_0", "store": True}
    assert reader.flush() == b""


async def test_thousands_of_responses_are_bounded_and_the_newest_found() -> None:
    async with responses_gateway(responses={"max_responses": 50}, keys=[key("any", tenant="a")]) as (stack,):
        store = stack.gateway.responses
        for _ in range(6):
            names = [await made(stack) for _ in range(50)]
            # What outruns a busy machine's database by 256 would not be kept, which is another test's.
            await eventually(lambda: not store._writes)
        assert (await ask(stack, "GET", f"{PATH}/{names[-1]}"))[0] == 200

        async def bounded() -> bool:
            kept = store._store
            return kept is not None and kept.usage()[0] <= 55

        await eventually(bounded)


async def test_clients_that_leave_at_once_leave_nothing_running(stack: Stack) -> None:
    for variant in stack.engines.values():
        variant.held = asyncio.Event()
    engines = list(stack.engines.values())
    for _ in range(10):
        body = {"model": "assistant", "input": "x", "stream": True}
        async with stack.http.post(stack.url + PATH, json=body, headers=bearer("any")) as response:
            assert response.status == 200
            await eventually(lambda: sum(engine.running for engine in engines) == 1)
            response.close()
        await eventually(lambda: not any(engine.running for engine in engines))
    assert stack.sample("tiercel_responses_stored_total") == 0


async def test_a_response_that_takes_anothers_place_makes_no_conversation_too_long() -> None:
    """A client names its responses (`request_id`), so each may be made larger once others go on from it."""
    limits = {"max_conversation_bytes": 8000}
    async with responses_gateway(responses=limits, keys=[key("any", tenant="a")]) as (stack,):
        names = ["resp_a", "resp_b", "resp_c"]
        before: tuple[str, ...] = ()
        for name in names:
            await made(stack, f'"request_id": "{name}"', *before)
            before = (after(name),)
        large = json.dumps("x" * 3000)
        for name, earlier in reversed(list(zip(names, [None, *names[:-1]], strict=True))):
            fields = [f'"request_id": "{name}"', *([after(earlier)] if earlier else [])]
            assert (await ask(stack, "POST", PATH, asking(*fields, given=large)))[0] == 200
        status, answer = await ask(stack, "POST", PATH, asking(after("resp_c")))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        sent = [body for engine in stack.engines.values() for body in engine.requests]
        assert max(len(json.dumps(body["input"])) for body in sent) < 8000


async def test_ids_that_name_each_other_come_to_an_end(stack: Stack) -> None:
    """A response that goes on from one that goes on from it, and one that goes on from itself."""
    await made(stack, '"request_id": "resp_a"')
    await made(stack, '"request_id": "resp_b"', after("resp_a"))
    await made(stack, '"request_id": "resp_a"', after("resp_b"))
    for name in ("resp_a", "resp_b"):
        status, answer = await ask(stack, "POST", PATH, asking(after(name)))
        assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
        assert (await ask(stack, "GET", f"{PATH}/{name}/input_items"))[0] == 200
    await made(stack, '"request_id": "resp_s"')
    await made(stack, '"request_id": "resp_s"', after("resp_s"))
    assert (await ask(stack, "POST", PATH, asking(after("resp_s"))))[0] == 400


async def test_a_conversation_has_an_end() -> None:
    async with responses_gateway(responses={"max_turns": 40}, keys=[key("any", tenant="a")]) as (stack,):
        name = await made(stack)
        for _ in range(39):
            name = await made(stack, after(name))
        status, answer = await ask(stack, "POST", PATH, asking(after(name)))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "responses.max_turns" in answer["error"]["message"]
        status, items = await ask(stack, "GET", f"{PATH}/{name}/input_items?limit=100&order=asc")
        assert (status, len(items["data"])) == (200, 79)


async def test_a_key_that_is_gone_meanwhile_leaves_no_response_under_way(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload may come between what is asked in the background and its beginning."""
    background = stack.gateway._background

    def serve(*_: Any) -> None:
        raise UnauthenticatedError("authorization: this key is not known; ask for one")

    monkeypatch.setattr(background, "_serve", serve)
    name = await made(stack, BACKGROUND)

    async def failed() -> bool:
        answer = (await ask(stack, "GET", f"{PATH}/{name}"))[1]
        return bool(answer["status"] == "failed" and "not known" in answer["error"]["message"])

    await eventually(failed)
    assert not background._running
    assert not background._count


async def test_streams_that_are_left_and_responses_that_are_cancelled_end_their_engines_work(
    stack: Stack,
) -> None:
    """Whoever asks for the end of another tenant's response changes nothing."""
    for engine in stack.engines.values():
        engine.held = asyncio.Event()  # type: ignore[attr-defined]
    engines = list(stack.engines.values())
    names = [await made(stack, BACKGROUND) for _ in range(4)]
    await eventually(lambda: sum(engine.running for engine in engines) == 4)
    for name in names:
        assert (await ask(stack, "POST", f"{PATH}/{name}/cancel", who="other"))[0] == 404
        assert (await ask(stack, "DELETE", f"{PATH}/{name}", who="other"))[0] == 404
    assert sum(engine.running for engine in engines) == 4
    await ask(stack, "POST", f"{PATH}/{names[0]}/cancel")
    await ask(stack, "DELETE", f"{PATH}/{names[1]}")
    await eventually(lambda: sum(engine.running for engine in engines) == 2)
    taken = f'"request_id": "{names[2]}"'
    for engine in stack.engines.values():
        engine.held.set()  # type: ignore[attr-defined]
    assert await made(stack, taken, who="other") == names[2]

    async def done(name: str, who: str) -> bool:
        return bool((await ask(stack, "GET", f"{PATH}/{name}", who=who))[1]["status"] == "completed")

    await eventually(lambda: done(names[2], "any"))
    assert await done(names[2], "other")
    assert (await ask(stack, "GET", f"{PATH}/{names[0]}"))[1]["status"] == "cancelled"
    assert (await ask(stack, "GET", f"{PATH}/{names[1]}"))[0] == 404
