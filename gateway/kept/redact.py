"""Takes out of a text what says who somebody is or lets somebody in: by form alone, each replaced by a
constant.

Addresses, numbers and keys have a form, names of people and places have none and stay. Every pattern here is
bounded or takes each character once, and those of the user are matched in linear time
(:mod:`gateway.kept.patterns`): no text can make this slow.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from itertools import accumulate
from typing import Any

from gateway.kept.patterns import Pattern, PatternError

EMAIL, PHONE, CARD, IBAN, IP, KEY, PRIVATE = (
    "[email]", "[phone]", "[card]", "[iban]", "[ip]", "[key]", "[private]"
)  # fmt: skip
PLACEHOLDERS = (EMAIL, PHONE, CARD, IBAN, IP, KEY, PRIVATE)
ALL_OF_IT = "[redacted]"
"""Instead of a text in which something is found again and again."""
ROUNDS = 8
"""What is replaced may lay bare what stood beside it."""

_EMAIL = re.compile(r"[\w.%+'-]{1,64}(?:@|%40|\\u0040)(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,63}")
_PHONES = re.compile(
    # international; with the zero of a trunk; in the groups of North America
    r"(?<![\w+])(?:\+|00)\d(?:[ ().\u00a0-]{0,2}\d){6,14}(?!\d)"
    r"|(?<![\w.,])\(?0\d(?:[ ()./\u00a0-]{0,2}\d){7,13}(?!\d)"
    r"|(?<!\w)(?:1[ .-]?)?\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}(?!\d)"
)
_DIGITS = re.compile(r"\d(?:[ \u00a0-]?\d)*+")
_IBAN_BEGINS = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9])")
_IBAN = re.compile(r"[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_IPV4 = re.compile(
    r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\d)(?!\.\d)"
)
_IPV6 = re.compile(r"(?<![\w:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]*+(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
    r"|(?<![A-Za-z])(?i:bearer|basic)[ ]{1,4}(?=[A-Za-z._~+/=-]*+\d)[A-Za-z0-9._~+/=-]{8,}+"
    r"|(?<![A-Za-z0-9_-])(?:sk|pk|rk|tk|hf|gsk|xai|glpat|gh[pousr]|github_pat|xox[abeprs])"
    r"[-_][A-Za-z0-9_-]{10,}+"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA|AIza)[A-Za-z0-9_-]{12,}+"
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{4,}+(?:\.[A-Za-z0-9_-]*+)?"
    r"|(?i:(?:api|access|secret|private)[_ -]?key|secret|token|passw(?:or)?d|pwd|passphrase)"
    r"[\"']?[ ]{0,2}[:=][ ]{0,2}[\"']?[^\s\"'\[\],;]{6,}+"
)
_LONG = re.compile(r"[A-Za-z0-9_-]{32,}+")
"""What may be a key by its length; it is one where it has letters and digits."""

Find = Callable[[str], Iterator[tuple[int, int]]]


class Redactor:
    """Replaces what is found, by the patterns here and those of the user."""

    def __init__(self, own: Sequence[str] = ()) -> None:
        """Raises PatternError."""
        self._own = tuple(own_pattern(one) for one in own)

    def text(self, text: str) -> str:
        """The text without what was found. What this gives is not changed when it is given again."""
        for _ in range(ROUNDS):
            before = text
            for pattern in self._own:
                text = _replaced(text, iter(pattern.spans(text)), PRIVATE)
            for find, placeholder in _FINDERS:
                text = _replaced(text, find(text), placeholder)
            if text == before:
                return text
        return ALL_OF_IT

    def value(self, value: Any) -> Any:
        """The same of every text and number within JSON, names of fields among them."""
        match value:
            case str():
                return self.text(value)
            case bool() | None:
                return value
            case int() | float():
                text = str(value)
                found = self.text(text)
                return value if found == text else found
            case dict():
                return {self.text(str(name)): self.value(one) for name, one in value.items()}
            case list() | tuple():
                return [self.value(one) for one in value]
            case _:
                raise TypeError(f"{type(value).__name__} is no JSON")


@functools.lru_cache(maxsize=64)
def redactor(own: tuple[str, ...]) -> Redactor:
    """Kept, since patterns change seldom. Raises PatternError."""
    return Redactor(own)


@functools.lru_cache(maxsize=256)
def own_pattern(text: str) -> Pattern:
    """A user's pattern. Raises PatternError."""
    pattern = Pattern(text)
    for placeholder in (*PLACEHOLDERS, ALL_OF_IT):
        if pattern.spans(placeholder):
            raise PatternError(
                f"matches {placeholder}, which stands for what was taken out; let it match less"
            )
    return pattern


