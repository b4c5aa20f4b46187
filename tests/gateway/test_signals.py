"""Signals against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from gateway.quality.answer import Answer
from gateway.quality.signals import entropy, measure
from gateway.quality.transcript import Transcript


def token(p: float, *others: float, name: str = "a") -> dict[str, object]:
    top = [{"token": name, "logprob": math.log(p)}]
    top += [{"token": f"o{i}", "logprob": math.log(other)} for i, other in enumerate(others)]
    return {"token": name, "logprob": math.log(p), "top_logprobs": top}


def test_entropy() -> None:
    assert entropy([math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(2))
    assert entropy([math.log(0.25)] * 4) == pytest.approx(math.log(4))
    assert entropy([0.0]) == 0
    # what the listed tokens leave is one more outcome: here 0.5, 0.25 and a rest of 0.25
    assert entropy([math.log(0.5), math.log(0.25)]) == pytest.approx(1.5 * math.log(2))
    assert entropy([0.0, -9999.0]) == 0, "vLLM's logarithm of zero"


def test_measure() -> None:
    signals = measure([token(0.5, 0.5), token(0.05, 0.95), token(1.0)])
    assert signals is not None
    assert signals.tokens == 3
    assert signals.nll_mean == pytest.approx((math.log(2) + math.log(20)) / 3)
    assert signals.entropy_max == pytest.approx(math.log(2))
    assert signals.unlikely_share == pytest.approx(1 / 3)
    assert measure([]) is None


def test_a_token_below_the_listed_ones_counts_for_itself() -> None:
    listed = [{"token": "b", "logprob": math.log(0.5)}]
    signals = measure([{"token": "a", "logprob": math.log(0.25), "top_logprobs": listed}])
    assert signals is not None
    assert signals.entropy_max == pytest.approx(1.5 * math.log(2))


def test_answer_is_the_same_streamed_or_whole() -> None:
    content = [token(0.5, 0.5, name="Hel"), token(0.9, name="lo")]
    whole, streamed = Answer(), Answer()
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    choice = {"index": 0, "message": {"content": "Hello"}, "logprobs": {"content": content}}
    whole.add({"choices": [choice], "usage": usage}, 1.0)
    for index, part in enumerate(content):
        delta = {"index": 0, "delta": {"content": part["token"]}, "logprobs": {"content": [part]}}
        counted = usage | {"completion_tokens": index + 1}
        streamed.add({"choices": [delta], "usage": counted}, 1.0 + index)
    for answer in (whole, streamed):
        assert (answer.prompt_tokens, answer.completion_tokens) == (7, 2)
        said = Transcript.of(answer.events)
        assert said.texts == ["Hello"]
        assert said.signals == measure(content)
    assert streamed.gaps_s == [1.0]
