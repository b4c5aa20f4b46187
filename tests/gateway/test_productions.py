"""Grammars that would keep an engine busy are known by what they stand for, and ordinary ones are small."""

from __future__ import annotations

from time import perf_counter, thread_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grammars import done, refused

from gateway.proxy.productions import MOST, sizes

Grammar = tuple[str, int]
"""A part of one, and the letters of the shortest text that it matches."""


@pytest.mark.parametrize(
    ("grammar", "grown", "forced"),
    [
        ("", 0, 0),
        ('start: "abc"', 0, 3),
        ('start: "abc"~9', 8, 27),
        ('start: A~9\nA: "ab"~9', 16, 162),
        ("start: A\nA: B~100\nB: C~100\nC: /x{100}/", 297, 10**6),
        ('root ::= a{100}\na ::= b{100}\nb ::= "x"{100}', 297, 10**6),
        ('start: (("b"~9 ")") "c")~9 "d"', 96, 100),
        ('start: ("b"~9 "(")~9', 88, 90),
        ('start: ("b"~9 /[)]/ "c")~9', 96, 99),
        ('root ::= ("b"{9} [)] "c"){9}', 96, 99),
        ('root ::= ("b"{9} "\\")" "c"){9}', 96, 117),
        ('start: "b" // it ~9 ("\n ~ 9', 8, 9),
        ('start: "b" # it ~9 ("\n {9}', 8, 9),
        ('start: "b"~2..9', 8, 2),
        ('start: "b"{,9}', 8, 1),
        ('start: "b"{2,}', 1, 2),
        ('start: ["b"~9] "c"', 8, 10),
        ('start: "bbb"? "c"', 0, 4),
        ('start: "bbb" | "c"', 0, 3),
        ('start: ("bbb" | "c")~9', 16, 11),
        ('start: ("bbb" | "c" /[^\\s\\S]/)~9', 24, 27),
        ('start: ("bbb" | "c" & "d")~9', 24, 27),
        ("start: (A | b)~9\nA: B~9\nB: A", 24, 81),
        ('start: a\na: "x" a | "y"', 0, 2),
        ("start: a~9\n", 8, 9),
        ("\n".join(f"A{at}: A{at + 1} A{at + 1}" for at in range(20)) + '\nA20: "x"', 0, 1 << 20),
        ("\n".join(f"A{at}: A{at + 1}~1000" for at in range(99)) + '\nA99: "x"', 99 * 999, MOST),
        ("start: A~" + "9" * 900, MOST - 1, MOST),
        ('start: "::=" A~9\nA: "x"~9', 16, 84),
        ('a.1: "x"~9\n?b: "x" -> a\n c[stop="a"]: a~9\nd: %json {"const": "x"} <a>', 16, 81),
    ],
)
def test_what_a_grammar_stands_for(grammar: str, grown: int, forced: int) -> None:
    assert done(sizes(grammar)) == (grown, forced)


def _repeated(part: Grammar, low: int, more: int) -> Grammar:
    return f"({part[0]}){{{low},{low + more}}}", part[1] * low


def _named(parts: list[Grammar], either: bool) -> Grammar:
    texts, sizes = zip(*parts, strict=True)
    return (" | " if either else " ").join(texts), min(sizes) if either else sum(sizes)


