"""What is taken out of a text before it is kept: nothing of these forms survives, and nothing is slow."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import ConfigError, KeptSettings
from gateway.kept.patterns import Pattern, PatternError
from gateway.kept.redact import ALL_OF_IT, Redactor, _luhn, left, own_pattern

PLAIN = Redactor()
CARDS = ("4111111111111111", "5500 0055 5555 5559", "3400-0000-0000-009", "6011000990139424")
IBANS = ("DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "fr14 2004 1010 0505 0001 3m02 606")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("write to bob.smith+x@mail.example.co.uk.", "write to [email]."),
        ("bob%40example.com and anna@bücher.de", "[email] and [email]"),
        (r"{\"mail\": \"bob\u0040example.com\"}", r"{\"mail\": \"[email]\"}"),
        ("call +49 (0)170 123-4567 now", "call [phone] now"),
        ("call 0049 170 1234567, 0170/1234567 or (555) 123-4567", "call [phone], [phone] or [phone]"),
        ("French: 01.23.45.67.89", "French: [phone]"),
        ("card 4111 1111 1111 1111, thanks", "card [card], thanks"),
        ("no card 4111 1111 1111 1112, thanks", "no card 4111 1111 1111 1112, thanks"),
        ("DE89 3704 0044 0532 0130 00 IS MINE", "[iban] IS MINE"),
        ("no iban DE88 3704 6044 5532 6130 66", "no iban DE88 3704 6044 5532 6130 66"),
        ("AB12 TEXT GB82WEST12345698765432", "AB12 TEXT [iban]"),
        ("from 192.168.0.1:80 and fe80::1, ::1", "from [ip]:80 and [ip], [ip]"),
        ("std::vector at 12:30:45 on 2026-11-26", "std::vector at 12:30:45 on 2026-11-26"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: [key]"),
        ("sk-proj_abcDEF012345, ghp_0123456789abcdef, AKIAIOSFODNN7EXAMPLE", "[key], [key], [key]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.sig-na_ture", "[key]"),
        ("password: hunter22! and API_KEY=xyz-123-abc", "[key] and [key]"),
        ("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b", "[key]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpA\n-----END RSA PRIVATE KEY-----", "[key]"),
        ("Order C2390: 3 pieces, total $277.50, due 2026-12-01", None),
        ("a basic understanding of bearers in Unicode 15.1", None),
    ],
)
def test_what_says_who_somebody_is_is_replaced_and_the_rest_stays(text: str, kept: str | None) -> None:
    assert PLAIN.text(text) == (text if kept is None else kept)


SECRETS = st.one_of(
    st.from_regex(r"[a-z0-9]{1,12}@[a-z]{1,8}\.(com|de|org)", fullmatch=True),
    st.from_regex(r"\+[1-9][0-9]{8,12}", fullmatch=True),
    st.sampled_from(CARDS + IBANS),
    st.ip_addresses(v=4).map(str),
    st.from_regex(r"sk-[A-Za-z0-9]{20,40}", fullmatch=True),
)
AROUND = st.text(st.sampled_from("abz XYZ 0189 .,;:()[]{}<>\"'\n-_/+@"), max_size=30)


@given(before=AROUND, secret=SECRETS, after=AROUND)
@settings(max_examples=300, deadline=None)
def test_no_secret_survives_between_spaces_whatever_is_beside_it(
    before: str, secret: str, after: str
) -> None:
    assert secret not in PLAIN.text(f"{before} {secret} {after}")


@given(st.one_of(st.text(max_size=200), st.lists(st.one_of(SECRETS, AROUND), max_size=8).map("".join)))
@settings(max_examples=400, deadline=None)
def test_nothing_is_found_in_what_was_redacted(text: str) -> None:
    once = PLAIN.text(text)
    assert PLAIN.text(once) == once


@given(st.text(st.sampled_from("ab12 -"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_match_of_ones_own_pattern_survives(text: str) -> None:
    own = Redactor((r"a+b?\d{2}", r"(?i)[B-C]1|2-2"))
    found = own.text(text).replace("[private]", "\n")
    assert not re.search(r"a+b?\d{2}|(?i:[B-C]1|2-2)", found)


def test_everything_within_json_is_looked_at() -> None:
    value: Any = {"a@b.com": [4111111111111111, 7, None, True, 1.5, {"x": "10.0.0.1"}]}
    assert PLAIN.value(value) == {"[email]": ["[card]", 7, None, True, 1.5, {"x": "[ip]"}]}


def test_what_is_laid_bare_again_and_again_is_given_up_in_whole() -> None:
    assert Redactor((r"[a-c]\[",)).text("abc" * 5 + "[") == ALL_OF_IT


def test_a_text_of_placeholders_alone_has_nothing_left() -> None:
    assert left(PLAIN.text("bob@example.com  +491701234567")) == ""
    assert left(PLAIN.text("hello bob@example.com")) == "hello"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=24), st.data())
def test_luhns_check_of_any_part_is_the_check_of_its_digits(digits: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(digits) - 1))
    end = data.draw(st.integers(start + 1, len(digits)))
    total = 0
    for number, digit in enumerate(reversed(digits[start:end])):
        total += sum(map(int, str(digit * (1 + number % 2))))
    assert _luhn(digits)(start, end) == (total % 10 == 0 and any(digits[start:end]))


# patterns of one's own

EXPRESSIONS = (
    *("qwx", "q|w", "(?:qw)+", "q{2,3}w?", r"\bqw\b", "^q", "w$", "[qw]+1"),
    *("q.w", r"\d+q", "(q|qw)(x|wxz)*", "q*w", "(?i)QW"),
)
"""Of letters that no placeholder has."""


@given(expression=st.sampled_from(EXPRESSIONS), text=st.text(st.sampled_from("qwxz1 \nQWé"), max_size=24))
@settings(max_examples=600, deadline=None)
def test_nothing_that_a_pattern_matches_is_left(expression: str, text: str) -> None:
    """By Python's own matcher, which finds the same first match; words are ASCII's, as in RE2."""
    flags = re.ASCII | re.DOTALL | re.MULTILINE | (re.IGNORECASE if expression.startswith("(?i)") else 0)
    found = re.compile(expression.removeprefix("(?i)"), flags)
    spans = Pattern(expression).spans(text)
    assert [start for start, _ in spans][:1] == [one.start() for one in found.finditer(text)][:1]
    left_over = Redactor((expression,)).text(text)
    assert left_over == ALL_OF_IT or found.search(left_over) is None


@pytest.mark.parametrize("expression", ["(a+)+b", "(a|aa)+b", "(.*)*x", "(a*)*(a*)*b", r"(\w+\s?)+$x"])
def test_a_pattern_that_others_never_finish_is_soon_done(expression: str) -> None:
    pattern = Pattern(expression)
    assert pattern.spans("a" * 5000) == []
    assert pattern.spans("a" * 100 + "b x") or not expression.endswith("b")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("a*", "matches an empty text"),
        ("(?=a)", "look-around"),
        (r"(a)\1", "back-references"),
        ("(a", "missing )"),
        ("a)", "unexpected )"),
        ("a)|(b", "unexpected )"),
        ("*a", "no argument for repetition operator"),
        ("a++", "possessive"),
        ("a{3,2}", "invalid repetition size"),
        ("[b-a]", "invalid character class range"),
        ("[a", "missing ]"),
        ("(?:abc){2000}", "invalid repetition size"),
        ("priv", "matches [private]"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_in_words(expression: str, words: str) -> None:
    with pytest.raises(PatternError, match=re.escape(words)):
        own_pattern(expression)
    with pytest.raises(ValueError, match=re.escape(words)):
        KeptSettings(redact=(expression,))
    assert issubclass(ConfigError, ValueError)
