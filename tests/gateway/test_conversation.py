"""What of a conversation goes to an engine and to a client, and what passes while it is made."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError
from gateway.responses import conversation
from gateway.responses.reader import ResponseObjects
from gateway.responses.store import Stored
from gateway.upstream.readers import NamedStreamReader


def stored(name: str, given: Any, output: list[Any]) -> Stored:
    items = conversation.own_input(json.dumps(given).encode())
    response = json.dumps({"id": name, "output": output}).encode()
    return Stored("", name, "completed", items, response)


MESSAGE = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": 'said "logprobs"', "annotations": [], "logprobs": [1, 2]}],
}


def test_turns_come_in_order_and_keep_what_an_engine_takes_back() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": []}
    call = {"type": "custom_tool_call", "id": "c", "call_id": "c1", "name": "f", "input": "x"}
    search = {"type": "web_search_call", "id": "ws_1"}
    chain = [
        stored("resp_1", "one", [reasoning, search, MESSAGE, call]),
        stored("resp_2", [{"a": 1}], []),
        stored("resp_3", [], []),
    ]
    whole = json.loads(conversation.conversation(chain, b'[{"new": 1} ]'))
    bare = {**MESSAGE, "content": [{"type": "output_text", "text": 'said "logprobs"', "annotations": []}]}
    one = {"type": "message", "role": "user", "content": "one"}
    assert whole == [one, reasoning, bare, call, {"a": 1}, {"new": 1}]


def test_items_are_shown_with_ids_and_parts() -> None:
    odd = [{"role": "developer", "content": "two"}, 7, {"type": "function_call_output", "output": "x"}]
    page = conversation.ItemPage("resp_2", 100)
    page.take([stored("resp_1", "one", [MESSAGE]), stored("resp_2", odd, [MESSAGE])])
    shown = [json.loads(bytes(memoryview(item))) for item in page.items]
    assert [item["id"] for item in shown] == ["msg_1_0", "msg_1", "msg_2_0", "item_2_1", "fco_2_2"]
    assert shown[0]["content"] == [{"type": "input_text", "text": "one"}]
    assert shown[2]["content"] == [{"type": "input_text", "text": "two"}]
    assert shown[4]["status"] == "completed"


@pytest.mark.parametrize(
    ("raw", "count"), [(b' "x" ', 1), (b" [ 1, {} ] ", 2), (b"7", 0), (b"", 0), (b"[]", 0)]
)
def test_input_is_a_string_or_a_list(raw: bytes, count: int) -> None:
    assert len(json.loads(conversation.own_input(raw))) == count


@pytest.mark.parametrize(
    ("value", "meant"), [(True, True), ("false", False), (0, False), ("on", True), (None, None), (1.0, True)]
)
def test_flags_mean_what_they_mean_to_the_engine(value: Any, meant: bool | None) -> None:
    assert conversation.flag(value, "store") is meant


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(BadRequestError, match="store: is no boolean; send true or false"):
        conversation.flag([], "store")


class Followed:
    """An answer that is followed, with what was kept of it."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str, Any]] = []
        shown = {"previous_response_id": b'"resp_0"', "store": b"true"}
        self.objects = ResponseObjects(shown, self._keep)

    def _keep(self, name: str, status: str, response: bytes) -> None:
        self.kept.append((name, status, json.loads(response)))


def an_object(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "previous_response_id": None, **more}


def event(kind: str, crlf: bool = False, spaces: bool = False, **fields: Any) -> bytes:
    separators = (", ", ": ") if spaces else (",", ":")
    line = "\r\n" if crlf else "\n"
    data = json.dumps({"type": kind, **fields}, separators=separators)
    return f"event: {kind}{line}data: {data}{line}{line}".encode()


def test_an_answer_that_is_not_streamed() -> None:
    followed = Followed()
    said = json.dumps(an_object("incomplete", output=[1, {"id": "x"}])).encode()
    shown = json.loads(followed.objects.whole(said))
    assert shown == an_object("incomplete", output=[1, {"id": "x"}], store=True) | {
        "previous_response_id": "resp_0"
    }
    assert followed.kept == [("resp_1", "incomplete", shown)]


@pytest.mark.parametrize(
    "said", [b"{}", b"[]", b"nonsense", b'{"id":7,"object":"response"}', b'{"object":"response"}']
)
def test_what_is_no_response_passes_and_is_not_kept(said: bytes) -> None:
    followed = Followed()
    assert followed.objects.whole(said) == said
    assert followed.kept == []


def test_an_id_that_no_store_takes_is_made_anew() -> None:
    followed = Followed()
    created = event("response.created", response=an_object("in_progress") | {"id": "a/b"})
    done = event("response.completed", response=an_object("completed") | {"id": "a/b"})
    shown = [
        json.loads(followed.objects.events(one).split(b"data: ")[1])["response"]["id"]
        for one in (created, done)
    ]
    assert shown[0] == shown[1] == followed.kept[0][0]
    assert conversation.is_id(shown[0])
    assert shown[0].startswith("resp_")


def test_lines_may_end_as_in_http() -> None:
    followed = Followed()
    created = event("response.created", response=an_object("in_progress"), crlf=True)
    delta = event("response.output_text.delta", delta="x", crlf=True)
    done = event("response.completed", response=an_object("completed"), crlf=True)
    out = followed.objects.events(created + delta + done)
    assert delta in out
    assert out.count(b'"previous_response_id":"resp_0"') == 2
    assert len(followed.kept) == 1


@given(
    cuts=st.lists(st.integers(0, 1500), max_size=6),
    spaces=st.booleans(),
    text=st.sampled_from(["x", 'response.completed" \\n\n', '{"response":{}}', "é\u2028"]),
)
def test_streams_may_be_cut_anywhere(cuts: list[int], spaces: bool, text: str) -> None:
    style = {"spaces": spaces}
    delta = event("response.output_text.delta", delta=text, **style)
    quoting = event("response.output_text.done", text=text, response={}, **style)
    final = an_object("completed", output=[{"type": "message", "content": text}])
    whole = b"".join(
        (
            event("response.created", response=an_object("in_progress"), **style),
            b": keep-alive\n\n",
            delta,
            quoting,
            event("response.completed", response=final, sequence_number=4, **style),
        )
    )
    followed = Followed()
    reader = followed.objects.around(NamedStreamReader(), stream=True)
    ends = sorted({min(cut, len(whole)) for cut in cuts} | {len(whole)})
    out, start = b"", 0
    for end in ends:
        out += reader.feed(whole[start:end], 0.0)
        start = end
    assert reader.done
    assert delta in out
    assert quoting in out
    assert b": keep-alive\n\n" in out
    shown = [
        msgspec.json.decode(line[6:])
        for line in out.split(b"\n")
        if (line.startswith(b"data: ") and b'"in_progress"' in line) or b"sequence_number" in line
    ]
    assert [one["response"]["previous_response_id"] for one in shown] == ["resp_0", "resp_0"]
    assert shown[1]["sequence_number"] == 4
    assert [(name, status) for name, status, _ in followed.kept] == [("resp_1", "completed")]
    assert followed.kept[0][2]["output"] == final["output"]
