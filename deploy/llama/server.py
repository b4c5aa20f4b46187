"""What the routes of one server share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.llama.engine import Engine
from deploy.llama.requests import BadRequestError, plain_messages
from deploy.llama.scoring import ReferenceHead
from deploy.llama.template import ChatTemplate
from quantize.export.gguf_file import GgufFile


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
        """Token ids of a conversation. Raises BadRequestError and BadConversationError."""
        if self.template is None:
            text = f"messages: {self.name} has no chat template; use /v1/completions"
            raise BadRequestError(text, "messages")
        text = self.template.render(plain_messages(messages), prompt, more or {})
        return self.engine.model.tokenize(text)
