"""A model as judge: are an answer's sentences in what the agent was given? The labels are those of ADK's
``hallucinations_v1``, all sentences in one call whose JSON the engine constrains, so that none can be left
out.

What it answers nonetheless in another form is counted as an error, never left out silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.quality.grounded import Grounded, Label
from gateway.quality.sentences import split_sentences

MOST_SENTENCES = 40
LONGEST_CONTEXT = 60_000
"""Characters; the end of a longer context is what counts for the answer."""
_TASK = """You check an assistant's answer against its context. Label every numbered sentence:
supported: the context says so, or it follows from the context.
unsupported: it claims something that the context does not say.
contradictory: the context says otherwise.
disputed: the context holds statements for it and against it.
not_applicable: it claims nothing (a greeting, a question, an offer, that something is not known).
Answer with one JSON object, its keys the numbers of the sentences and its values the labels."""


class JudgeError(ValueError):
    """The judge did not say what it was asked for."""


def request(answer: str, context: str, max_tokens: int) -> tuple[dict[str, Any], list[str]] | None:
    """The body of a chat completion that asks about ``answer``, and its sentences; None when it has none."""
    sentences = split_sentences(answer)[:MOST_SENTENCES]
    if not sentences:
        return None
    numbered = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
    keys = [str(number) for number in range(1, len(sentences) + 1)]
    one = {"type": "string", "enum": [label.value for label in Label]}
    schema = {
        "type": "object",
        "properties": dict.fromkeys(keys, one),
        "required": keys,
        "additionalProperties": False,
    }
    return {
        "messages": [
            {"role": "system", "content": _TASK},
            {
                "role": "user",
                "content": f"Context:\n{context[-LONGEST_CONTEXT:]}\n\nSentences of the answer:\n{numbered}",
            },
        ],
        "temperature": 0,
        "max_tokens": max_tokens,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "labels", "strict": True, "schema": schema},
        },
    }, sentences


def read(reply: Mapping[str, Any], sentences: Sequence[str]) -> Grounded:
    """The judge's labels. Raises JudgeError for anything but a label for every sentence."""
    try:
        text = reply["choices"][0]["message"]["content"]
        labels = json.loads(text)
        found = [Label(labels[str(number)]) for number in range(1, len(sentences) + 1)]
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        # Without what it said, which may quote the answer that it judges.
        raise JudgeError(f"the judge's answer cannot be read ({type(error).__name__})") from None
    return Grounded(tuple(zip(sentences, found, strict=True)))
