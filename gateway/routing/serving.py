"""What engines serve of requests, by the target on the card of their variant.

================  ====================================================================================
vLLM              whatever the gateway passes on; what it does not, it refuses itself
``llama.cpp``     chat, completions and tokens of text, without tools, images and what only vLLM has
``onnxruntime``   a classifier: a chat that asks for one plain answer, and ``/v1/classify``
================  ====================================================================================

A request goes to the first variant of its ladder whose engines serve it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.proxy.body import Body
from gateway.proxy.endpoints import Endpoint
from quantize.card import LLAMA, ONNX, Card

LLAMA_LACKS = (
    *("tools", "functions", "structured_outputs", "prompt_logprobs", "echo", "suffix", "best_of"),
    *("prompt_embeds", "use_beam_search", "continue_final_message", "audio", "bad_words"),
)
"""Fields of requests that llama.cpp's engine refuses."""
CLASSIFIER_LACKS = ("tools", "functions", "response_format", "structured_outputs")
"""Fields that a classifier's engine refuses; by itself it takes what the watch asks of it."""
_NOT_PLAIN = (*CLASSIFIER_LACKS, "prompt_logprobs", "continue_final_message")
_NOTHING = frozenset({b"", b"null", b"false", b"0", b"[]", b"{}", b'""'})
_TEXT = {"type": "text"}
_NO_GRAMMAR = re.compile(
    rb'"(?:\$ref|allOf|not|if|then|else|format|pattern|exclusiveMinimum|exclusiveMaximum|minimum|maximum|multipleOf'
    rb"|minProperties|maxProperties|patternProperties|propertyNames|dependentRequired|dependentSchemas"
    rb'|unevaluatedProperties|contains|minContains|maxContains|uniqueItems|prefixItems)"\s*:'
)
"""Of JSON schemas what llama.cpp's grammars do not have."""
_NO_TEXT = re.compile(
    rb'"(?:image_url|image_pil|image_embeds|input_image|audio_url|audio_embeds|input_audio|video_url)"'
)
"""In messages: parts that are no text, which neither engine takes. Within a text, quotes are escaped."""
_FAR = 1 << 20
"""Bytes of messages in which such a part is looked for: some milliseconds. Longer texts fit no context."""
_SHORT = 64
"""Bytes of a field that may be one of those that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Serves:
    """The endpoints that an engine answers, by their paths, and the fields of requests that it lacks."""

    paths: frozenset[str]
    lacks: Sequence[str]
    most_answers: int | None = None
    """Of one request (``n``)."""
    no_grammar: re.Pattern[bytes] | None = None
    """In a ``response_format``."""

    def takes(self, endpoint: Endpoint, body: Body) -> bool:
        if endpoint.path not in self.paths or any(asks_for(body, name) for name in self.lacks):
            return False
        if self.no_grammar is not None and self.no_grammar.search(body.view("response_format")):
            return False
        if _NO_TEXT.search(body.view("messages"), 0, _FAR):
            return False
        return self.most_answers is None or (body.fields.n or 1) <= self.most_answers


_BY_TARGET: Mapping[str, Serves] = {
    LLAMA: Serves(
        frozenset({"/v1/chat/completions", "/v1/completions", "/v1/tokenize"}),
        LLAMA_LACKS,
        no_grammar=_NO_GRAMMAR,
    ),
    ONNX: Serves(frozenset({"/v1/chat/completions", "/v1/classify"}), _NOT_PLAIN, most_answers=1),
}


def serves(card: Card) -> Serves | None:
    """None where engines take all that the gateway passes on."""
    return _BY_TARGET.get(card.target or "")


def asks_for(body: Body, name: str) -> bool:
    """Whether a field is there that asks for something."""
    value = body.view(name)
    if len(value) > _SHORT:
        return True
    said = bytes(value).strip()
    if said in _NOTHING and not (name == "prompt_logprobs" and said == b"0"):  # those of the prompt alone
        return False
    return name != "response_format" or body.get(name) != _TEXT
