"""Regular expressions that are matched in time linear in the text, whatever the expression.

All ways to match are followed at once, a character at a time (Thompson 1968); of those that have come to the
same place the one that began first is kept. So what is found is every character that any match covers, which
is what redaction wants: nothing that matches is left. Look-around and back-references cannot be matched so,
and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MOST_STEPS = 2000
"""Steps of a compiled pattern, in which ``{m,n}`` is written out."""
_REMEMBERED = 4096
_QUANTIFIER = re.compile(r"\*|\+|\?|\{(\d{1,4})(?:(,)(\d{1,4})?)?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPED = re.compile(r"\\(?:[dDwWsSntrfv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^A-Za-z0-9])", re.DOTALL)
_ANY = re.compile(".", re.DOTALL)
_ASSERTIONS = {"^": "^", "$": "$", r"\A": "^", r"\Z": "$", r"\b": r"\b", r"\B": r"\B"}


class PatternError(ValueError):
    """A pattern cannot be used. The text says why, and the fix."""


@dataclass(frozen=True)
class _Character:
    """One character; ``text`` is an expression of it."""

    text: str


@dataclass(frozen=True)
class _Assertion:
    what: str


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    options: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    node: _Node
    least: int
    most: int | None


_Node = _Character | _Assertion | _Sequence | _Choice | _Repeat


class _Reader:
    """Reads an expression. Raises PatternError."""

    def __init__(self, text: str, at: int) -> None:
        self._text, self._at = text, at

    def whole(self) -> _Node:
        node = self._choice()
        if self._at < len(self._text):
            raise PatternError("has a ) without a (; take it out, or write \\)")
        return node

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return _Sequence(tuple(parts))

    def _quantified(self, node: _Node) -> _Node:
        found = _QUANTIFIER.match(self._text, self._at)
        if found is None:
            return node
        self._at = found.end()
        if self._peek() == "+":
            raise PatternError("possessive quantifiers are not known here; leave their + out")
        if self._peek() == "?":
            self._at += 1  # lazy or not: what any match covers is found
        if _QUANTIFIER.match(self._text, self._at):
            raise PatternError("has a quantifier after a quantifier; put the first one in (?:…)")
        if found[0] in "*+?":
            return _Repeat(node, int(found[0] == "+"), 1 if found[0] == "?" else None)
        least = int(found[1])
        most = int(found[3]) if found[3] else None if found[2] else least
        if most is not None and (most < least or most == 0):
            raise PatternError(
                f"{found[0]} repeats nothing; give a range that begins with the smaller number"
            )
        return _Repeat(node, least, most)

    def _atom(self) -> _Node:
        text, at = self._text, self._at
        character = text[at]
        if character == "(":
            return self._group()
        if character in "*+?" or (character == "{" and _QUANTIFIER.match(text, at)):
            raise PatternError(f"has {character!r} after nothing; write \\{character} for the character")
        for what in (character, text[at : at + 2]):
            if what in _ASSERTIONS:
                self._at += len(what)
                return _Assertion(_ASSERTIONS[what])
        kind = {"[": _CLASS, "\\": _ESCAPED}.get(character, _ANY)
        found = kind.match(text, at)
        if found is None:
            raise PatternError(
                f"{text[at : at + 4]!r} is not known here; classes, escapes such as \\d, groups and "
                "quantifiers are, look-around and back-references are not"
            )
        self._at = found.end()
        return _Character(found[0] if character in "[\\." else re.escape(found[0]))

    def _group(self) -> _Node:
        if self._text.startswith("(?:", self._at):
            self._at += 3
        elif self._text.startswith("(?", self._at):
            raise PatternError(
                f"{self._text[self._at : self._at + 4]!r} is not known here: look-around and back-references "
                "cannot be matched in linear time; of groups there are (…) and (?:…)"
            )
        else:
            self._at += 1
        node = self._choice()
        if self._peek() != ")":
            raise PatternError("has a ( without a ); close it, or write \\(")
        self._at += 1
        return node

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]


class Pattern:
    """One expression; ``(?i)`` at its beginning ignores case, ``^`` and ``$`` are of lines."""

    def __init__(self, text: str) -> None:
        """Raises PatternError."""
        folds = text.startswith("(?i)")
        self._flags = re.DOTALL | (re.IGNORECASE if folds else 0)
        self._what: list[re.Pattern[str] | str | None] = [None]
        """Of each step: the character that it takes, what it asserts, or nothing. The first is the end."""
        self._out: list[list[int]] = [[]]
        """The steps that follow each."""
        self._memory: list[dict[str, bool]] = [{}]
        self._first = self._step(_Reader(text, 4 if folds else 0).whole(), 0)
        begins = "|".join(f"(?:{one})" for one in dict.fromkeys(self._beginnings()))
        self._begins = re.compile(begins, self._flags)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """What matches cover, as places from and to, in order and apart from each other."""
        found: list[tuple[int, int]] = []
        threads: dict[int, int] = {}
        at = 0
        while at < len(text):
            if not threads:
                begins = self._begins.search(text, at)
                if begins is None:
                    break
                at = begins.start()
            self._follow(threads, self._first, at, text, at)
            taken: dict[int, int] = {}
            for step, start in threads.items():
                if self._takes(step, text[at]):
                    self._follow(taken, self._out[step][0], start, text, at + 1)
            threads, at = taken, at + 1
            if (start := threads.pop(0, -1)) >= 0:
                while found and found[-1][1] >= start:
                    start = min(start, found.pop()[0])
                found.append((start, at))
        return found

    def _follow(self, threads: dict[int, int], step: int, start: int, text: str, at: int) -> None:
        """Add the steps that are reached without taking a character. Whoever came first began first."""
        waiting = [step]
        while waiting:
            step = waiting.pop()
            if step in threads:
                continue
            what = self._what[step]
            if isinstance(what, str) and not _holds(what, text, at):
                continue
            threads[step] = start
            if not isinstance(what, re.Pattern):
                waiting.extend(self._out[step])

    def _takes(self, step: int, character: str) -> bool:
        what = self._what[step]
        if not isinstance(what, re.Pattern):
            return False
        memory = self._memory[step]
        known = memory.get(character)
        if known is None:
            if len(memory) >= _REMEMBERED:
                memory.clear()
            known = memory[character] = what.match(character) is not None
        return known

    def _step(self, node: _Node, after: int) -> int:
        """The step with which a node begins that is followed by ``after``."""
        match node:
            case _Character():
                try:
                    return self._add(re.compile(node.text, self._flags), after)
                except re.error as error:
                    raise PatternError(f"{node.text}: {error}; mend it") from None
            case _Assertion():
                return self._add(node.what, after)
            case _Sequence():
                for part in reversed(node.parts):
                    after = self._step(part, after)
                return after
            case _Choice():
                return self._add(None, *(self._step(one, after) for one in node.options))
            case _Repeat():
                begin = after
                if node.most is None:
                    begin = self._add(None, after)
                    self._out[begin].append(self._step(node.node, begin))
                for _ in range((node.most or node.least) - node.least):
                    begin = self._add(None, self._step(node.node, begin), after)
                for _ in range(node.least):
                    begin = self._step(node.node, begin)
                return begin

    def _add(self, what: re.Pattern[str] | str | None, *out: int) -> int:
        if len(self._what) >= MOST_STEPS:
            raise PatternError(f"has more than {MOST_STEPS} steps; repeat less in {{…}}")
        self._what.append(what)
        self._out.append(list(out))
        self._memory.append({})
        return len(self._what) - 1

    def _beginnings(self) -> Iterator[str]:
        """What the first character of a match may be. Raises PatternError where it may have none."""
        seen, waiting = set[int](), [self._first]
        while waiting:
            step = waiting.pop()
            if step in seen:
                continue
            seen.add(step)
            what = self._what[step]
            if step == 0:
                raise PatternError("matches an empty text; let it take at least one character")
            if isinstance(what, re.Pattern):
                yield what.pattern
            else:
                waiting.extend(self._out[step])


def _holds(what: str, text: str, at: int) -> bool:
    """An assertion between two characters."""
    if what == "^":
        return at == 0 or text[at - 1] == "\n"
    if what == "$":
        return at == len(text) or text[at] == "\n"
    edge = _is_word(text, at - 1) != _is_word(text, at)
    return edge == (what == r"\b")


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and (text[at].isalnum() or text[at] == "_")
