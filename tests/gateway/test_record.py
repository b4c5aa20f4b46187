"""What becomes of a request is one frozen record, with nothing of what was said."""

from __future__ import annotations

import pytest

from gateway.proxy.record import NO_USAGE, Record, Spent, Usage


def test_a_record_cannot_be_changed() -> None:
    """Books, traces and observation get the same one."""
    for one, field in ((NO_USAGE, "prompt"), (Spent("v", "r", NO_USAGE, "hedged"), "usage")):
        with pytest.raises(AttributeError):
            setattr(one, field, 1)


def test_what_was_not_said_is_no_count() -> None:
    assert NO_USAGE.prompt is None
    assert Usage(0).prompt == 0
    assert not NO_USAGE.exact


def test_a_record_has_no_place_for_a_prompt_or_an_answer() -> None:
    assert not {"body", "messages", "prompt", "answer", "text", "raw"} & set(Record.__struct_fields__)
