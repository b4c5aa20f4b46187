"""What the routes of one server share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.engine_server import BadRequestError
from deploy.llama.engine import Engine
from deploy.llama.requests import plain_messages
from deploy.llama.scoring import ReferenceHead
from deploy.llama.template import ChatTemplate
from quantize.export.gguf_file import GgufFile

LONGEST_PIECE = 64
"""Characters of a token, at most: those of longer ones, such as many spaces, are rare."""


@dataclass
class Server:
    """``context`` is the tokens of the longest request, prompt and answer; ``defaults`` are the model's own
    settings of sampling."""

    engine: Engine
    file: GgufFile
    name: str
    context: int
    template: ChatTemplate | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reference: Path | None = None
    """The reference's checkpoint, of which the head is read where something is scored."""
    draining: bool = False
    head: ReferenceHead | None = None

    def tokens_of(
        self, messages: Sequence[Mapping[str, Any]], prompt: bool, more: Mapping[str, Any] | None
    ) -> list[int]:
        """Token ids of a conversation. Raises BadRequestError."""
        if self.template is None:
            text = f"messages: {self.name} has no chat template; use /v1/completions"
            raise BadRequestError(text, "messages")
        return self.tokens_in(self.template.render(plain_messages(messages), prompt, more or {}), "messages")

    def tokens_in(self, text: str, field: str, special: bool = False) -> list[int]:
        """Token ids of a text. Raises BadRequestError for one that is too long by its characters alone."""
        if len(text) > (most := LONGEST_PIECE * self.context):
            raise BadRequestError(
                f"{field}: {len(text):,} characters; the maximum context length is {self.context} tokens, "
                f"and no more than {most:,} characters are read",
                field,
                "context_length_exceeded",
            )
        return self.engine.model.tokenize(text, special)
