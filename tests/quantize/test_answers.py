"""The reference answers once; what it answered is what variants are compared with, token by token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.card import RoleEvaluation
from quantize.core.checkpoint import CheckpointError
from quantize.evaluate.answers import (
    Answer,
    Asking,
    answer_all,
    answers_path,
    fitting,
    items_of,
    read_answers,
)
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.conversations import Conversation
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import Measurement, for_all_roles, measure, reference_path
from quantize.evaluate.pairing import compare, count_items
from quantize.evaluate.tasks import BEGINNING, Item, by_first_role
from tests.quantize.scripted_engine import ScriptedEngine

COUNT = 40


def asked(number: int, **more: Any) -> Conversation:
    messages = [{"role": "user", "content": f"question {number} of many"}]
    return Conversation.model_validate(
        {"id": f"some-{number:02}", "domain": "some", "messages": messages, **more}
    )


CONVERSATIONS = [asked(number) for number in range(COUNT)]


def answer(text: str) -> str:
    return f"{text.split()[1]} is the number of this one"


async def answered(engine: ScriptedEngine, path: Path, asking: Asking) -> dict[str, Answer]:
    async with engine.serve() as url, EngineClient(url, "assistant") as client:
        return await answer_all(client, CONVERSATIONS, asking, Journal(path))


async def test_answers_are_kept_with_their_tokens_and_asked_once(tmp_path: Path) -> None:
    engine = ScriptedEngine(answer)
    found = await answered(engine, tmp_path / "answers", Asking(16, {"enable_thinking": False}))
    assert len(found) == len(engine.asked) == COUNT
    assert engine.templates == [{"enable_thinking": False}] * COUNT
    seven = found["some-07"]
    assert seven.text == "7 is the number of this one"
    assert seven.whole
    assert len(seven.tokens) == len(seven.text) + 1, "the one that ends the answer included"
    again = ScriptedEngine(answer)
    assert await answered(again, tmp_path / "answers", Asking(16)) == found
    assert again.asked == []


async def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, dying = tmp_path / "answers", ScriptedEngine(answer)
    dying.fail_after = 33
    with pytest.raises(ExceptionGroup) as raised:
        await answered(dying, path, Asking(16))
    assert raised.group_contains(EngineError)
    before = len(read_answers(Journal(path)))
    assert 0 < before <= 33
    engine = ScriptedEngine(answer)
    assert len(await answered(engine, path, Asking(16))) == COUNT
    assert len(engine.asked) == COUNT - before


def test_answers_belong_to_what_was_asked_of_what_on_what(tmp_path: Path) -> None:
    engine = {"engine": "vllm 1", "cpu": "some"}
    path = answers_path(tmp_path, "0" * 12, Asking(16), CONVERSATIONS, engine)
    assert path == answers_path(tmp_path, "0" * 12, Asking(16), CONVERSATIONS, engine)
    others = {
        answers_path(tmp_path, "1" * 12, Asking(16), CONVERSATIONS, engine),
        answers_path(tmp_path, "0" * 12, Asking(17), CONVERSATIONS, engine),
        answers_path(tmp_path, "0" * 12, Asking(16, {"enable_thinking": False}), CONVERSATIONS, engine),
        answers_path(tmp_path, "0" * 12, Asking(16), CONVERSATIONS[1:], engine),
        answers_path(tmp_path, "0" * 12, Asking(16), CONVERSATIONS, {**engine, "engine": "vllm 2"}),
        path,
    }
    assert len(others) == 6


def encoder(takes: Callable[[list[str]], bool]) -> Callable[[Any], list[int]]:
    """A chat template that refuses some orders of roles; a token per character."""

    def encode(messages: Any) -> list[int]:
        if not takes([message["role"] for message in messages]):
            raise CheckpointError("the template raised")
        return [0] * sum(len(message["content"]) for message in messages)

    return encode


def test_what_the_model_does_not_take_is_left_out() -> None:
    system = {"role": "system", "content": "Be brief."}
    ruled = asked(50).model_copy(update={"messages": (system, *asked(50).messages)})
    long = asked(51).model_copy(update={"messages": ({"role": "user", "content": "x" * 300},)})
    everything = encoder(lambda roles: True)
    assert [one.id for one in fitting([asked(1), ruled, long], everything, 216, Asking(16))] == [
        "some-01",
        "some-50",
    ]
    no_system = encoder(lambda roles: "system" not in roles)
    kept = fitting([asked(1), ruled], no_system, 216, Asking(16))
    assert kept[1].messages == ({"role": "user", "content": "Be brief.\n\nquestion 50 of many"},)
    nothing = encoder(lambda roles: False)
    assert fitting([asked(1)], nothing, 216, Asking(16)) == []
    structured = asked(2, json_schema={"type": "object"})
    assert [one.id for one in fitting([asked(1), structured], everything, 60, Asking(16))] == ["some-01"]


def test_an_item_asks_for_no_more_than_is_compared() -> None:
    text = "a long answer, of which the beginning alone is compared with others"
    answers = {
        "some-01": Answer(text, tuple(range(len(text))), True),
        "some-02": Answer('{"a": 1}', (1, 2, 3), True),
        "some-03": Answer("", (0,), True),
        "some-04": Answer("", (), True),
    }
    structured = asked(2, json_schema={"type": "object"})
    items = items_of([asked(1), structured, asked(3), asked(4), asked(5)], answers, Asking(64))
    assert [item.expected for item in items] == [text, '{"a": 1}', ""], "not what nobody has answered"
    assert [item.max_tokens for item in items] == [BEGINNING + 8, 3 * 64, 9]
    assert items[0].is_right(text[:BEGINNING] + " and then another")
    assert not items[0].is_right("A" + text[1:])
    assert not items[2].is_right("something"), "where the reference says nothing"
    counted = count_items(items)
    assert (counted.task, counted.structured, counted.evidence) == (3, 1, "reference")
    assert count_items([*items, Item(messages=asked(1).messages, expected="x")]).evidence == "labels"


async def measured(
    engine: ScriptedEngine, items: dict[str, list[Item]], path: Path, reference: Path | None, **more: bool
) -> Measurement:
    behind = reference_path(Journal(reference)) if reference else None
    async with engine.serve() as url, EngineClient(url, "assistant") as client:
        return await measure(client, items, {}, path.name, Journal(path), reference=behind, **more)


async def evaluated(
    tmp_path: Path, variant: ScriptedEngine, second: Callable[[str], str] = answer
) -> dict[str, RoleEvaluation]:
    """Two roles that are asked the same, and the reference's second pass."""
    asking = Asking(40)
    answers = await answered(ScriptedEngine(answer), tmp_path / "answers", asking)
    items = items_of(CONVERSATIONS, answers, asking)
    tasks = {"default": items, "core": list(items)}
    assert by_first_role(tasks) == {"default": "default", "core": "default"}
    reference = ScriptedEngine(answer)
    own = await measured(reference, tasks, tmp_path / "own", None)
    assert reference.asked == [], "its first pass is what it has answered"
    assert reference.scored == COUNT
    again = await measured(
        ScriptedEngine(second), tasks, tmp_path / "again", tmp_path / "own", backwards=True
    )
    found = await measured(variant, tasks, tmp_path / "found", tmp_path / "own")
    assert len(variant.asked) == COUNT, "once for both roles"
    own, again, found = (for_all_roles(one, tasks) for one in (own, again, found))
    evaluation = compare(own, found, tasks, again)
    assert evaluation.text.sequences == COUNT, "and counted once in all"
    return evaluation.roles


