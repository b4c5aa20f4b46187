"""In which writing texts are: whether calibration looks like what a variant is judged by.

>>> main_script(["добрый день"])
('Cyrillic', 1.0)
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

JOINED = {"Hiragana": "Japanese", "Katakana": "Japanese", "Cjk": "Chinese characters"}
LITTLE = 0.2
"""Share of a text's letters below which it is written in another script."""


def scripts(texts: Iterable[str]) -> Counter[str]:
    """Letters per script, as their Unicode names begin."""
    letters = Counter(letter for text in texts for letter in text if letter.isalpha())
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        name = unicodedata.name(letter, "").partition(" ")[0].title()
        found[JOINED.get(name, name)] += count
    return found


def main_script(texts: Iterable[str]) -> tuple[str, float]:
    """The script of most letters, and their share; an empty name without letters."""
    found = scripts(texts)
    if not found:
        return "", 0.0
    name, count = found.most_common(1)[0]
    return name, count / found.total()


def unlike(calibration: Iterable[str], items: Iterable[str]) -> str:
    """What to say where hardly a letter of ``calibration`` is of the script of ``items``; else empty."""
    theirs = scripts(calibration)
    wanted, share = main_script(items)
    if not wanted or not theirs or theirs[wanted] >= LITTLE * theirs.total():
        return ""
    name, count = theirs.most_common(1)[0]
    return f"{name} ({count / theirs.total():.0%} of its letters), these in {wanted} ({share:.0%})"
