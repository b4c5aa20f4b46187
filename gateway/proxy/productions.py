"""How much a grammar stands for: one of Lark's kind, or of GBNF's and EBNF's (``::=``).

Two sizes, by the two ways in which few letters keep an engine busy (vLLM 0.32; ``grammars.py`` bounds them):

- ``grown``: parts that counted repetitions add when they are written out. What a rule refers to is one part:
  xgrammar computes each rule once, and takes the square of a count for it.
- ``forced``: the most letters that an answer may have left to come, at any place of it, whatever is chosen
  there. llguidance looks ahead at text that has to come, a microsecond a letter, before the first token of
  anybody. So references are written out here: ``A: B~100``, ``B: C~100``, ``C: "x"~100`` force a million.

What may be left out or be shorter forces nothing: the twenty levels of a programming language's expressions,
each of which has the one below twice, come to a few letters. What a rule has of itself within it is one part.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import NamedTuple

from gateway.proxy.scan import Steps

MOST = 1 << 40
"""Sizes are not told apart beyond."""
_AT_ONCE = 50
"""Tokens, or rules, of one step."""
_DIGITS = 12
_COMMENT = r"(?:\#|//)[^\n]*+"
_GAP = rf"(?:\s|{_COMMENT}\n)*+"
"""What may stand anywhere."""
_CLASS = r"\[(?:\\.|[^\]\\])*+(?:\]|\\?\Z)"
_RULES = (
    rf"(?P<apart>(?:\A|\n)[^\S\n]*+[?!](?=\w)|\s|{_COMMENT}|->\s*+\w*+)"
    r'|(?P<text>"(?:\\.|[^"\\])*+(?:"i?|\\?\Z))'
    rf"|(?P<count>\{{(?:[\s\d,]|{_COMMENT}\n)*+\}}|~{_GAP}\+?\d++(?:{_GAP}\.\.{_GAP}\+?\d++)?)"
    r"|(?P<unsure>%\w++|<[^<>\n]{1,200}+>)"
    r"|(?P<name>\w++(?:-\w++)*+)(?P<defined>(?:\.-?\d{1,9}+)?\s*+(?:\[[^\]\n]{0,200}+\]\s*+)?(?:::=|:(?!:)))?"
)
_LARK = re.compile(
    _RULES + r"|(?P<regex>/(?:\\.|[^/\\\n])*+(?:/[a-z]*+|(?=\n)|\\?\Z))"
    r"|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<other>.)",
    re.DOTALL,
)
_EBNF = re.compile(
    rf"{_RULES}|(?P<class>{_CLASS})|(?P<open>[({{])|(?P<close>[)}}])|(?P<other>.)",
    re.DOTALL,
)
_PATTERN = re.compile(
    r"(?P<count>\{\s*+\d*+\s*+,?\s*+\d*+\s*+\})|(?P<open>\((?:\?(?:[\w-]{0,9}+:|P?<\w{1,99}+>))?+)|(?P<close>\))"
    rf"|(?P<class>{_CLASS}|\\.)|(?P<other>.)",
    re.DOTALL,
)
_SURE = re.compile(
    r"\[(?!\^)(?:[^\[\]\\&-]|-(?!-)|\\[^PpbB])++\]"
    r"|\[\^(?:[^\\\[\]&-]|\w-\w|\\[nrt\"'/\\\]\[-])++\]|\\[^PpbB]",
    re.DOTALL,
)
"""Classes and escapes that something matches for certain."""
_NUMBER = re.compile(r"\d++")
_NO_PARTS = frozenset("!:=,;")


class Size(NamedTuple):
    """Of a part, in letters, and never less than it is."""

    least: int = 0
    """Of what matches it, the shortest."""
    most: int = 0
    """At the place where most of it has still to come."""
    sure: bool = True
    """Something certainly matches it: else there is no choosing it."""
    written: int = 0
    """Parts, with counted repetitions written out and references not."""


NOTHING = Size()
ONE = Size(1, 1, written=1)
_PERHAPS = ONE._replace(sure=False)
_Reading = Generator[str | None, Size | None, Size]
"""Yields names of rules, whose sizes it is sent, and None to rest."""


def sizes(grammar: str) -> Steps[tuple[int, int]]:
    """``grown`` and ``forced``, neither more than ``MOST``, in time in proportion to the grammar's length."""
    grown, forced = yield from _Rules(grammar, _LARK).sizes()
    if "::=" in grammar:  # engines are not of one mind as to what that says in a text or a comment
        other = yield from _Rules(grammar, _EBNF).sizes()
        grown, forced = max(grown, other[0]), max(forced, other[1])
    return grown, forced


