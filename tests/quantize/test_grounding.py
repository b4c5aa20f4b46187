"""Invented words: what an answer says beyond its grounds, told from the wording of right answers."""

import itertools
import json
from pathlib import Path

import pytest

from quantize.evaluate.grounding import Grounding, words
from quantize.evaluate.tasks import Item, read_items

DATA = Path(__file__).parents[2] / "deploy/assistant/data"
ASK = ({"role": "user", "content": "hi"},)


def item(expected: str, *grounds: str) -> Item:
    return Item(messages=ASK, expected=expected, grounds=grounds)


DUE = item("The due date is 3 May.", "due: 3 May\npayer: Ann Bell")
PAYER = item("The payer is Ann Bell.", "due: 3 May\npayer: Ann Bell")
SILENT = item("The record does not say.", "Invoice F1234")


@pytest.mark.parametrize(
    ("asked", "answer", "invented"),
    [
        (DUE, "The due date is 3 May.", []),
        (DUE, "the due date is May 3", []),
        (DUE, "The due date is 4 May.", ["4"]),
        (DUE, "The due date is 3 June.", ["june"]),
        (PAYER, "The payer is Ann Bells.", ["bells"]),
        (PAYER, "The record does not say.", []),
        (PAYER, "", []),
        (SILENT, "The record does not say.", []),
        (SILENT, "The payer is Ann Bell.", ["payer", "ann", "bell"]),
        (SILENT, "F1234 is $77.", ["77"]),
    ],
)
def test_invented_words(asked: Item, answer: str, invented: list[str]) -> None:
    assert Grounding([DUE, PAYER, SILENT]).invented(asked, answer) == invented


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        ("The bill must be paid by 4 May.", ["4"]),
        ("Certainly! Here is when it ends: on 3 June, says Tom Reed.", ["june", "tom", "reed"]),
        ("It is due on 3 May and belongs to Ann Bell's file.", []),
        ("Payment is due 2024-05-03.", ["2024-05-03"]),
        ("", []),
    ],
)
def test_invented_values_are_numbers_and_names_in_whatever_words(answer: str, values: list[str]) -> None:
    assert Grounding([DUE, PAYER, SILENT]).invented_values(DUE, answer) == values


def test_words_keep_numbers_and_identifiers_whole() -> None:
    assert words("Bell's order P9-2: $1,200.50 at 12:25.") == [
        "bell",
        "order",
        "p9-2",
        "1,200.50",
        "at",
        "12:25",
    ]


@pytest.mark.parametrize("role", ["core", "summarizer"])
def test_right_answers_of_the_demo_invent_nothing_and_wrong_records_do(role: str) -> None:
    items = read_items(DATA / f"{role}.jsonl", role)
    grounding = Grounding(items)
    assert all(grounding.invented(one, one.expected) == [] for one in items)
    stated = [one for one in items if "does not say" not in one.expected]
    moved = [grounding.invented(one, other.expected) for one, other in itertools.pairwise(stated)]
    # Another record's answer is seen, unless its value happens to be in this record too.
    assert sum(map(bool, moved)) > 0.9 * len(moved)


def test_items_without_grounds_do_not_widen_the_frame() -> None:
    loose = Item(messages=ASK, expected=json.dumps({"4": "June"}))
    assert Grounding([DUE, loose]).invented(DUE, "The due date is 4 June.") == ["4", "june"]
