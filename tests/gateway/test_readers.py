"""What passes by is read rightly in every spelling, and the client gets what it asked for and no more."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import UpstreamError, UpstreamRefusedError
from gateway.proxy.body import Body
from gateway.proxy.endpoints import Form
from gateway.proxy.record import NO_USAGE, Usage
from gateway.quality.transcript import Transcript
from gateway.upstream import completions, sse
from gateway.upstream.completions import StreamReader, TappedStreamReader
from gateway.upstream.options import OutputOptions
from gateway.upstream.readers import NamedStreamReader, TappedWholeReader, WholeReader, reader_for
from gateway.upstream.sse import EventSplitter, event_of
from gateway.upstream.usage import usage_of

PLAIN = OutputOptions(chat=True, stream=True)
WANTED = OutputOptions(chat=True, stream=True, include_usage=True)
EACH = OutputOptions(chat=True, stream=True, include_usage=True, continuous_usage=True)
DONE = b"data: [DONE]\n\n"
READERS = pytest.mark.parametrize("kind", [StreamReader, TappedStreamReader], ids=["passing", "tapped"])


class GrammarAlone(StreamReader):
    """Takes no shortcut."""

    _SHORTCUT = False


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        **details,
    }


def chunk(text: str, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more}


def last(**more: Any) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion.chunk", "model": "m", "choices": [], **more}


def compact(data: Any, end: str = "\n\n") -> bytes:
    return f"data: {json.dumps(data, separators=(',', ':'))}{end}".encode()


def spaced(data: Any) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def crlf(data: Any) -> bytes:
    return compact(data, "\r\n\r\n")


def turned(data: Any) -> bytes:
    """The usage first."""
    return compact(dict(reversed(list(data.items()))))


def indented(data: Any) -> bytes:
    lines = json.dumps(data, indent=1).splitlines()
    return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"


def got(*parts: bytes) -> list[Any]:
    """The events that a client reads; ``[DONE]`` as that word."""
    events = EventSplitter().feed(b"".join(parts))
    return ["[DONE]" if event.done else event.data for event in events if event.data or event.done]


SPELLINGS = pytest.mark.parametrize("write", [compact, spaced, crlf, turned, indented])


@READERS
@SPELLINGS
@pytest.mark.parametrize("options", [PLAIN, WANTED, EACH], ids=["no usage", "usage", "usage in each"])
def test_the_client_gets_what_it_asked_for(kind: type[StreamReader], write: Any, options: Any) -> None:
    says = [chunk("", usage=usage(5, 0)), chunk("a", usage=usage(5, 1)), chunk("b", usage=usage(5, 2))]
    ends = chunk("c", finish="stop", usage=usage(5, 3))
    total = last(usage=usage(5, 3, 4), system_fingerprint="fp", metrics={"itl": 1})
    reader = kind(options)
    wire = [*map(write, says), b": keep-alive\n\n", write(ends), write(total), DONE]
    events = got(*[reader.feed(part, 0.0) for part in wire])
    if options is EACH:
        assert events == [*says, ends, total, "[DONE]"]
    else:
        bare = [{k: v for k, v in one.items() if k != "usage"} for one in (*says, ends)]
        if options is WANTED:
            assert events == [*bare, total, "[DONE]"]
        else:  # as vLLM writes it for who asks for no usage: the fingerprint with the end of a choice
            assert events == [*bare[:-1], bare[-1] | {"system_fingerprint": "fp"}, "[DONE]"]
    assert reader.usage == Usage(5, 4, 3, exact=True)
    assert reader.done


@READERS
@SPELLINGS
@pytest.mark.parametrize("options", [PLAIN, WANTED, EACH], ids=["no usage", "usage", "usage in each"])
def test_a_usage_in_the_last_chunk_of_the_answer(kind: type[StreamReader], write: Any, options: Any) -> None:
    """Some providers write it there. The client gets it where OpenAI would have put it, if it asked."""
    wire = [chunk("a"), chunk("b", finish="stop", usage=usage(3, 2))]
    reader = kind(options)
    events = got(*[reader.feed(write(one), 0.0) for one in wire], reader.feed(DONE, 0.0))
    bare = [chunk("a"), chunk("b", finish="stop")]
    if options is PLAIN:
        assert events == [*bare, "[DONE]"]
    elif options is WANTED:
        assert events == [*bare, last(usage=usage(3, 2)), "[DONE]"]
    else:
        assert events == [*wire, last(usage=usage(3, 2)), "[DONE]"]
    assert reader.usage == Usage(3, 0, 2, exact=True)


@READERS
@pytest.mark.parametrize(
    "choices", [[], [{}], [{"index": 0, "delta": {}}], [{"index": 0, "delta": {}, "finish_reason": None}]]
)
@pytest.mark.parametrize("write", [compact, spaced])
def test_a_chunk_with_nothing_but_a_usage(kind: type[StreamReader], choices: Any, write: Any) -> None:
    total = {**last(usage=usage(3, 2)), "choices": choices}
    for options, seen in ((PLAIN, []), (WANTED, [total])):
        reader = kind(options)
        events = got(*[reader.feed(part, 0.0) for part in (write(chunk("a")), write(total), DONE)])
        assert events == [chunk("a"), *seen, "[DONE]"]
        assert reader.usage == Usage(3, 0, 2, exact=True)


@READERS
@pytest.mark.parametrize("options", [PLAIN, WANTED, EACH], ids=["no usage", "usage", "usage in each"])
def test_a_choice_that_says_nothing_has_the_usage_of_all(kind: type[StreamReader], options: Any) -> None:
    """Also after chunks with the usage of one choice each."""
    total = {**last(usage=usage(9, 4)), "choices": [{"index": 0, "delta": {}}]}
    reader = kind(options)
    for index in (0, 1):
        reader.feed(compact(chunk("a", index, usage=usage(9, 1))), 0.0)
        reader.feed(compact(chunk("b", index, "stop", usage=usage(9, 2))), 0.0)
    assert got(reader.feed(compact(total), 0.0))[-1:] == (
        [chunk("b", 1, "stop")] if options is PLAIN else [total]
    )
    assert reader.usage == Usage(9, 0, 4, exact=True)


@READERS
def test_a_usage_after_chunks_without_one_is_of_all_choices(kind: type[StreamReader]) -> None:
    body = Body(json.dumps({"model": "m", "prompt": ["a", "b"], "stream": True}).encode())
    reader = kind(OutputOptions.of(body.fields, chat=False, body=body))
    for index in (0, 1):
        reader.feed(compact(chunk("a", index)), 0.0)
    reader.feed(compact(chunk("b", 0, "stop")) + compact(chunk("b", 1, "stop", usage=usage(9, 4))), 0.0)
    assert reader.usage == Usage(9, 0, 4, exact=False)
    reader.feed(DONE, 0.0)
    assert reader.usage == Usage(9, 0, 4, exact=True)


@READERS
@pytest.mark.parametrize("options", [PLAIN, WANTED], ids=["no usage", "usage"])
def test_what_ends_within_a_read_changes_how_the_rest_of_it_is_read(
    kind: type[StreamReader], options: Any
) -> None:
    total = {**last(usage=usage(9, 4)), "choices": [{"index": 0, "delta": {}}]}
    reader = kind(options)
    reader.feed(compact(chunk("a", usage=usage(9, 1))) + compact(chunk("b", usage=usage(9, 2))), 0.0)
    out = reader.feed(compact(chunk("c", finish="stop", usage=usage(9, 4))) + compact(total), 0.0)
    assert (total in got(out)) is (options is WANTED)
    assert reader.usage == Usage(9, 0, 4, exact=True)


@READERS
def test_an_empty_usage_is_left_to_who_asked(kind: type[StreamReader]) -> None:
    """OpenAI writes ``"usage": null`` into every chunk but the last for who asks for the usage."""
    empty = chunk("a", usage=None)
    assert got(kind(WANTED).feed(spaced(empty), 0.0)) == [empty]
    assert got(kind(PLAIN).feed(spaced(empty), 0.0)) == [chunk("a")]


@READERS
def test_several_choices_are_added_up(kind: type[StreamReader]) -> None:
    """vLLM counts each choice for itself until the end."""
    reader = kind(PLAIN)
    for index, tokens in ((0, 0), (1, 0), (0, 100), (1, 70), (0, 101)):
        reader.feed(compact(chunk("a", index, usage=usage(9, tokens))), 0.0)
    assert reader.usage == Usage(9, 0, 171, exact=False)
    out = reader.feed(compact(chunk("z", 1, "stop", usage=usage(9, 71))), 0.0)
    out += reader.feed(compact(chunk("a", 0, usage=usage(9, 102))), 0.0)
    out += reader.feed(compact(chunk("z", 0, "stop", usage=usage(9, 103))), 0.0)
    out += reader.feed(compact(last(usage=usage(9, 174), system_fingerprint="f")) + DONE, 0.0)
    assert got(out) == [
        chunk("a", 0),
        chunk("z", 1, "stop", system_fingerprint="f"),
        chunk("z", 0, "stop", system_fingerprint="f"),
        "[DONE]",
    ]
    assert reader.usage == Usage(9, 0, 174, exact=True)


@READERS
def test_several_prompts_are_added_up(kind: type[StreamReader]) -> None:
    raw = json.dumps({"model": "m", "prompt": ["a", "b"], "n": 2, "stream": True}).encode()
    body = Body(raw)
    options = OutputOptions.of(body.fields, chat=False, body=body)
    assert (options.prompts, options.n) == (2, 2)
    reader = kind(options)
    for index in (0, 1):
        reader.feed(compact(chunk("x", index, usage=usage(10, 3))), 0.0)
    assert reader.usage == Usage(None, 0, 6, exact=False), "of the second prompt nothing is known yet"
    reader.feed(compact(chunk("x", 2, usage=usage(20, 1))), 0.0)
    assert reader.usage == Usage(30, 0, 7, exact=False)


def test_prompts_of_a_request() -> None:
    for prompt, prompts in (("a", 1), ([1, 2, 3], 1), (["a"], 1), (["a", "b"], 2), ([[1], [2, 3], [4]], 3)):
        body = Body(json.dumps({"model": "m", "stream": True, "prompt": prompt}).encode())
        assert OutputOptions.of(body.fields, chat=False, body=body).prompts == prompts


@READERS
def test_comments_are_nothing_of_an_answer(kind: type[StreamReader]) -> None:
    reader = kind(PLAIN)
    for comment in (b": keep-alive\n\n", b":\r\n\r\n", b"data:\n\n"):
        assert reader.feed(comment, 0.0) == comment
    assert (reader.began, reader.done, reader.usage) == (False, False, NO_USAGE)
    reader.feed(compact(chunk("")), 0.0)
    assert reader.began


@READERS
def test_what_is_held_back_is_not_lost(kind: type[StreamReader]) -> None:
    """An engine that dies between the end of a choice and the usage."""
    reader = kind(PLAIN)
    assert reader.feed(compact(chunk("a", finish="stop", usage=usage(1, 1))), 0.0) == b""
    assert got(reader.flush()) == [chunk("a", finish="stop")]
    assert reader.flush() == b""


@READERS
@pytest.mark.parametrize(
    "wire",
    [
        b"<html>\n\n",
        b"data: {\n\n",
        b"data: [1]\n\n",
        b"data: 5\n\n",
        b"\x00\n\n",
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b'data: {"choices":' + b"[" * 100_000 + b"\n\n",
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}],"usage":{"prompt_tokens":1}}}\n\n',
    ],
)
def test_garbage_is_no_answer(kind: type[StreamReader], wire: bytes) -> None:
    for before in (b"", compact(chunk("a", usage=usage(1, 1)))):
        reader = kind(PLAIN)
        reader.feed(before, 0.0)
        with pytest.raises(UpstreamError, match="no answer"):
            reader.feed(wire, 0.0)


@READERS
def test_what_is_strange_passes(kind: type[StreamReader]) -> None:
    strange = [
        b'data: {"choices":[{"index":"x","finish_reason":5}],"usage":{"prompt_tokens":"three"}}\n\n',
        b'data: {"choices":{"a":1}}\n\n',
        b'data: {"choices":[{"logprobs":NaN,"delta":{"content":"a"}}],"usage":{"prompt_tokens":1}}\n\n',
        b'data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":-5}}\n\n',
    ]
    reader = kind(PLAIN)
    out = b"".join([reader.feed(event, 0.0) for event in strange]) + reader.flush()
    assert b"usage" not in out
    assert out.count(b"data: ") == len(strange)
    assert (reader.usage.prompt or 0, reader.usage.completion) in ((0, 0), (1, 0))


@READERS
@pytest.mark.parametrize("options", [PLAIN, WANTED, EACH], ids=["no usage", "usage", "usage in each"])
@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":[{"index":0}],"usage":{"a":"\\ud800"}}',
        b'{"choices":[{"index":0,"x":NaN}],"usage":{"a":"\\ud800"}}',
        b'{"choices":[{"index":0,"x":NaN}],"usage":{"prompt_tokens":1%b}}' % (b"0" * 40),
        b'{"\\ud800":1, "choices":[{"index":0}], "usage":{"prompt_tokens":1} }',
        b'{"\\ud800":1, "choices":[], "usage":{"prompt_tokens":1} }',
        b'{"id":"\\ud800", "choices":[{"index":0,"delta":{"content":"\\ud800"}}], "usage":{"\\ud800":1} }',
        b'{"choices":[{"index":1%b,"finish_reason":"\\ud800"}],"usage":null}' % (b"0" * 40),
    ],
)
def test_halves_of_characters_and_endless_numbers_pass_or_are_no_answer(
    kind: type[StreamReader], options: OutputOptions, event: bytes
) -> None:
    for before in (b"", compact(chunk("a", usage=usage(1, 1)))):
        reader = kind(options)
        with contextlib.suppress(UpstreamError):  # any other error would be told as ours
            reader.feed(before + b"data: " + event + b"\n\n" + DONE, 0.0)


@READERS
@pytest.mark.parametrize("finish", [None, "stop"])
@pytest.mark.parametrize("write", [compact, spaced])
def test_choices_without_end_are_no_answer(
    kind: type[StreamReader], finish: str | None, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "MOST_CHOICES", 8)
    for more in ({"usage": usage(1, 1)}, {}) if finish else ({"usage": usage(1, 1)},):
        reader = kind(WANTED)
        for index in range(8):
            reader.feed(write(chunk("a", index, finish, **more)), 0.0)
        reader.feed(write(chunk("a", 7, finish, **more)), 0.0)
        with pytest.raises(UpstreamError, match="more choices"):
            reader.feed(write(chunk("a", 8, finish, **more)), 0.0)


@READERS
@pytest.mark.parametrize("write", [compact, spaced, crlf])
def test_an_error_within_a_stream(kind: type[StreamReader], write: Any) -> None:
    reader = kind(PLAIN)
    reader.feed(write(chunk("a", usage=usage(4, 1))), 0.0)
    with pytest.raises(UpstreamError):
        reader.feed(write({"error": {"message": "dead", "code": 500}}), 0.0)
    assert reader.usage == Usage(4, 0, 1, exact=False)
    with pytest.raises(UpstreamRefusedError, match="too long") as refused:
        kind(PLAIN).feed(write({"error": {"message": "too long", "code": 400}}), 0.0)
    assert refused.value.status == 400


@READERS
@pytest.mark.parametrize(
    ("code", "status"),
    [(404, 404), (True, 502), (499, 502), (500, 502), (200, 502), (-1, 502), (10**30, 502), ("404", 502)],
)
def test_an_error_has_the_status_that_it_says_if_it_is_one(
    kind: type[StreamReader], code: Any, status: int
) -> None:
    with pytest.raises(UpstreamError) as failed:
        kind(PLAIN).feed(compact({"error": {"message": "m", "code": code}}), 0.0)
    assert failed.value.status == status
    assert "True" not in failed.value.message


@READERS
def test_choices_together_have_no_more_tokens_than_there_can_be(kind: type[StreamReader]) -> None:
    most = 1 << 40
    one, two = OutputOptions(chat=False, stream=True), OutputOptions(chat=False, stream=True, prompts=2)
    for options in (one, two):
        reader = kind(options)
        for index in (0, 1):
            reader.feed(compact(chunk("a", index, usage=usage(most, most, most))), 0.0)
        said = reader.usage
        assert (said.prompt or 0) <= most
        assert said.completion <= most
        assert said.cached <= (said.prompt or 0)


@READERS
def test_an_event_that_never_ends(kind: type[StreamReader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "LONGEST_EVENT_BYTES", 10_000)
    reader = kind(PLAIN)
    for _ in range(9):
        reader.feed(b"data: " + b"x" * 1000, 0.0)
    with pytest.raises(UpstreamError, match="never ends"):
        reader.feed(b"x" * 2000, 0.0)


# the shortcut against the grammar, the one that listens against the one that does not, and any cuts

TEXTS = st.sampled_from(
    [
        "a",
        "é",
        "}}\n\n",
        ',"usage":{}',
        '"choices":[]',
        "data: [DONE]",
        'data: {"error"',
        '"finish_reason":"x"',
    ]
)
USAGES = st.one_of(
    st.none(),
    st.builds(usage, st.integers(0, 9), st.integers(0, 9)),
    st.builds(usage, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    st.just({"a": [{"b": {}}, "}"], "prompt_tokens": 4}),
)
CHUNKS = st.builds(
    lambda text, index, finish, more: chunk(text, index, finish, **more),
    TEXTS,
    st.integers(0, 2),
    st.sampled_from([None, None, None, "stop"]),
    st.one_of(st.just({}), st.builds(lambda u: {"usage": u}, USAGES)),
)
TOTALS = st.builds(
    lambda u, choices, more: {**last(usage=u, **more), "choices": choices},
    USAGES,
    st.sampled_from([[], [{"index": 0, "delta": {}}]]),
    st.sampled_from([{}, {"system_fingerprint": "fp"}]),
)
WRITTEN = st.builds(
    lambda write, data: write(data),
    st.sampled_from([compact, compact, compact, spaced, crlf, turned, indented]),
    st.one_of(CHUNKS, CHUNKS, TOTALS),
)
COMMENTS = st.sampled_from([b": keep-alive\n\n", b"event: x\nid: 5\n: c\n\n", b"\n", b":\r\n\r\n"])
STREAMS = st.lists(st.one_of(WRITTEN, WRITTEN, WRITTEN, COMMENTS), max_size=12)
CUTS = st.lists(st.integers(0, 5000), max_size=4)
OPTIONS = st.sampled_from([PLAIN, WANTED, EACH])


def read(reader: StreamReader, parts: Sequence[bytes]) -> tuple[bytes, Any]:
    out = b"".join([reader.feed(part, 0.0) for part in parts])
    return out + reader.flush(), (reader.usage, reader.done, reader.began)


def cut(wire: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(where % (len(wire) + 1) for where in cuts), len(wire)]
    return [wire[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(STREAMS, CUTS, OPTIONS, st.booleans())
def test_a_stream_is_read_alike_however_it_arrives_and_by_whomever(
    events: list[bytes], cuts: list[int], options: OutputOptions, done: bool
) -> None:
    events = [*events, DONE] if done else events
    expected, state = read(GrammarAlone(options), events)
    assert read(StreamReader(options), events) == (expected, state)
    wire = b"".join(events)
    assert read(StreamReader(options), cut(wire, cuts)) == (expected, state)
    tapped = TappedStreamReader(options)
    assert read(tapped, cut(wire, cuts)) == (expected, state)
    shown = got(expected)
    if options is PLAIN:
        assert not any("usage" in one for one in shown if isinstance(one, dict))
    elif done and state[0].exact and state[0].prompt is not None:
        assert any(isinstance(one, dict) and one.get("usage") for one in shown)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), CUTS, OPTIONS)
def test_any_bytes_are_an_answer_or_an_upstream_error(
    wire: bytes, cuts: list[int], options: OutputOptions
) -> None:
    for reader in (StreamReader(options), TappedStreamReader(options), NamedStreamReader()):
        try:
            for part in cut(compact(chunk("a", usage=usage(1, 1))) + wire + b"\n\n", cuts):
                reader.feed(part, 0.0)
        except UpstreamError:
            continue


# log-probabilities that only the gateway asked for


def token(text: str, n: int) -> dict[str, Any]:
    return {"token": text, "logprob": -0.1, "top_logprobs": [{"token": "x", "logprob": -0.1}] * n}


@pytest.mark.parametrize("write", [compact, spaced, crlf, turned])
@pytest.mark.parametrize(("asked", "top", "shown"), [(False, 0, None), (True, 0, 0), (True, 2, 2)])
def test_log_probabilities_are_cut_to_what_was_asked_for(
    write: Any, asked: bool, top: int, shown: int | None
) -> None:
    options = OutputOptions(chat=True, stream=True, logprobs=asked, top_logprobs=top)
    reader = TappedStreamReader(options)

    def answer(n: int | None) -> dict[str, Any]:
        one = chunk("é", usage=usage(1, 1))
        one["choices"][0]["logprobs"] = None if n is None else {"content": [token("é", n)]}
        return one

    expected = answer(shown)
    del expected["usage"]
    assert got(reader.feed(write(answer(5)), 0.0)) == [expected]
    assert Transcript.of(reader.answer.events).texts == ["é"]
    whole = TappedWholeReader(OutputOptions(chat=True, stream=False, logprobs=asked, top_logprobs=top))
    assert json.loads(whole.feed(json.dumps(answer(5)).encode(), 0.0)) == answer(shown)


# answers that are not streamed, and every protocol's usage


@pytest.mark.parametrize("tapped", [False, True])
def test_a_list_is_no_answer_of_a_chat(tapped: bool) -> None:
    for kind in (None, b"application/json"):
        reader = reader_for(Form.COMPLETIONS, OutputOptions(True, stream=False), kind, tapped=tapped)
        with pytest.raises(UpstreamError):
            reader.feed(b"[]", 0.0)
    assert reader_for(Form.PLAIN, OutputOptions(False, stream=False)).feed(b"[]", 0.0) == b"[]"


WHOLE = [
    ("completions", {"usage": usage(12, 7)}, Usage(12, 0, 7, True)),
    ("completions, cached", {"usage": usage(12, 7, 8)}, Usage(12, 8, 7, True)),
    ("no cache", {"usage": usage(12, 7) | {"prompt_tokens_details": None}}, Usage(12, 0, 7, True)),
    (
        "responses",
        {
            "usage": {
                "input_tokens": 30,
                "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
                "output_tokens": 4,
                "output_tokens_details": {"reasoning_tokens": 1},
                "total_tokens": 34,
            }
        },
        Usage(30, 16, 4, True),
    ),
    (
        "Anthropic",
        {"usage": {"input_tokens": 92, "cache_read_input_tokens": 512, "output_tokens": 9}},
        Usage(604, 512, 9, True),
    ),
    (
        "Anthropic, into the cache",
        {
            "usage": {
                "input_tokens": 2,
                "cache_creation_input_tokens": 30,
                "cache_read_input_tokens": None,
                "output_tokens": 9,
            }
        },
        Usage(32, 0, 9, True),
    ),
    ("embeddings", {"data": [], "usage": {"prompt_tokens": 6, "total_tokens": 6}}, Usage(6, 0, 0, True)),
    ("embeddings by vLLM", {"usage": usage(6, 0)}, Usage(6, 0, 0, True)),
    ("rerank", {"results": [], "usage": {"total_tokens": 41}}, Usage(41, 0, 0, True)),
    ("score", {"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9, 0, 0, True)),
    ("Cohere embed", {"meta": {"billed_units": {"input_tokens": 5}}}, Usage(5, 0, 0, True)),
    ("nothing", {"object": "list"}, NO_USAGE),
    ("null", {"usage": None}, NO_USAGE),
    ("of no number", {"usage": {"prompt_tokens": [1]}}, NO_USAGE),
    ("no object", {"usage": "much"}, NO_USAGE),
]


@pytest.mark.parametrize(("name", "answer", "expected"), WHOLE, ids=[case[0] for case in WHOLE])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_usage_of_every_protocol(
    name: str, answer: dict[str, Any], expected: Usage, indent: int | None
) -> None:
    raw = json.dumps(answer, indent=indent).encode()
    for content_type in (None, b"application/json", b"application/json; charset=utf-8"):
        reader = WholeReader(content_type)
        assert reader.feed(raw, 0.0) == raw
        assert (reader.usage, reader.done, reader.began) == (expected, True, True)


def test_content_that_is_no_json_passes() -> None:
    for content_type in (b"application/octet-stream", b"audio/wav", b"image/png"):
        for reader in (WholeReader(content_type), TappedWholeReader(PLAIN, content_type)):
            assert reader.feed(b"\x00\xff{", 0.0) == b"\x00\xff{"
            assert (reader.done, reader.usage) == (True, NO_USAGE)


@pytest.mark.parametrize("content_type", [None, b"application/json", b"text/html", b"text/event-stream"])
@pytest.mark.parametrize("raw", [b"<html>", b"", b"{", b"5", b'{"usage":"\xff"}', b"[" * 100_000])
def test_a_page_is_no_answer(content_type: bytes | None, raw: bytes) -> None:
    for reader in (WholeReader(content_type), TappedWholeReader(PLAIN, content_type)):
        with pytest.raises(UpstreamError, match="no answer"):
            reader.feed(raw, 0.0)
        assert not reader.done


def test_a_list_is_an_answer_without_a_usage() -> None:
    """Of engines that render prompts."""
    reader = WholeReader()
    assert reader.feed(b'[{"usage": 1}]', 0.0) == b'[{"usage": 1}]'
    assert (reader.done, reader.usage) == (True, NO_USAGE)


def test_counts_that_are_none_leave_the_books_alone() -> None:
    assert usage_of(b'{"prompt_tokens":-1,"completion_tokens":3}') == Usage(0, 0, 3, True)
    assert usage_of(b'{"prompt_tokens":9999999999999999999999,"completion_tokens":3}') == Usage(0, 0, 3, True)
    assert usage_of(b'{"prompt_tokens":5.0,"completion_tokens":3}') == Usage(5, 0, 3, True)


@pytest.mark.parametrize(
    ("said", "cached"),
    [
        (usage(3, 1, 1 << 39), 3),
        (usage(3, 1, 3), 3),
        (usage(3, 1, -100), 0),
        (usage(0, 1, 5), 0),
        ({"input_tokens": 3, "input_tokens_details": {"cached_tokens": 9}, "output_tokens": 1}, 3),
        ({"completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 9}}, 0),
    ],
)
def test_the_cache_had_no_more_of_a_prompt_than_there_is(said: dict[str, Any], cached: int) -> None:
    assert usage_of(json.dumps(said).encode()).cached == cached
    reader = WholeReader()
    reader.feed(json.dumps({"usage": said}).encode(), 0.0)
    assert reader.usage.cached == cached
    assert usage_of(b'{"prompt_tokens":2,"completion_tokens":1}', reader.usage).cached == min(cached, 2)


# named streams


def named(name: str, write: Any, **data: Any) -> bytes:
    return f"event: {name}\n".encode() + bytes(write({"type": name, **data}))


@SPELLINGS
def test_a_stream_of_anthropics_messages(write: Any) -> None:
    """As vLLM writes it: all of the prompt at the beginning, the cached part of it at the end."""
    reader = NamedStreamReader()
    start = named("message_start", write, message={"usage": {"input_tokens": 604, "output_tokens": 0}})
    assert reader.feed(start, 0.0) == start
    assert reader.usage == Usage(604, 0, 0, exact=False)
    delta = named("content_block_delta", write, delta={"text": '"usage": {"output_tokens": 1000}'})
    assert reader.feed(b": keep-alive\n\n" + delta, 0.0) == b": keep-alive\n\n" + delta
    said = {"input_tokens": 92, "cache_read_input_tokens": 512, "output_tokens": 9}
    reader.feed(named("message_delta", write, usage=said) + named("message_stop", write), 0.0)
    assert (reader.usage, reader.done) == (Usage(604, 512, 9, exact=True), True)


def test_anthropics_own_streams_give_the_prompt_once() -> None:
    reader = NamedStreamReader()
    said = {"input_tokens": 2, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 7}
    reader.feed(named("message_start", compact, message={"usage": said | {"output_tokens": 1}}), 0.0)
    reader.feed(named("message_delta", compact, usage={"output_tokens": 30}), 0.0)
    assert reader.usage == Usage(14, 7, 30, exact=True)


@SPELLINGS
def test_a_stream_of_a_response(write: Any) -> None:
    reader = NamedStreamReader()
    reader.feed(named("response.created", write, response={"id": "r", "usage": None}), 0.0)
    reader.feed(named("response.output_text.delta", write, delta="a"), 0.0)
    assert (reader.usage, reader.last_event, reader.done) == (NO_USAGE, b"", False)
    said = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 3}
    end = named("response.completed", write, response={"id": "r", "output": [], "usage": said})
    cuts = [end[:10], end[10:-2], end[-2:]]
    assert b"".join([reader.feed(part, 0.0) for part in cuts]) == end
    assert (reader.usage, reader.done) == (Usage(9, 4, 3, exact=True), True)
    assert json.loads(reader.last_event)["response"]["id"] == "r"


def test_errors_of_named_streams() -> None:
    error = {"type": "overloaded_error", "message": "dead"}
    for said in ({"error": error}, {"code": "server_error", "message": "dead"}):
        reader = NamedStreamReader()
        assert not reader.feed(b": keep-alive\n", 0.0)
        assert not reader.began
        with pytest.raises(UpstreamError):
            reader.feed(b"\n" + named("error", spaced, **said), 0.0)
    with pytest.raises(UpstreamError, match="no answer"):
        NamedStreamReader().feed(b"<html>\n\n", 0.0)


def test_each_form_has_its_reader() -> None:
    whole = OutputOptions(chat=True, stream=False)
    assert isinstance(reader_for(Form.COMPLETIONS, PLAIN), StreamReader)
    assert isinstance(reader_for(Form.COMPLETIONS, PLAIN, tapped=True), TappedStreamReader)
    assert isinstance(reader_for(Form.COMPLETIONS, whole, tapped=True), TappedWholeReader)
    assert isinstance(reader_for(Form.RESPONSES, PLAIN), NamedStreamReader)
    assert isinstance(reader_for(Form.ANTHROPIC, whole), WholeReader)
    assert isinstance(reader_for(Form.PLAIN, whole, b"audio/wav"), WholeReader)
    assert event_of(DONE).done


@READERS
@pytest.mark.parametrize("said", [{"token_ids": [5]}, {"text": ""}, {"logprobs": {"tokens": [""]}}])
def test_a_choice_without_words_is_part_of_the_answer(kind: type[StreamReader], said: Any) -> None:
    """vLLM's answers in token ids have no text, and half a letter has none yet."""
    one = {"id": "1", "choices": [{"index": 0, "finish_reason": None, **said}]}
    reader = kind(OutputOptions(chat=False, stream=True))
    assert got(reader.feed(compact({**one, "usage": usage(9, 1)}), 0.0)) == [one]