class _Rules:
    def __init__(self, grammar: str, tokens: re.Pattern[str]) -> None:
        self._grammar = grammar
        self._tokens = tokens
        self._rules: dict[str, list[re.Match[str]]] = {}
        self._known: dict[str, Size] = {}
        self._parts = self._written = self._most = 0
        """Of all rules together."""

    def sizes(self) -> Steps[tuple[int, int]]:
        rule = self._rules[""] = []
        for count, token in enumerate(self._tokens.finditer(self._grammar), 1):
            if not count % _AT_ONCE:
                yield
            if token.lastgroup == "defined":
                known = self._rules.get(token["name"])
                rule = self._rules.setdefault(token["name"], [])
                if known:
                    known.append(token)  # this is an alternative to what it was before
            elif token.lastgroup != "apart":
                rule.append(token)
        for count, name in enumerate(self._rules, 1):
            if not count % _AT_ONCE:
                yield
            yield from self._look(name)
        return min(self._written - self._parts, MOST), self._most

    def _look(self, name: str) -> Steps[None]:
        """Know a rule, and all that it refers to. However deep that goes, it is no recursion."""
        if name in self._known:
            return
        under_way = {name: self._read(self._rules[name])}
        answer: Size | None = None
        turns = 0
        while under_way:
            turns += 1
            if not turns % _AT_ONCE:
                yield
            last = next(reversed(under_way))
            try:
                wanted = under_way[last].send(answer)
            except StopIteration as end:
                answer = self._known[last] = end.value
                del under_way[last]
                self._written += answer.written
                self._most = max(self._most, answer.most)
                continue
            answer = None
            if wanted is None:
                yield
            elif wanted in self._known:
                answer = self._known[wanted]
            elif wanted in under_way or wanted not in self._rules:
                answer = _PERHAPS
            else:
                under_way[wanted] = self._read(self._rules[wanted])

    def _read(self, tokens: Iterable[re.Match[str]]) -> _Reading:
        outer: list[_Group] = []
        group = _Group()
        for count, token in enumerate(tokens, 1):
            if not count % _AT_ONCE:
                yield None
            kind, text = token.lastgroup, token.group()
            if kind == "open":
                outer.append(group)
                group = _Group()
            elif kind == "close":
                if outer:
                    inner, group = group.size(), outer.pop()
                    group.add(_optional(inner) if text == "]" else inner)
            elif kind == "count":
                group.repeat(*_counts(text))
            elif kind == "unsure":
                group.unsure = True
            elif kind == "defined":
                group, outer = _closed([*outer, group]), []
                group.other()
            elif kind == "other" and group.sign(text):
                pass
            else:
                group.add((yield from self._part(kind, text)))
        return _closed([*outer, group]).size()

    def _part(self, kind: str | None, text: str) -> _Reading:
        if kind == "regex":
            return (yield from self._read(_PATTERN.finditer(text[1:].rpartition("/")[0] or text[1:])))
        self._parts += 1
        if kind == "name":
            return ((yield text) or ONE)._replace(written=1)
        if kind == "text":
            length = max(0, len(text) - 2)
            return Size(length, length, written=1)
        return ONE if kind == "other" or _SURE.match(text) else _PERHAPS


class _Group:
    """What is read of one group: its last part, what of its alternative comes before that, and the other
    alternatives."""

    __slots__ = ("_before", "_last", "_others", "unsure")

    def __init__(self) -> None:
        self._others: Size | None = None
        self._before = self._last = NOTHING
        self.unsure = False
        """Something is in it that nothing may match."""

    def add(self, part: Size) -> None:
        self._before, self._last = _joined(self._before, self._last), part

    def repeat(self, least: int, most: int) -> None:
        self._last = _repeated(self._last, least, most)

    def other(self) -> None:
        """The next alternative begins."""
        self._others = self.size()
        self._before = self._last = NOTHING

    def sign(self, text: str) -> bool:
        """Whether it is a sign, and no part."""
        if text in "|&":
            self.unsure = self.unsure or text == "&"
            self.other()
        elif text in "?*":
            self._last = _optional(self._last)
        elif text == "~":
            self.unsure = True
        else:
            return text == "+" or text in _NO_PARTS
        return True

    def size(self) -> Size:
        own = _joined(self._before, self._last)
        if self.unsure:
            own = own._replace(sure=False)
        return own if self._others is None else _either(self._others, own)


def _closed(groups: list[_Group]) -> _Group:
    """The outermost of groups that nothing has closed."""
    while len(groups) > 1:
        inner = groups.pop().size()
        groups[-1].add(inner)
    return groups[0]


def _joined(one: Size, two: Size) -> Size:
    return Size(
        min(one.least + two.least, MOST),
        min(max(one.most + two.least, two.most), MOST),
        one.sure and two.sure,
        min(one.written + two.written, MOST),
    )


def _either(one: Size, two: Size) -> Size:
    least = max(one.least, two.least)
    if one.sure or two.sure:
        least = min(size.least for size in (one, two) if size.sure)
    written = min(one.written + two.written, MOST)
    return Size(least, max(one.most, two.most), one.sure or two.sure, written)


def _optional(part: Size) -> Size:
    return part._replace(least=0, sure=True)


def _repeated(part: Size, least: int, most: int) -> Size:
    """``most``: the count that is written out, where there is one."""
    written = min(part.written * max(least, most, 1), MOST)
    if not least:
        return _optional(part)._replace(written=written)
    more = part.least * (least - 1)
    return Size(min(part.least + more, MOST), min(part.most + more, MOST), part.sure, written)


def _counts(text: str) -> tuple[int, int]:
    """The least and the most of a counted repetition; no most where it has no end."""
    plain = re.sub(_COMMENT, "", text, flags=re.DOTALL)
    found = [MOST if len(number) > _DIGITS else int(number) for number in _NUMBER.findall(plain)]
    if not found:
        return (0, 0) if "," in plain else (1, 1)
    least = 0 if plain.strip("{ \t\r\n").startswith(",") else found[0]
    return least, found[-1]