PARTS: st.SearchStrategy[Grammar] = st.recursive(
    st.sampled_from(
        [('"a"', 1), ('"({"', 2), ('"b"?', 0), ('"\\""', 2), ("/a[)]/", 2), ("/(a|bc){2,9}/", 2)]
    ),
    lambda inner: st.one_of(
        st.builds(_repeated, inner, st.integers(0, 9), st.integers(0, 9)),
        st.builds(_named, st.lists(inner, min_size=1, max_size=4), st.booleans()).map(
            lambda part: (f"({part[0]})", part[1])
        ),
    ),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(PARTS, PARTS)
def test_it_is_never_less_than_the_shortest_answer(one: Grammar, two: Grammar) -> None:
    """The longest that has to come is at least that, whether rules are referred to or written out."""
    apart = done(sizes(f"start: A~3 B\nA: {one[0]}\nB: {two[0]}"))[1]
    whole = done(sizes(f"start: ({one[0]})~3 {two[0]}"))[1]
    assert apart == whole >= 3 * one[1] + two[1]


LEVELS = ["or", "and", "not", "in", "<", "|", "^", "&", "<<", "+", "*", "**", "await", ".", "@", "~"]
PYTHON = "\n".join(
    f'level{at}: level{at + 1} ("{sign}" level{at + 1})*' for at, sign in enumerate(LEVELS)
) + (
    f'\nlevel{len(LEVELS)}: NAME | NUMBER | STRING | "(" level0 ")" | "[" [level0 ("," level0)*] "]"'
    '\nNAME: /[^\\W\\d]\\w{0,60}/\nNUMBER: /[0-9]{1,20}(\\.[0-9]{1,20})?/\nSTRING: /"[^"\\n]{0,90}"/'
    '\nDATE: DIGIT~4 "-" DIGIT~2\nDIGIT: "0".."9"\n%ignore " "'
)
"""Every level of which has the next one twice."""
GBNF = (
    'root ::= "{" space pair ("," space pair){0,98} "}" space\n'
    'pair ::= string ":" space (string | array | [0-9]{1,15}) space\n'
    'array ::= "[" space (string ("," space string){0,98})? "]" space\n'
    'string ::= "\\"" char{0,200} "\\"" space\n'
    'char ::= [^"\\\\\\x7F\\x00-\\x1F] | "\\\\" (["\\\\bfnrt] | "u" [0-9a-fA-F]{4})\n'
    'space ::= | " " | "\\n" [ \\t]{0,20}\n'
)
"""As converters of JSON schemas write it."""


@pytest.mark.parametrize("grammar", [PYTHON, GBNF, PYTHON + "\n// " + "x" * 50_000, 'start: "x"~1000'])
def test_ordinary_grammars_are_taken(grammar: str) -> None:
    assert refused({"structured_outputs": {"grammar": grammar}}) is None
    assert refused({"response_format": {"type": "structural_tag", "grammar": grammar}}) is None


TWICE = "start: A0\n" + "\n".join(f"A{at}: A{at + 1} A{at + 1}" for at in range(20)) + '\nA20: "x"'
"""A million letters, without any count."""


@pytest.mark.parametrize(
    "grammar",
    [
        TWICE,
        'start: A\nA: B~100\nB: C~100\nC: "x"~100',
        'root ::= a{100}\na ::= b{100}\nb ::= ("x"{50} ")" "x"{50})',
        'start: A\nA: B~100\nB: C~100\nC: ("x" | /[^\\s\\S]/)~100',
    ],
)
def test_what_an_engine_would_look_ahead_at_for_long_is_refused(grammar: str) -> None:
    for body in (
        {"structured_outputs": {"grammar": grammar}},
        {"tools": [{"custom": {"format": {"definition": grammar}}}]},
    ):
        said = refused(body)
        assert said is not None
        assert "gateway.max_schema_count" in said
        assert len(said) < 500


def test_brackets_in_texts_hide_nothing() -> None:
    """This one counted as two hundred letters."""
    said = refused({"structured_outputs": {"grammar": 'start: ("b"~99 ")" "c")~99'}})
    assert said is not None
    assert "gateway.max_pattern_size" in said


def test_a_grammar_is_no_longer_than_it_can_be_read() -> None:
    said = refused({"structured_outputs": {"grammar": "x " * 100_000}})
    assert said is not None
    assert "has 200,000 letters; a grammar may have 131,072" in said
    assert refused({"structured_outputs": {"grammar": "x " * 50_000}}) is None


HOSTILE = [
    '"', "/", "[", "(", "{", "{#", "{ ", "{1 ", "~ ", "~ #\n", "a ", "a[", "a: a ", "a\n:", "x: y\ny: x\n",
    "a::", "<a", '"\\', "/\\", "[\\", "-> ", "%", "a-", "~1..", "|", "(?", "/(?", "{,", "\\", "//\n", "a.1",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("end", ["", " ::= "])
def test_nothing_is_read_again_and_again(text: str, end: str) -> None:
    for grammar in (text * 10_000 + end, text + " " * 30_000 + end, text * 9 + "a: b\n" * 6000 + end):
        began = perf_counter()
        done(sizes(grammar))
        assert perf_counter() - began < 2


def test_a_step_is_short_and_rules_may_refer_to_each_other_however_deeply() -> None:
    chain = "\n".join(f"r{at}: r{at + 1} x" for at in range(10_000))
    took, steps = [], sizes(chain + '\nr10000: "x"')
    while True:
        began = thread_time()
        try:
            next(steps)
        except StopIteration as end:
            found = end.value
            break
        took.append(thread_time() - began)
    assert found == (0, 10_001)
    assert sorted(took)[-10] < 0.005


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*HOSTILE, "~9", "{9}", "::=", ")", "]", "}", "?", "&"]), max_size=30))
def test_no_text_breaks_it(pieces: list[Any]) -> None:
    grown, forced = done(sizes("".join(pieces)))
    assert grown >= 0 <= forced
