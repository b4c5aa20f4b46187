"""Items asked otherwise: with typos, noise, in another domain's surroundings, empty, and extreme.

Deterministic: what becomes of an item follows from its messages, the kind and the seed. Only the user's last
message changes, and of typos no number and no identifier, so that the right answer stays right. Nothing is
right for what is empty or extreme: there it counts that an answer comes, and is no gibberish.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from quantize.evaluate.conversations import read_conversations
from quantize.evaluate.tasks import Item

Kind = Literal["typos", "noise", "domain", "empty", "extreme"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WITH_ANSWERS: tuple[Kind, ...] = ("typos", "noise", "domain")
"""Kinds under which the right answer stays right."""
TYPO_SHARE, NOISE_SHARE = 0.15, 0.04
"""Of words that get a typo, and of characters that noise is put beside; at least one each."""
PASSAGE = (150, 600)
"""Characters of a passage of another domain."""
LONG = 2000
"""Characters of what is extremely long: beyond what an item has, within what small contexts hold."""
_WORD = re.compile(r"\b[^\W\d_]{4,}\b")
_NOISE = ("  ", "\n", "...", "~", "#", "*", "\t", "?!", "'", "—")
_EMPTY = ("", " ", "\n\n", ".")


def perturbed(item: Item, kind: Kind, seed: int = 0) -> Item:
    """The item with the user's last message changed."""
    asked = json.dumps(item.messages, sort_keys=True)
    digest = hashlib.sha256(f"{seed} {kind} {asked}".encode()).hexdigest()
    rng = random.Random(digest)
    place = max(number for number, message in enumerate(item.messages) if message["role"] == "user")
    changed = dict(item.messages[place])
    changed["content"] = _KINDS[kind](changed["content"], rng)
    messages = (*item.messages[:place], changed, *item.messages[place + 1 :])
    return item.model_copy(update={"messages": messages})


def typos(text: str, rng: random.Random) -> str:
    """Letters swapped, lost, doubled or replaced in a part of the words."""
    found = list(_WORD.finditer(text))
    if not found:
        return text
    count = max(1, round(TYPO_SHARE * len(found)))
    for one in sorted(rng.sample(found, count), key=lambda one: -one.start()):
        text = text[: one.start()] + _mistyped(one[0], rng) + text[one.end() :]
    return text


def _mistyped(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 1)
    match rng.randrange(4):
        case 0 if word[at] != word[at + 1]:
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        case 1:
            return word[:at] + word[at + 1 :]
        case 2:
            return word[:at] + word[at] + word[at:]
    others = [letter for letter in "aeioutnrsl" if letter != word[at].lower()]
    return word[:at] + rng.choice(others) + word[at + 1 :]


def noise(text: str, rng: random.Random) -> str:
    """Blanks and signs between words, and words in capitals."""
    gaps = [number for number, letter in enumerate(text) if letter == " "]
    for at in sorted(rng.sample(gaps, min(len(gaps), max(1, round(NOISE_SHARE * len(text))))), reverse=True):
        text = text[:at] + f" {rng.choice(_NOISE)} " + text[at + 1 :]
    found = list(_WORD.finditer(text))
    for one in rng.sample(found, min(len(found), 2)):
        text = text[: one.start()] + one[0].upper() + text[one.end() :]
    return text + rng.choice(("", " ", "!!", "\n"))


def domain(text: str, rng: random.Random) -> str:
    """A passage of another domain before what is asked."""
    return f"{rng.choice(passages())}\n\n{text}"


def passages() -> Sequence[str]:
    """Of the conversations that ship with the product, what users say at some length."""
    found = (one.messages[-1]["content"] for one in read_conversations())
    return [text for text in found if PASSAGE[0] <= len(text) <= PASSAGE[1]]


def empty(text: str, rng: random.Random) -> str:
    return rng.choice(_EMPTY)


def extreme(text: str, rng: random.Random) -> str:
    """The same again and again, one word without end, signs alone, or invisible ones between the letters."""
    match rng.randrange(4):
        case 0:
            return (text + "\n") * max(2, LONG // max(1, len(text)))
        case 1:
            return "a" * (LONG // 4) + " " + text
        case 2:
            return "".join(rng.choice("🙂🔥✅❓∑ßж語") for _ in range(LONG // 16))
    return "\u200b".join(text)


_KINDS: Mapping[Kind, Callable[[str, random.Random], str]] = {
    "typos": typos,
    "noise": noise,
    "domain": domain,
    "empty": empty,
    "extreme": extreme,
}
