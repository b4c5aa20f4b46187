"""JSON in the encodings that Python takes."""

from __future__ import annotations

import pytest

from gateway.proxy.lenient import in_utf8


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"])
def test_every_encoding_that_python_takes_becomes_utf_8(coding: str) -> None:
    text = '{"a": "é漢"}'
    assert in_utf8(text.encode(coding)) == text.encode()


def test_what_is_utf_8_or_nothing_is_left() -> None:
    assert in_utf8(b'{"a": 1}') is None
    assert in_utf8(b"\xff\xfea") is None