def left(text: str) -> str:
    """What is left of a redacted text without its placeholders."""
    for placeholder in (*PLACEHOLDERS, ALL_OF_IT):
        text = text.replace(placeholder, "")
    return text.strip()


def _replaced(text: str, spans: Iterator[tuple[int, int]], placeholder: str) -> str:
    parts, at = [], 0
    for start, end in spans:
        parts += [text[at:start], placeholder]
        at = end
    return "".join([*parts, text[at:]]) if parts else text


def _by(pattern: re.Pattern[str], holds: Callable[[str], bool] = lambda _: True) -> Find:
    def find(text: str) -> Iterator[tuple[int, int]]:
        return (found.span() for found in pattern.finditer(text) if holds(found[0]))

    return find


def _cards(text: str) -> Iterator[tuple[int, int]]:
    """13 to 19 digits that pass Luhn's check, in groups or not, also beside other groups of digits."""
    for run in _DIGITS.finditer(text):
        places = [at for at in range(*run.span()) if text[at].isdigit()]
        if len(places) < 13:
            continue
        passes = _luhn([int(text[at]) for at in places])
        alone = [_alone(places, number) for number in range(len(places) + 1)]
        number = 0
        while number + 13 <= len(places):
            most = min(19, len(places) - number) if alone[number] else 0
            counts = range(most, 12, -1)
            ends = (one for one in counts if alone[number + one] and passes(number, number + one))
            count = next(ends, 1)
            if count > 1:
                yield places[number], places[number + count - 1] + 1
            number += count


def _alone(places: Sequence[int], number: int) -> bool:
    """Whether a group of digits may begin or end between two digits."""
    return number in (0, len(places)) or places[number] - places[number - 1] > 1


def _luhn(digits: Sequence[int]) -> Callable[[int, int], bool]:
    """Whether the digits from one place to another pass the check, said in constant time: by sums up to every
    place, of which every other digit is doubled, the even ones or the odd ones."""
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits]
    sums = []
    for parity in (0, 1):
        mixed = (doubled[n] if n % 2 != parity else digits[n] for n in range(len(digits)))
        sums.append([0, *accumulate(mixed)])
    plain = [0, *accumulate(digits)]

    def passes(start: int, end: int) -> bool:
        mine = sums[(end - 1) % 2]  # the last digit is not doubled
        return (mine[end] - mine[start]) % 10 == 0 and plain[end] > plain[start]

    return passes


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    at = 0
    while (begins := _IBAN_BEGINS.search(text, at)) is not None:
        at = begins.end()
        whole = _IBAN.match(text, begins.start())
        if whole is None:
            continue
        for end in range(whole.end(), begins.start() + 14, -1):
            inside = end < len(text) and text[end].isalnum()
            if not inside and _mod_97(text[begins.start() : end]):
                yield begins.start(), end
                at = end
                break


def _mod_97(text: str) -> bool:
    plain = text.replace(" ", "").replace("-", "").upper()
    if not text[-1].isalnum() or not 15 <= len(plain) <= 34 or not plain.isascii():
        return False
    return int("".join(str(int(one, 36)) for one in plain[4:] + plain[:4])) % 97 == 1


def _is_ipv6(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return any(one.isdigit() for one in text)


def _is_long_key(text: str) -> bool:
    return any(one.isdigit() for one in text) and any(one.isalpha() for one in text)


_FINDERS: tuple[tuple[Find, str], ...] = (
    (_by(_KEYS), KEY),
    (_by(_EMAIL), EMAIL),
    (_by(_LONG, _is_long_key), KEY),
    (_ibans, IBAN),
    (_cards, CARD),
    (_by(_IPV4), IP),
    (_by(_IPV6, _is_ipv6), IP),
    (_by(_PHONES), PHONE),
)
