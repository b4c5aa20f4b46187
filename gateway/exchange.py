"""One request on its way through the hops. Each hop reads what earlier ones found and adds its own."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.types import Scope, Send

from gateway.errors import GatewayError
from gateway.identity import Caller
from gateway.quality.answer import Answer
from gateway.routing.router import Route
from gateway.upstream.base import Event, Reply
from gateway.upstream.wishes import Wishes

CHAT = "/v1/chat/completions"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    """A request, the decisions on it, and its answer. Times are seconds of ``clock``."""

    def __init__(self, scope: Scope, send: Send, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.received = clock()
        self.send = send
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.request_id = request_id(self.headers)
        self.body: dict[str, Any] = {}
        # what the hops decide
        self.caller: Caller | None = None
        self.wishes = Wishes.of({}, chat=self.chat)
        self.route: Route | None = None
        self.reply: Reply | None = None
        self.batches: AsyncIterator[list[Event]] | None = None
        self.answer = Answer()
        # how it went
        self.on_close = AsyncExitStack()
        self.error: GatewayError | None = None
        self.begun = False
        """Part of an answer has been sent: from here on nothing is retried and no status can change."""
        self.complete = False
        """The last byte of the answer has been handed to the server."""
        self.overhead_s = 0.0
        """Seconds of our own work so far, but for the decoding that ``reply`` counts."""
        self.tapped = False
        """The answer has been listened to without an error, so that it can be checked."""

    @property
    def chat(self) -> bool:
        return self.path == CHAT

    @property
    def status(self) -> int:
        """As logged and counted: what went wrong, even when the client has seen a 200."""
        return self.error.status if self.error else 200

    def answer_headers(self, content_type: str) -> list[tuple[bytes, bytes]]:
        headers = [("content-type", content_type), ("x-request-id", self.request_id)]
        if self.route is not None:
            headers += [
                ("x-tiercel-variant", self.route.variant),
                ("x-tiercel-replica", self.route.replica.name),
                ("x-tiercel-route-reason", self.route.reason),
            ]
        return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


def request_id(headers: dict[str, str]) -> str:
    """The client's id if it is fit for a header and a log line, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
