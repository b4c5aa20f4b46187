"""Tokens as text: characters that several tokens make, and texts that an answer stops at."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Text:
    """The text of one answer as it grows. What may become a stop string is held back until it has not."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = [one for one in stop if one]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def add(self, piece: bytes, last: bool = False) -> str:
        """The text that is certain after a token's bytes; ``last`` says that no token follows."""
        self._held += self._decoder.decode(piece, last)
        places = [at for one in self._stop if (at := self._held.find(one)) >= 0]
        if places:
            text, self._held, self.stopped = self._held[: min(places)], "", True
            return text
        keep = 0 if last else max((self._overlap(one) for one in self._stop), default=0)
        at = len(self._held) - keep
        text, self._held = self._held[:at], self._held[at:]
        return text

    def _overlap(self, stop: str) -> int:
        """Characters at the end that a stop string begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
