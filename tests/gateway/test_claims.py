"""What can be looked up of a text, however long and strange that is."""

from __future__ import annotations

import time

import pytest

from gateway.quality.claims import extract


@pytest.mark.parametrize(
    "unit",
    ["a-", "1a-", "-", "1", "a", ",111", "1,111", "1.", "1 ", "1 of ", "$", "$1", "1:11 ", "Jan ", "é-"],
)
def test_the_time_grows_with_the_length_and_no_faster(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        began = time.process_time()
        extract(text)
        return time.process_time() - began

    short = max(min(seconds(5_000) for _ in range(3)), 0.001)
    assert min(seconds(40_000) for _ in range(2)) < 24 * short, "not linear: eight times the text"


def test_long_numbers_and_identifiers_are_found() -> None:
    values = [claim.value[0] for claim in extract("1,234,567,890.50 and ORDER-2024-11-0007-ABCDEF, abc-1")[0]]
    assert values == ["order-2024-11-0007-abcdef", "abc-1", "1234567890.5"]
