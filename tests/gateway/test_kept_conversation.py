"""What of a request and an answer is kept, and what cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.kept.conversation import Asked, answer_of, asked_of, read_asked
from gateway.kept.redact import Redactor
from gateway.quality.records import Kept, Unfit, decode_answer
from gateway.quality.transcript import Transcript

PLAIN = Redactor()
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


def kept(request: dict[str, Any]) -> Asked | Unfit:
    found = asked_of(request, PLAIN)
    return read_asked(found.data) if isinstance(found, Kept) else found


def guided(kind: str, **more: Any) -> dict[str, Any]:
    return {**ASKED, "response_format": {"type": kind, **more}}


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (ASKED | {"user": "bob", "metadata": {"a": 1}, "cache_salt": "s"}, Asked(ASKED["messages"])),
        (ASKED | {"max_tokens": 5, "max_completion_tokens": 7}, Asked(ASKED["messages"], max_tokens=7)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]},
            Asked([{"role": "user", "content": "ab"}]),
        ),
        (guided("text"), Asked(ASKED["messages"])),
        (
            guided("json_schema", json_schema={"name": "x", "schema": {"type": "object"}}),
            Asked(ASKED["messages"], {"type": "object"}),
        ),
        (guided("json_object"), Unfit.FORM),
        (ASKED | {"guided_regex": "a+"}, Unfit.FORM),
        (ASKED | {"tools": [{"type": "function"}]}, Unfit.FORM),
        ({"prompt": "hello"}, Unfit.FORM),
        ({"messages": []}, Unfit.FORM),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, Unfit.FORM),
        ({"messages": [{"role": "tool", "content": "x"}, *ASKED["messages"]]}, Unfit.FORM),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, Unfit.FORM),
        ({"messages": [{"role": "user", "content": None}]}, Unfit.FORM),
        ({"messages": "hello"}, Unfit.FORM),
    ],
)
def test_a_request_is_kept_as_an_item_holds_it_or_not_at_all(
    request_: dict[str, Any], asked: Asked | Unfit
) -> None:
    assert kept(request_) == asked


@given(st.sampled_from(["content", "schema", "template"]), st.text(" ab1,.", max_size=10))
def test_nothing_that_is_redacted_is_in_what_is_kept(where: str, beside: str) -> None:
    text = f"{beside} bob@example.com +49 170 1234567 {beside}"
    request = {
        "messages": [{"role": "system", "content": text}, {"role": "user", "content": text}],
        "chat_template_kwargs": {text: [text]},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"description": text}}},
    }
    found = asked_of(request, PLAIN)
    assert isinstance(found, Kept)
    assert b"example" not in found.data
    assert b"1234567" not in found.data
    assert "example" not in repr(found) + repr(read_asked(found.data))


def transcript(text: str, calls: list[tuple[str, str]] | None = None) -> Transcript:
    tokens = [{"token": word, "logprob": -0.5} for word in text.split()]
    made = [{"function": {"name": name, "arguments": said}} for name, said in calls or ()]
    message = {"content": text, "tool_calls": made}
    event = {"choices": [{"index": 0, "message": message, "logprobs": {"content": tokens}}]}
    return Transcript.of([json.dumps(event).encode()])


def test_an_answer_is_kept_as_it_was_and_comes_back_the_same() -> None:
    request = ASKED | {"user": "bob", "temperature": 0, "tools": [{"type": "function"}], "stream": True}
    answer = transcript("it is well", [("look", '{"order": 7}')])
    found = answer_of(request, answer, PLAIN)
    assert isinstance(found, Kept)
    record = decode_answer(found.data)
    assert json.loads(record.body) == {name: request[name] for name in ("messages", "temperature", "tools")}
    again = Transcript.of(record.events)
    assert (again.texts, again.tokens, again.message) == (answer.texts, answer.tokens, answer.message)


@pytest.mark.parametrize(
    ("request_", "answer", "why"),
    [
        (ASKED, transcript("write to bob@example.com"), Unfit.REDACTED),
        (ASKED, transcript("done", [("mail", '{"to": "bob@example.com"}')]), Unfit.REDACTED),
        (
            {"messages": [{"role": "user", "content": "I am bob@example.com"}]},
            transcript("hi"),
            Unfit.REDACTED,
        ),
        (ASKED, Transcript(), Unfit.FORM),
    ],
)
def test_an_answer_of_which_something_would_be_taken_out_is_not_kept(
    request_: dict[str, Any], answer: Transcript, why: Unfit
) -> None:
    assert answer_of(request_, answer, PLAIN) == why
