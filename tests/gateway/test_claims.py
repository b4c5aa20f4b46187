"""What can be looked up of a text, however long and strange that is."""

from __future__ import annotations

import time

import pytest

from gateway.quality.claims import extract
from gateway.quality.grounded import check


@pytest.mark.parametrize(
    "unit",
    ["a-", "1a-", "-", "1", "a", ",111", "1,111", "1.", "1 ", "1 of ", "$", "$1", "1:11 ", "Jan ", "é-"],
)
def test_the_time_grows_with_the_length_and_no_faster(unit: str) -> None:
    def seconds(size: int) -> float:
        text = "1 " + unit * (size // len(unit))
        began = time.process_time()
        extract(text)
        return time.process_time() - began

    short = max(min(seconds(5_000) for _ in range(3)), 0.001)
    assert min(seconds(40_000) for _ in range(2)) < 24 * short, "not linear: eight times the text"


def test_long_numbers_and_identifiers_are_found() -> None:
    values = [claim.value[0] for claim in extract("1,234,567,890.50 and ORDER-2024-11-0007-ABCDEF, abc-1")[0]]
    assert values == ["order-2024-11-0007-abcdef", "abc-1", "1234567890.5"]


@pytest.mark.parametrize(
    "unit", ["1a@", "a1.b@", "https://1 ", "1.1.", "1/1/", "-1 ", "1kg", "\u0661", "\u8ba21"]
)
def test_the_time_of_addresses_and_units_does_not_either(unit: str) -> None:
    test_the_time_grows_with_the_length_and_no_faster(unit)


@pytest.mark.parametrize("unit", ["A ", "May ", "The A ", "Aa ", "1. ", "It is 1. "])
def test_names_of_ordinary_words_take_no_longer(unit: str) -> None:
    """A text of such took seven seconds, and with it went the process that reads answers."""

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        began = time.process_time()
        check(text, "")
        return time.process_time() - began

    short = max(min(seconds(10_000) for _ in range(3)), 0.001)
    assert min(seconds(80_000) for _ in range(2)) < 24 * short, "not linear: eight times the text"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5 kg", "5kg"),
        ("10 MB", "10mb"),
        ("15.03.2024", "15 March 2024"),
        ("03/15/2024", "2024-03-15"),
        ("15/03/2024", "2024-03-15"),
        ("\u22125 \u00b0C", "-5 degrees"),
        ("-$5", "-5 dollars"),
        ("\u0661\u0662\u0663", "123"),
        ("1\u202f200", "1 200"),
        ("https://a.example/b/", "https://A.example/b."),
    ],
)
def test_two_ways_of_writing_one_value(one: str, other: str) -> None:
    first, second = ([claim.value[0] for claim in extract(text)[0]] for text in (one, other))
    assert first == second != []


@pytest.mark.parametrize("text", ["10.0.0.1", "1.2.3", "greta@example.com", "https://example.com/a?b=1"])
def test_what_has_dots_is_one_value(text: str) -> None:
    assert [claim.value[0] for claim in extract(f"It is {text}.")[0]] == [text]
