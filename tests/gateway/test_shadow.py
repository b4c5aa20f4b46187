"""A quantized answer beside the reference's opinion of it, and two answers beside each other."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gateway.quality.shadow import Result, compare, same_meaning

FAVOURITE = {"logprob": -0.05, "rank": 1, "decoded_token": "a"}


def row(logprob: float = -0.05, rank: int = 1) -> dict[str, dict[str, Any]]:
    mine = {"logprob": logprob, "rank": rank, "decoded_token": "b"}
    return {"1": mine} if rank == 1 else {"7": mine, "1": FAVOURITE}


def said(*logprobs: float) -> list[tuple[str, float]]:
    return [("x", logprob) for logprob in logprobs]


def test_the_same_opinion_is_agreement() -> None:
    scored = compare(said(-0.05, -0.05), [row(), row()])
    assert scored is not None
    assert (scored.result, scored.divergence, scored.disagreement) == (Result.AGREED, 0.0, 0.0)


def test_a_token_that_only_the_variant_believes_in_is_disputed() -> None:
    scored = compare(said(-0.05, -0.1), [row(), row(-9.0, 40)])
    assert scored is not None
    assert scored.result is Result.DISPUTED
    assert scored.disagreement == 0.5
    assert scored.divergence == pytest.approx((9.0 - 0.1) / 2)


@pytest.mark.parametrize(
    ("mine", "theirs", "rank"),
    [
        (-0.7, -0.8, 2),  # a near tie
        (-6.0, -6.0, 300),  # sampled at a high temperature: as unlikely to both
        (-5.5, -6.0, 300),
    ],
)
def test_what_is_unlikely_to_both_is_not(mine: float, theirs: float, rank: int) -> None:
    scored = compare(said(mine), [row(theirs, rank)])
    assert scored is not None
    assert scored.result is Result.AGREED


def test_one_token_of_a_long_answer_is_not_enough() -> None:
    rows = [row()] * 99 + [row(-9.0, 40)]
    scored = compare(said(*[-0.05] * 100), rows)
    assert scored is not None
    assert scored.disputed == 1
    assert scored.result is Result.AGREED


def test_an_end_token_is_left_out() -> None:
    scored = compare(said(-0.05, -0.2), [row()])
    assert scored is not None
    assert scored.tokens == 1


@pytest.mark.parametrize(("theirs", "result"), [(-0.1, Result.AGREED), (-4.0, Result.DISPUTED)])
def test_texts_that_are_cut_otherwise_are_compared_as_a_whole(theirs: float, result: Result) -> None:
    scored = compare(said(*[-0.1] * 6), [row(theirs, 1 if theirs > -1 else 50)] * 3)
    assert scored is not None
    assert scored.result is result


@pytest.mark.parametrize(
    ("tokens", "rows"), [([], []), (said(-1.0), []), ([], [row()]), (said(-1.0), [None])]
)
def test_nothing_to_compare(tokens: Any, rows: Any) -> None:
    assert compare(tokens, rows) is None


def test_an_impossible_token_has_a_finite_price() -> None:
    scored = compare(said(-0.1), [row(-math.inf, 9)])
    assert scored is not None
    assert scored.divergence == pytest.approx(49.9)


def calls(arguments: str) -> dict[str, Any]:
    return {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("bill_due", " bill_due\n", True),
        ("bill_due", "bill_paid", False),
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ('{"a": 1}', '{"a": 2}', False),
        (
            "The order of Greta Vidal costs 277 dollars in total today.",
            "The order by Greta Vidal costs 277 dollars in all today.",
            True,
        ),
        (
            "The order of Greta Vidal costs 277 dollars in total today.",
            "The order of Greta Vidal costs 278 dollars in total today.",
            False,
        ),
        (
            "Nothing of this kind is known to anybody here at present.",
            "Please turn to our colleagues of the other house about that.",
            False,
        ),
        (calls('{"x": 1}'), calls('{ "x":1 }'), True),
        (calls('{"x": 1}'), calls('{"x": 2}'), False),
        (calls('{"x": '), calls('{"x": '), True),
        (calls("{}"), "no call", False),
    ],
)
def test_two_answers(mine: Any, theirs: Any, same: bool) -> None:
    one, other = (text if isinstance(text, dict) else {"content": text} for text in (mine, theirs))
    assert same_meaning(one, other) is same
    assert same_meaning(other, one) is same
