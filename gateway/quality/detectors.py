"""Who finds what an answer makes up: detectors by name. Each labels sentences and says how sure it is.

``rules``       values that can be looked up (:mod:`gateway.quality.grounded`); no model
``lexical``     words and pairs of words that the context does not have; no model
``classifier``  a sequence or token classifier in a local directory, such as HHEM or LettuceDetect

A detector's errors are its own: measure them on labelled answers of your own (``tiercel watch judge``), and
read the corrected share.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gateway.quality import grounded
from gateway.quality.grounded import Grounded, Label, content_words, words_of
from gateway.quality.sentences import split_sentences

LEXICAL_LIMIT = 0.3
"""Risk above which a sentence counts as unsupported."""
CLASSIFIER_LIMIT = 0.5
LONGEST_CONTEXT = 20_000
"""Characters of context that a classifier is given; its own limit in tokens comes on top."""


class Detector(Protocol):
    """``check`` may take a while."""

    def check(self, answer: str, context: str) -> Grounded: ...


class Rules:
    """Values that can be looked up. The risk of a sentence is 0 or 1."""

    def check(self, answer: str, context: str) -> Grounded:
        return grounded.check(answer, context)


class Lexical:
    """The share of a sentence's content words, and of its pairs of neighbours, that the context has not.

    It cannot see who did what to whom, and calls a good paraphrase made up: its strength is the short answer
    that quotes.
    """

    def __init__(self, limit: float = LEXICAL_LIMIT) -> None:
        self._limit = limit

    def check(self, answer: str, context: str) -> Grounded:
        words = words_of(context)
        known, pairs = frozenset(words), frozenset(itertools.pairwise(words))
        found, risks = [], []
        for sentence in split_sentences(answer):
            risk = _risk(sentence, known, pairs)
            if risk is None:
                label = Label.NOT_APPLICABLE
            else:
                label = Label.UNSUPPORTED if risk > self._limit else Label.SUPPORTED
            found.append((sentence, label))
            risks.append(risk or 0.0)
        return Grounded(tuple(found), tuple(risks))


def _risk(sentence: str, known: frozenset[str], pairs: frozenset[tuple[str, str]]) -> float | None:
    content = content_words(sentence)
    if not content:
        return None
    words = words_of(sentence)
    strange = sum(word not in known for word in content) / len(content)
    neighbours = list(itertools.pairwise(words))
    apart = sum(pair not in pairs for pair in neighbours) / len(neighbours) if neighbours else strange
    return (strange + apart) / 2


class Classifier:
    """A classifier of Hugging Face's formats in a local directory; it runs on the CPU, without any hub.

    A sequence classifier is asked about (context, sentence): the label whose name says ``consist``,
    ``entail``, ``support`` or ``factual`` is the good one, else the last. A token classifier is asked about
    (context, answer): the label 1 marks what is made up. Raises OSError or ValueError for a directory that
    holds neither.
    """

    def __init__(self, directory: Path, limit: float = CLASSIFIER_LIMIT) -> None:
        self._by_token = check_classifier(directory)
        from transformers import (
            AutoConfig,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
            AutoTokenizer,
        )

        self._limit = limit
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
        auto: Any = AutoModelForTokenClassification if self._by_token else AutoModelForSequenceClassification
        self._model: Any = auto.from_pretrained(directory, local_files_only=True).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._good = _good_label(config.id2label)

    def check(self, answer: str, context: str) -> Grounded:
        context = context[-LONGEST_CONTEXT:]
        sentences = split_sentences(answer)
        risks = (
            self._token_risks(answer, context, sentences)
            if self._by_token
            else self._risks(context, sentences)
        )
        labels = [Label.UNSUPPORTED if risk > self._limit else Label.SUPPORTED for risk in risks]
        return Grounded(tuple(zip(sentences, labels, strict=True)), tuple(risks))

    def _risks(self, context: str, sentences: list[str]) -> list[float]:
        import torch

        if not sentences:
            return []
        given = self._tokenizer(
            [context] * len(sentences), sentences, truncation="only_first", padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = self._model(**given).logits.float()
        good = (
            torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, -1)[:, self._good]
        )
        return [1 - float(value) for value in good]

    def _token_risks(self, answer: str, context: str, sentences: list[str]) -> list[float]:
        import torch

        given = self._tokenizer(
            context, answer, truncation="only_first", return_offsets_mapping=True, return_tensors="pt"
        )
        offsets, parts = given.pop("offset_mapping")[0].tolist(), given.sequence_ids(0)
        with torch.inference_mode():
            made_up = torch.softmax(self._model(**given).logits.float(), -1)[0, :, -1].tolist()
        risks, place = [], 0
        for sentence in sentences:
            start = answer.find(sentence, place)
            end = place = max(place, start) + len(sentence)
            inside = [
                risk
                for risk, (left, right), part in zip(made_up, offsets, parts, strict=True)
                if part == 1 and left < end and right > start
            ]
            risks.append(max(inside, default=0.0))
        return risks


def check_classifier(directory: Path) -> bool:
    """Whether a directory's model classifies tokens, and not whole sequences, by its configuration alone.
    Raises OSError or ValueError where it does neither."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    given = config.get("architectures") if isinstance(config, dict) else None
    kinds = [str(kind) for kind in given] if isinstance(given, list) else []
    if any("TokenClassification" in kind for kind in kinds):
        return True
    if any("SequenceClassification" in kind for kind in kinds):
        return False
    raise ValueError(
        f"quality.classifier: {directory} holds {', '.join(kinds) or 'no architecture'}; "
        "give a model for sequence or token classification"
    )


def _good_label(names: Mapping[int, str]) -> int:
    for index, name in names.items():
        text = str(name).lower()
        if any(word in text for word in ("consist", "entail", "support", "factual")) and not any(
            word in text for word in ("inconsist", "not", "un", "contra", "halluc")
        ):
            return int(index)
    return max(int(index) for index in names)


DETECTORS: Mapping[str, Callable[[Path | None], Detector]] = {
    "rules": lambda _: Rules(),
    "lexical": lambda _: Lexical(),
    "classifier": lambda directory: Classifier(directory or Path()),
}


def detector(name: str, directory: Path | None = None) -> Detector:
    """A detector by its name. Raises OSError or ValueError where it cannot be loaded."""
    return DETECTORS[name](directory)
