"""What only the gateway asked for is cut out of an answer, and nothing else of it changes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_readers import PLAIN, usage

from gateway.errors import UpstreamError
from gateway.proxy.endpoints import Form
from gateway.upstream.completions import TappedStreamReader
from gateway.upstream.options import OutputOptions
from gateway.upstream.readers import TappedWholeReader, reader_for

NUMBERS = ("1e-05", "-1.1920928955078125e-07", "-0.0", "1E+2", "1e400", "7" * 30, "null")
STRINGS = ('"a"', r'"\u00e9\/"', '"é\u2028"', r'"\ud83d\ude00"', '"}]\\\\"', r'"\""', '""')
SPACE = st.sampled_from(("", " ", "\t "))


@st.composite
def spelled(draw: st.DrawFn, depth: int = 2) -> str:
    """A value as JSON, in any spelling."""
    plain = st.sampled_from((*NUMBERS, *STRINGS, "true", "[]", "{}"))
    if depth == 0 or draw(st.booleans()):
        return draw(plain)
    space, inner = draw(SPACE), spelled(depth - 1)
    if draw(st.booleans()):
        return f"[{space}" + f",{space}".join(draw(st.lists(inner, max_size=3))) + "]"
    names = st.sampled_from((*STRINGS, '"logprobs"', '"choices"', '"top_logprobs"', r'"logpro\u0062s"'))
    pairs = draw(st.lists(st.tuples(names, inner), max_size=3, unique_by=lambda pair: pair[0]))
    return f"{{{space}" + f",{space}".join(f"{name}{space}:{space}{value}" for name, value in pairs) + "}"


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, dict[int | None, str]]:
    """What an engine writes that is asked for five likely tokens; for fewer, or for no probabilities."""
    s = draw(SPACE)
    name = draw(st.sampled_from(('"logprobs"', r'"logpro\u0062s"')))
    more, before, after = draw(spelled()), draw(spelled()), draw(spelled())
    tokens = draw(st.lists(st.tuples(spelled(1), st.sampled_from(NUMBERS), spelled(0)), max_size=3))
    said = draw(st.sampled_from(("delta", "message")))

    def written(most: int | None) -> str:
        of = []
        for text, number, odd in tokens:
            top = f",{s}".join([f'{{"token":{s}{text},"logprob":{number}}}'] * (most or 0))
            of.append(f'{{"token":{text},{s}"logprob":{s}{number},{s}"top_logprobs":{s}[{top}],"x":{odd}}}')
        content = f'{{"content":{s}[' + f",{s}".join(of) + f'],"refusal":{more}}}'
        held = "null" if most is None else content
        choice = f'{{{s}"index":0,"{said}":{s}{{"content":{before}}},{name}{s}:{s}{held},"y":{after}{s}}}'
        return f'{{{s}"id":{before},{s}"choices":{s}[{choice}],{s}"z":{after}{s}}}'

    return written(5), {most: written(most) for most in (None, 0, 2)}


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", None], ids=["stream", "crlf", "whole"])
@settings(max_examples=100, deadline=None)
@given(answers(), st.sampled_from((None, 0, 2)))
def test_not_a_byte_tells_whether_an_answer_is_listened_to(
    end: str | None, answer: tuple[str, dict[int | None, str]], asked: int | None
) -> None:
    """What the engine writes for who listens becomes what it writes for who does not."""
    listened, others = answer
    options = OutputOptions(True, end is not None, asked is not None, asked or 0)

    def read(text: str, *, tapped: bool) -> bytes | str:
        reader = reader_for(Form.COMPLETIONS, options, tapped=tapped)
        try:
            return reader.feed((text if end is None else f"data: {text}{end}").encode(), 0.0)
        except UpstreamError as error:
            return error.message

    assert read(listened, tapped=True) == read(others[asked], tapped=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32", "utf-8-sig"])
def test_what_only_python_reads_is_cut_no_less(encoding: str) -> None:
    """And says what it said: another encoding, half a character, NaN, names that come twice."""
    said = '{"choices":[{"logprobs":{"content":[1]},"x":%s}],"choices":[{"logprobs":{"content":[]},"x":%s}]}'
    for odd in (r'"\ud800é"', "-Infinity", '"é"'):
        out = TappedWholeReader(OutputOptions(True, stream=False)).feed(
            (said % (odd, odd)).encode(encoding), 0.0
        )
        assert json.loads(out) == {"choices": [{"logprobs": None, "x": json.loads(odd)}]}
        assert b"content" not in out
    event = (
        f'data: {{"choices":[{{"logprobs":{{"content":[]}},"x":NaN}}],"usage":{json.dumps(usage(1, 1))}}}\n\n'
    )
    out = TappedStreamReader(PLAIN).feed(event.encode(), 0.0)
    assert out == b'data: {"choices": [{"logprobs": null, "x": NaN}]}\n\n', "and the usage stays out"
