"""The grounded check: is what an answer says in what the model was given? By rules, without a model.

The labels are those of ADK's ``hallucinations_v1``, of which a judge is needed for two
(``contradictory``, ``disputed``); the rules give the other three:

1. A question, or a sentence that says that something is not stated or not known: ``not_applicable``.
2. A sentence with values that can be looked up (numbers, money, dates, times, identifiers, addresses,
   names) is ``supported`` when every one of them is in the context, else ``unsupported``.
3. Any other sentence is judged by its content words. Its value is what follows the first ``is``,
   ``are``, ``was``, ``were`` or colon, else its last content word: ``supported`` when the value is in
   the context; ``not_applicable`` when none of its content words is; else ``unsupported``.

What it cannot see: a value that is in the context but belongs to something else (the agent's name
given as the customer's), a wrong word or unit beside right numbers (billions for millions), a minus that is
left out (a sentence may say it in words), and a paraphrase (which it calls unsupported). The context is
everything but the assistant's own words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gateway.quality.claims import Claim, extract, names, plain
from gateway.quality.sentences import split_sentences

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_COPULA = re.compile(r"\b(?:is|are|was|were)\b\s*:?|:", re.IGNORECASE)
_NOTHING_CLAIMED = re.compile(
    r"\b(?:(?:do|does|did)(?: not|n['\u2019]t) "
    r"(?:say|state|mention|include|specify|contain|list|show|know|have)"
    r"|(?:is|are|was|were)(?: not|n['\u2019]t) (?:stated|mentioned|given|included|specified|listed|known)"
    r"|no information|can(?:not|['\u2019]t) (?:tell|find|say|determine)|not sure)\b",
    re.IGNORECASE,
)
_STOP_WORDS = frozenset(
    "a an the this that these those it its he she they them his her their we our us you your i my me is are "
    "was were be been being am has have had do does did will would can could shall should may might must "
    "of in on at to from by with for as and or but if then than so also not there here about into per over "
    "under up down out off what which who whom whose when where why how yes please sure thanks hello "
    "hi dear since after before because although though while once however until unless during both "
    "each".split()
)
_COUNTED = tuple("zero  two three four five six seven eight nine ten eleven twelve".split(" "))
"""Numbers as words. ``One`` is mostly no number."""


class Label(StrEnum):
    SUPPORTED = "supported"
    UNSUPPORTED = "unsupported"
    CONTRADICTORY = "contradictory"
    DISPUTED = "disputed"
    NOT_APPLICABLE = "not_applicable"


BAD = (Label.UNSUPPORTED, Label.CONTRADICTORY, Label.DISPUTED)


@dataclass(frozen=True)
class Grounded:
    """An answer's sentences with their labels, in order."""

    sentences: tuple[tuple[str, Label], ...]
    risks: tuple[float, ...] = ()
    """How sure the detector is that each is made up, 0 to 1, where it says so; by its labels otherwise."""

    @property
    def bad(self) -> int:
        """Sentences that the context does not bear out."""
        return sum(label in BAD for _, label in self.sentences)

    @property
    def risk(self) -> float:
        """Of the worst sentence."""
        return max(self.risks or [float(label in BAD) for _, label in self.sentences], default=0.0)

    @property
    def counts(self) -> Counter[Label]:
        return Counter(label for _, label in self.sentences)

    @property
    def score(self) -> float | None:
        """ADK's score, (supported + not_applicable) / sentences; None for an answer without any."""
        if not self.sentences:
            return None
        return 1 - self.bad / len(self.sentences)

    @property
    def strict_score(self) -> float | None:
        """supported / (supported + bad): what evades a claim does not raise it."""
        supported = self.counts[Label.SUPPORTED]
        judged = supported + self.bad
        return supported / judged if judged else None


def context_of(messages: Any) -> str:
    """The texts of all messages of a request but the assistant's. What is no message is left out."""
    texts: list[str] = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict) or message.get("role") == "assistant":
            continue
        content = message.get("content")
        given = content if isinstance(content, list) else [{"text": content}]
        parts = [part.get("text") for part in given if isinstance(part, dict)]
        texts.extend(part for part in parts if isinstance(part, str))
    return "\n".join(texts)


def check(answer: str, context: str) -> Grounded:
    """Label every sentence of ``answer`` against ``context``."""
    source = _Source(context)
    return Grounded(tuple((sentence, _label(sentence, source)) for sentence in split_sentences(answer)))


class _Source:
    """The context, prepared for looking up."""

    def __init__(self, context: str) -> None:
        claims, _ = extract(context)
        for address in [claim.value[0] for claim in claims if claim.kind == "address"]:
            claims += extract(re.sub(r"[^\w.-]+", " ", address))[0]
        words = words_of(context)
        self._words, vocabulary = " ".join(words), set(words)
        self._claims = {(_family(claim), claim.value) for claim in claims}
        for number, word in enumerate(_COUNTED):
            digits = ("number", (str(number), ""))
            if word in vocabulary:
                self._claims.add(digits)
            elif digits in self._claims:
                vocabulary.add(word)
        # An answer may leave out a year, a currency or a minus. It may add a currency, but no other.
        self._shortened = {(family, (*value[:-1], "")) for family, value in self._claims}
        self._shortened |= {(family, (value[0].lstrip("-"), *value[1:])) for family, value in self._claims}
        self._shortened |= {(family, (value[0].lstrip("-"), *value[1:])) for family, value in self._shortened}
        self.vocabulary = frozenset(vocabulary)

    def has(self, claim: Claim) -> bool:
        key = (_family(claim), claim.value)
        if key in self._claims or key in self._shortened:
            return True
        return claim.kind == "money" and (key[0], (claim.value[0], "")) in self._claims

    def says(self, phrase: Iterable[str]) -> bool:
        """Whether the words stand next to each other in the context."""
        return f" {' '.join(phrase)} " in f" {self._words} "


def _label(sentence: str, source: _Source) -> Label:
    if sentence.endswith("?") or _NOTHING_CLAIMED.search(sentence):
        return Label.NOT_APPLICABLE
    claims, rest = extract(sentence)
    given = list(names(rest, _STOP_WORDS))
    if claims or given:
        found = all(map(source.has, claims)) and all(
            _named(words_of(name), source, rest.lstrip().startswith(name)) for name in given
        )
        return Label.SUPPORTED if found else Label.UNSUPPORTED
    content = content_words(sentence)
    copula = _COPULA.search(sentence)
    value = content_words(sentence[copula.end() :]) if copula else content[-1:]
    if value and (source.says(value) or all(word in source.vocabulary for word in value)):
        return Label.SUPPORTED
    if not any(word in source.vocabulary for word in content):
        return Label.NOT_APPLICABLE
    return Label.UNSUPPORTED


def _named(words: list[str], source: _Source, first: bool) -> bool:
    """A name as it is, or with its two parts the other way round (``Vidal, Greta``). ``first``: it begins
    its sentence, so that its first word may be none of it (``Yesterday Greta Vidal called``)."""
    if source.says(words) or (len(words) == 2 and source.says(reversed(words))):
        return True
    return first and len(words) > 2 and source.says(words[1:])


def _family(claim: Claim) -> str:
    """Money and numbers are looked up together."""
    return "number" if claim.kind == "money" else claim.kind


def words_of(text: str) -> list[str]:
    """In small letters, without a possessive ``'s``."""
    return [word.lower().removesuffix("'s") for word in _WORD.findall(plain(text))]


def content_words(text: str) -> list[str]:
    """Those that say something."""
    return [word for word in words_of(text) if word not in _STOP_WORDS]
