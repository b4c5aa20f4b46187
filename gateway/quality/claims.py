"""What of a sentence can be looked up: addresses, money, dates, times, identifiers, numbers and names.

Each claim is brought to a form in which two ways of writing the same thing are equal: ``5 November``
and ``November 5th``, ``6 pm`` and ``18:00``, ``1,200`` and ``1200``, ``5kg`` and ``5 kg``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|"
    r"Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
# Whatever is looked for ahead is bounded: a text of nothing but beginnings would else take for ever.
_NUMBER = r"\d+(?:,\d{3}){0,9}(?:\.\d+)?"
_SIGN = r"(?P<sign>(?<![^\s(\[{:=|\"'])-)?"
"""A minus: a hyphen before a number is one where nothing stands before it."""
_BEGINS = r"(?<![^\W\u2e80-\u9fff\uac00-\ud7af])(?<!\.)"
"""A number does not begin within a word, except in scripts without spaces."""
_UNIT = (
    r"(?:[kcmun]?m|[kmu]?g|lbs?|oz|ft|mi|[mc]?l|[kmgt]i?b|[num]?s|min|hrs?|h|"
    r"[kmg]?hz|[km]?wh?|[km]?v|m?ah|px|pt|x|%)"
)
_PATTERNS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("address", r"\bhttps?://[^\s<>\"')\]]+"),
        ("address", r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"),
        ("date", r"\b(?P<y>\d{4})-(?P<m>\d{2})-(?P<d>\d{2})\b"),
        ("date", r"(?<![\w.])(?P<d>\d{1,2})\.(?P<m>0?[1-9]|1[0-2])\.(?P<y>\d{4})\b"),
        ("slashed", r"(?<![\w/])(?P<m>\d{1,2})/(?P<d>\d{1,2})/(?P<y>\d{4})\b"),
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
        ("money", rf"{_SIGN}(?P<unit>[$€£¥])\s?(?P<n>{_NUMBER})(?:(?:k|m|b|bn)\b)?"),
        (
            "money",
            rf"{_SIGN}\b(?P<n>{_NUMBER})\s?(?P<unit>[$€£¥]|USD\b|EUR\b|GBP\b|dollars?\b|euros?\b|pounds?\b)",
        ),
        ("number", rf"{_SIGN}(?<![\w.])(?P<n>{_NUMBER})\s?{_UNIT}(?!\w)"),
        (
            "identifier",
            r"(?<![\w$€£¥])(?=[a-z0-9])(?=[\w-]{0,31}\d)(?=[\w-]{0,31}[a-z])(?!\d+(?:st|nd|rd|th)\b)"
            r"[a-z0-9][\w-]*\w\b",
        ),
        ("dotted", rf"{_BEGINS}\d+(?:\.\d+){{2,9}}"),
        ("number", rf"{_SIGN}{_BEGINS}(?P<n>{_NUMBER})"),
    )
)
_ADDRESSES = tuple(one for one in _PATTERNS if one[0] == "address")
"""What may have no digit."""
_DIGIT = re.compile("[0-9]")
_KINDS = {"slashed": "date", "dotted": "identifier"}
_UNITS = {"usd": "$", "dollar": "$", "eur": "€", "euro": "€", "gbp": "£", "pound": "£"}
_NAME = re.compile(r"[A-Z][\w\u2019'-]*(?:\s+(?:(?:of|de|van|von|der|la)\s+)?[A-Z][\w\u2019'-]*)*")


_ODD = re.compile(r"(?![0-9])\d|[\u2018\u2019\u02bc\uff07\u2010\u2011\u2212\uff0d\u00a0\u2007\u202f]")
"""Digits of other scripts, apostrophes, hyphens, minus signs, and spaces within numbers."""


@dataclass(frozen=True)
class Claim:
    """``kind`` and the value in its common form; ``start`` is where it stood in its text."""

    kind: str
    value: tuple[str, ...]
    start: int = 0


def extract(text: str) -> tuple[list[Claim], str]:
    """All claims with digits, and ``text`` with them blanked out (of the same length)."""
    claims: list[Claim] = []
    text = plain(text)
    for kind, pattern in _PATTERNS if _DIGIT.search(text) else _ADDRESSES:
        before = len(claims)
        for match in pattern.finditer(text):
            claims.append(Claim(_KINDS.get(kind, kind), _value(kind, match), match.start()))
        if len(claims) > before:
            text = pattern.sub(lambda match: "\0" * len(match.group()), text)
    return claims, text


def names(sentence: str, ordinary: frozenset[str]) -> Iterator[str]:
    """Capitalised names in a sentence. One word alone at its beginning is no evidence of a name.

    ``ordinary`` are words in small letters that begin no name (``the``, ``your`` …).
    """
    first = next((index for index, c in enumerate(sentence) if c.isalpha()), 0)
    for match in _NAME.finditer(sentence):
        given = match.group().split()
        begin = next((at for at, word in enumerate(given) if word.lower() not in ordinary), len(given))
        words, stripped = given[begin:], begin > 0
        if len(words) > 1 or (words and (match.start() > first or stripped)):
            yield " ".join(words)


def plain(text: str) -> str:
    """Other scripts' digits and typographers' signs as ASCII has them; of the same length."""
    return text if text.isascii() else _ODD.sub(_as_ascii, text)


def _as_ascii(odd: re.Match[str]) -> str:
    sign = odd.group()
    if sign.isdecimal():
        return str(unicodedata.decimal(sign))
    return "'" if sign in "\u2018\u2019\u02bc\uff07" else " " if sign.isspace() else "-"


def _value(kind: str, match: re.Match[str]) -> tuple[str, ...]:
    """The common form."""
    found = match.groupdict()
    if kind in ("date", "slashed"):
        month = found["m"]
        if kind == "slashed" and int(month) > 12:  # else as Americans write it
            found["d"], month = month, found["d"]
        number = int(month) if month.isdigit() else _MONTHS.index(month[:3].lower()) + 1
        return str(int(found["d"])), str(number), found["y"] or ""
    if kind == "time":
        hour = int(found["h"])
        if found["half"]:
            hour = hour % 12 + (12 if found["half"].lower() == "p" else 0)
        return f"{hour}:{found['min'] or '00'}", ""
    if kind == "money":
        unit = found["unit"].lower()
        return (found["sign"] or "") + _number(found["n"]), _UNITS.get(unit.rstrip("s"), unit)
    if kind == "number":
        return (found["sign"] or "") + _number(found["n"]), ""
    if kind == "address":
        return (match.group().lower().rstrip(".,;:!?/"),)
    return (match.group().lower(),)


def _number(text: str) -> str:
    text = text.replace(",", "")
    return text.rstrip("0").rstrip(".") if "." in text else text