async def test_answers_that_change_are_counted_beyond_those_that_change_by_themselves(tmp_path: Path) -> None:
    def other(text: str) -> str:
        return answer(text) if int(text.split()[1]) % 4 else "something else"

    def unsure(text: str) -> str:
        return answer(text) if int(text.split()[1]) % 8 else "a whim"

    roles = await evaluated(tmp_path, ScriptedEngine(other, shift=0.3), unsure)
    assert roles["default"] == roles["core"]
    role = roles["default"]
    assert role.evidence == "reference"
    assert (role.items, role.correct, role.reference_correct) == (40, 30, 35)
    assert (role.flips_to_wrong, role.flips_to_right) == (5, 0)
    assert role.text.other_choices is not None
    assert 0 < role.text.other_choices < 1
    assert role.text.other_choices_se > 0
    # The scored tokens are those that were written, the end of the answer included.
    assert role.text.tokens == sum(len(answer(f"question {n} of many")) + 1 for n in range(COUNT))


async def test_the_reference_itself_changes_nothing(tmp_path: Path) -> None:
    role = (await evaluated(tmp_path, ScriptedEngine(answer)))["core"]
    assert (role.items, role.correct, role.reference_correct, role.flips_to_wrong) == (40, 40, 40, 0)
    assert (role.text.other_choices, role.text.other_choices_se) == (0, 0)
    assert role.text.kl_mean == pytest.approx(0, abs=1e-9)


async def test_a_connection_that_the_engine_closed_meanwhile_is_not_asked_again() -> None:
    """The loop computes for longer than an idle connection is kept, and then asks."""
    asked = 0

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        asked += 1
        told = b'{"tokens": [1, 2]}'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(told) + told)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read(1)
        writer.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        begun = asyncio.run_coroutine_threadsafe(asyncio.start_server(engine, "127.0.0.1", 0), loop)
        server = await asyncio.wrap_future(begun)
        port = server.sockets[0].getsockname()[1]
        async with EngineClient(f"http://127.0.0.1:{port}", "demo") as client:
            for number in range(3):
                messages = [{"role": "user", "content": "x" * 400_000}]
                assert await client.tokenize(messages) == [1, 2], number
                time.sleep(0.5)  # noqa: ASYNC251 - what computes in the loop
        assert asked == 3
        loop.call_soon_threadsafe(server.close)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
