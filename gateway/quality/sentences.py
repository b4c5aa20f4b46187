"""Sentences of an answer, by rules: no model, the same result every time."""

from __future__ import annotations

import re

_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*\s*")
_CLOSING = "\"'\u201c\u201d\u2018\u2019)]\u300d\u300f\uff09"
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+")
_NEVER_ENDS = frozenset(
    "mr mrs ms dr prof rev st mt vs cf approx e.g i.e gen col sgt capt hon messrs".split()
)
"""Abbreviations that are followed by the rest of their sentence."""
_BEFORE_NUMBER = frozenset("no nos fig eq p pp jan feb mar apr jun jul aug sep sept oct nov dec".split())
"""Abbreviations that are, when a number follows: "No. 5", but "The answer is no. Ask again."."""
_MAY_END = frozenset("a.m p.m etc inc ltd co corp u.s u.k jr sr".split())
"""Abbreviations that end a sentence when a capital follows."""


def split_sentences(text: str) -> list[str]:
    """Sentences of ``text``, without list markers.

    A line break always ends one. A full stop does not when it follows an initial (``J. Smith``) or an
    abbreviation, or when a small letter follows; within a number or a time it has no space after it.
    """
    sentences = []
    for line in text.splitlines():
        line = _BULLET.sub("", line)
        start = 0
        for end in _END.finditer(line):
            if _ends(line[start : end.end()].rstrip(), line[end.end() :]):
                sentences.append(line[start : end.end()].strip())
                start = end.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if any(c.isalnum() for c in sentence)]


def _ends(before: str, after: str) -> bool:
    if before.rstrip(_CLOSING)[-1] in "!?\u3002\uff01\uff1f":
        return True
    if after[:1].islower():
        return False
    last = before.split()[-1].strip(_CLOSING + "([.").lower()
    if last in _NEVER_ENDS or (last in _BEFORE_NUMBER and after[:1].isdigit()):
        return False
    if last in _MAY_END:
        return after[:1].isupper()
    is_initial = len(last) == 1 and last.isalpha() and before.split()[-1][:1].isupper() and last != "i"
    return not is_initial
