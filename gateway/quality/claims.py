"""What of a sentence can be looked up: money, dates, times, identifiers, numbers and names.

Each claim is brought to a form in which two ways of writing the same thing are equal: ``5 November``
and ``November 5th``, ``6 pm`` and ``18:00``, ``1,200`` and ``1200``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|"
    r"Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
# Whatever is looked for ahead is bounded: a text of nothing but beginnings would else take for ever.
_NUMBER = r"\d+(?:,\d{3}){0,9}(?:\.\d+)?"
_PATTERNS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("date", r"\b(?P<y>\d{4})-(?P<m>\d{2})-(?P<d>\d{2})\b"),
        (
            "date",
            rf"\b(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<m>{_MONTH})\b\.?(?:,?\s+(?P<y>\d{{4}}))?",
        ),
        (
            "date",
            rf"\b(?P<m>{_MONTH})\.?\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\b(?!:)(?:,?\s+(?P<y>\d{{4}})\b)?",
        ),
        ("time", r"\b(?P<h>\d{1,2}):(?P<min>\d{2})(?::\d{2})?(?:\s*(?P<half>[ap])\.?m\b\.?)?"),
        ("time", r"\b(?P<h>\d{1,2})(?P<min>)\s*(?P<half>[ap])\.?m\b\.?"),
        ("money", rf"(?P<unit>[$€£¥])\s?(?P<n>{_NUMBER})"),
        ("money", rf"\b(?P<n>{_NUMBER})\s?(?P<unit>[$€£¥]|USD\b|EUR\b|GBP\b|dollars?\b|euros?\b|pounds?\b)"),
        (
            "identifier",
            r"(?<![\w$€£¥])(?=[a-z0-9])(?=[\w-]{0,31}\d)(?=[\w-]{0,31}[a-z])(?!\d+(?:st|nd|rd|th)\b)"
            r"[a-z0-9][\w-]*\w\b",
        ),
        ("number", rf"(?<![\w.]){_NUMBER}"),
    )
)
_UNITS = {"usd": "$", "dollar": "$", "eur": "€", "euro": "€", "gbp": "£", "pound": "£"}
_NAME = re.compile(r"[A-Z][\w\u2019'-]*(?:\s+(?:(?:of|de|van|von|der|la)\s+)?[A-Z][\w\u2019'-]*)*")


@dataclass(frozen=True)
class Claim:
    """``kind`` and the value in its common form; ``start`` is where it stood in its text."""

    kind: str
    value: tuple[str, ...]
    start: int = 0


def extract(text: str) -> tuple[list[Claim], str]:
    """All claims with digits, and ``text`` with them blanked out (of the same length)."""
    claims = []
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(text):
            claims.append(Claim(kind, _value(kind, match), match.start()))
        text = pattern.sub(lambda match: "\0" * len(match.group()), text)
    return claims, text


def names(sentence: str, ordinary: frozenset[str]) -> Iterator[str]:
    """Capitalised names in a sentence. One word alone at its beginning is no evidence of a name.

    ``ordinary`` are words in small letters that begin no name (``the``, ``your`` …).
    """
    first = next((index for index, c in enumerate(sentence) if c.isalpha()), 0)
    for match in _NAME.finditer(sentence):
        words = match.group().split()
        while words and words[0].lower() in ordinary:
            words = words[1:]
        stripped = len(words) < len(match.group().split())
        if len(words) > 1 or (words and (match.start() > first or stripped)):
            yield " ".join(words)


def _value(kind: str, match: re.Match[str]) -> tuple[str, ...]:
    """The common form."""
    found = match.groupdict()
    if kind == "date":
        month = found["m"]
        number = int(month) if month.isdigit() else _MONTHS.index(month[:3].lower()) + 1
        return str(int(found["d"])), str(number), found["y"] or ""
    if kind == "time":
        hour = int(found["h"])
        if found["half"]:
            hour = hour % 12 + (12 if found["half"].lower() == "p" else 0)
        return f"{hour}:{found['min'] or '00'}", ""
    if kind == "money":
        unit = found["unit"].lower()
        return _number(found["n"]), _UNITS.get(unit.rstrip("s"), unit)
    if kind == "number":
        return _number(match.group()), ""
    return (match.group().lower(),)


def _number(text: str) -> str:
    text = text.replace(",", "")
    return text.rstrip("0").rstrip(".") if "." in text else text
