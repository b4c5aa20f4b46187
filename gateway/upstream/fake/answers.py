"""Which answer a fake engine gives at which of its endpoints, in vLLM's shapes, cut into tokens at spaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from gateway.upstream.fake.completions import Completion
from gateway.upstream.fake.messages import Message
from gateway.upstream.fake.responses import Response
from gateway.upstream.fake.script import Script


class Answer(Protocol):
    """``prompt``: tokens taken in, of them ``cached``. ``written``: those of all choices at the end."""

    prompt: int
    cached: int
    written: int

    def whole(self) -> dict[str, Any]: ...

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Each with the tokens that it is the first to show."""
        ...


def answer_for(path: str, body: dict[str, Any], text: str, script: Script) -> Answer:
    if path.endswith("/messages"):
        return Message(body, text, script)
    if path.endswith("/responses"):
        return Response(body, text, script)
    return Completion(body, text, script, chat=path.endswith("/chat/completions"))
