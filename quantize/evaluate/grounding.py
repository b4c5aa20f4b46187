"""Does an answer say something that its grounds do not hold? By words, with the items' own truth.

A word of an answer is *invented* when it stands neither in the item's grounds nor in the frame. The frame
is the wording of right answers: their words that are not from their own grounds, over all items of a role
("The", "is", "due", "on"). No language is parsed, nothing is guessed, and the same answer always gets the
same label.

The gateway checks live answers by rules, because it has no right answers to compare with; this check has
them, needs no rules, and shares no code with that one.

Not seen: a value of the grounds that is given for something else (the contact's name as the payer's),
which the role's accuracy sees; and a word that happens to be in the frame. Seen as invented: a paraphrase
by words that no right answer uses. Variant and reference are judged alike, so the difference stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantize.evaluate.tasks import Item

_BEGINS = re.compile(r"(?:^|[.!?:\n])[\s\"'*#>-]*$")
_WORD = re.compile(r"[^\W_]+(?:[.:,'\u2019/-][^\W_]+)*")


def words(text: str) -> list[str]:
    """Words in small letters, numbers and identifiers whole, without a possessive ``'s``."""
    found = (word.casefold().replace("\u2019", "'") for word in _WORD.findall(text))
    return [word.removesuffix("'s") for word in found]


class Grounding:
    """Judges the answers to one role's items; items without ``grounds`` are left out."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._frame = frozenset(
            word for item in items if item.grounds is not None for word in _wording(item, item.grounds)
        )

    def invented(self, item: Item, answer: str) -> list[str]:
        """Words of ``answer`` that are neither in the item's grounds nor in the frame, in their order."""
        allowed = self._frame.union(*(words(text) for text in item.grounds or ()))
        return [word for word in words(answer) if word not in allowed]

    def invented_values(self, item: Item, answer: str) -> list[str]:
        """Of these the numbers, identifiers and names: a model that words things in its own way invents none
        by that."""
        values = _values(answer)
        return [word for word in self.invented(item, answer) if word in values]


def _values(text: str) -> set[str]:
    """Words with a digit, and those with a capital letter that do not begin a sentence or a line: as
    :func:`words` has them."""
    found = set()
    for match in _WORD.finditer(text):
        word = match.group()
        begins = _BEGINS.search(text[: match.start()]) is not None
        if any(character.isdigit() for character in word) or (word[0].isupper() and not begins):
            found.update(words(word))
    return found


def _wording(item: Item, grounds: Iterable[str]) -> set[str]:
    return set(words(item.expected)).difference(*(words(text) for text in grounds))
