"""A user's patterns of what is taken out: RE2's, matched in time linear in the text, whatever they are."""

from __future__ import annotations

import re2

_OPTIONS = re2.Options()
_OPTIONS.longest_match = True
_OPTIONS.log_errors = False


class PatternError(ValueError):
    """A pattern cannot be used. The text says why, and the fix."""


class Pattern:
    """One expression; ``(?i)`` at its beginning ignores case, ``^`` and ``$`` are of lines, ``.`` takes any
    character."""

    def __init__(self, text: str) -> None:
        """Raises PatternError."""
        try:
            self._compiled = re2.compile(f"(?ms)(?:{text})", _OPTIONS)
            re2.compile(text, _OPTIONS)  # which the parentheses around it may have completed
        except re2.error as error:
            why = error.args[0]
            why = why.decode(errors="replace") if isinstance(why, bytes) else why
            lacks = "it has no look-around, back-references and possessive quantifiers"
            raise PatternError(f"is no pattern of RE2: {why}; {lacks}") from None
        if self._compiled.fullmatch("") is not None:
            raise PatternError("matches an empty text; let it take at least one character")

    def spans(self, text: str) -> list[tuple[int, int]]:
        """What is matched, as places from and to, in order; of matches that overlap the first, as long as may
        be."""
        spans = (found.span() for found in self._compiled.finditer(text))
        return [(start, end) for start, end in spans if end > start]
