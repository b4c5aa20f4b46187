"""What differs between two answers to one request, and what may: for :mod:`test_differential`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.e2e.request_cases import Case

_RANDOM = ("id", "created", "created_at", "request_id", "item_id", "response_id", "completed_at", "call_id")
_IDS = re.compile(
    r"(chatcmpl|cmpl|resp|msg|chatcmpl-tool|call|fc|rs|toolu|batch|tokenize|gen[a-z]*)[-_][0-9a-f-]{8,}"
)


_OURS = re.compile(
    r"(priority|background|previous_response_id|store|model|stream|stream_options[.a-z_]*): is "
    r"|model: |The body is |n: Exceeds"
)
"""How the gateway's own refusals begin: of what it has to read itself, and vLLM cannot read either."""
_SAMPLED = re.compile(rb'"temperature": (1|1.0|1.5|2|true|"1"|"2.0"|"true")[,}]|"sampling_params": {("a"|})')
"""Sampled without a seed, which Anthropic's requests do not have."""
ALLOWED: tuple[tuple[str, Callable[["Answer", "Answer", Case], bool]], ...] = (
    (
        "an engine's own failure is no answer for a client: it gets 502, and the log the details",
        lambda direct, through, case: direct.status >= 500 and through.status == 502,
    ),
    (
        "what the gateway reads itself it refuses itself, in words that name the fix",
        lambda direct, through, case: (
            400 <= direct.status < 500
            and through.status in (direct.status, 404)
            and _OURS.match(through.message) is not None
        ),
    ),
    (
        "errors under /v1/messages are in Anthropic's form, with its names, also where vLLM's are not",
        lambda direct, through, case: (
            case.path.startswith("/v1/messages")
            and (direct.status, _masked(direct.message)) == (through.status, _masked(through.message))
        ),
    ),
    (
        "a stream whose first event is an error is an error: no 200 that has no answer",
        lambda direct, through, case: (
            direct.status == 200
            and through.status == 400
            and json.dumps(through.message).encode() in direct.body.partition(b"\n\n")[0]
        ),
    ),
    (
        "an error that is not in OpenAI's form is put into it",
        lambda direct, through, case: (
            direct.status == through.status == 400
            and direct.body == json.dumps({"detail": through.message}, separators=(",", ":")).encode()
        ),
    ),
    (
        "a request's priority is the gateway's to set",
        lambda direct, through, case: b'"priority": ' in case.body and through.status in (200, direct.status),
    ),
    (
        "the gateway keeps responses itself: what needs a store is served, an unknown one is OpenAI's error",
        lambda direct, through, case: (
            case.path == "/v1/responses"
            and re.search(rb'"(background|previous_response_id|store)": ', case.body) is not None
            and through.status in (200, 400)
        ),
    ),
    (
        "two random answers differ",
        lambda direct, through, case: (
            direct.status == through.status == 200
            and case.path in ("/v1/messages", "/v1/responses", "/inference/v1/generate")
            and _SAMPLED.search(case.body) is not None
        ),
    ),
)
"""What may differ, and why."""


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str
    body: bytes

    def differs_from(self, through: "Answer", case: Case) -> str | None:
        """What the gateway made of it that nobody allowed."""
        if self.plain == through.plain or any(holds(self, through, case) for _, holds in ALLOWED):
            return None
        if self.status != through.status:
            return f"{self.status} became {through.status}"
        return "; ".join(_paths(self.plain, through.plain))

    @property
    def plain(self) -> Any:
        """Without what differs from one time to the next."""
        if self.kind == "text/event-stream":
            return self.status, self.kind, _stream(self.body.decode())
        try:
            return self.status, self.kind, _masked(json.loads(self.body))
        except ValueError:
            return self.status, self.kind, self.body

    @property
    def message(self) -> str:
        """An error's."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return ""

    def __str__(self) -> str:
        return f"{self.status} {self.kind} {self.body[:600]!r}"


def _paths(left: Any, right: Any, where: str = "") -> list[str]:
    """Where two answers differ, and how."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [found for name in left for found in _paths(left[name], right[name], f"{where}.{name}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for at, (one, other) in pairs for found in _paths(one, other, f"{where}[{at}]")]
    return [] if left == right else [f"{where}: {str(left)[:300]} became {str(right)[:300]}"]


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("object") == "response":  # the gateway keeps responses itself, and says so
            value = {name: held for name, held in value.items() if name != "store"}
        return {name: "*" if name in _RANDOM else _masked(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_masked(held) for held in value]
    if not isinstance(value, str):
        return value
    # vLLM counts a request's fields when one is missing, and the gateway has added some.
    return re.sub(r"<dict of \d+ items>", "<dict>", _IDS.sub("*", value))


def _stream(text: str) -> Any:
    """Events without their text, and the texts: an engine may send two tokens at once, and those of several
    answers in any order."""
    events: list[str] = []
    texts: dict[str, str] = {}
    for block in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines())
        name, data = fields.get("event", ""), fields.get("data", "")
        if not data or data == "[DONE]":
            events.append(name + data)
            continue
        event = _masked(json.loads(data))
        event.pop("sequence_number", None)
        if event.get("usage", ...) is None:
            del event["usage"]  # the gateway asks for it, and takes it out again
        for choice in event.get("choices") or ():
            said = choice["delta"] if isinstance(choice.get("delta"), dict) else choice
            for held in ("content", "text"):
                if isinstance(said.get(held), str):
                    where = f"{choice.get('index')} {held}"
                    texts[where] = texts.get(where, "") + said.pop(held)
        if event.get("type", "").endswith("delta") and "delta" in event:
            delta = event.pop("delta")
            where = f"{event['type']} {event.get('index')} {event.get('output_index')}"
            texts[where] = texts.get(where, "") + _text_of(delta)
        shown = f"{name} {json.dumps(event, sort_keys=True)}"
        if not events or events[-1] != shown:
            events.append(shown)
    several = sum('"index": 1' in event for event in events) > 0
    return sorted(set(events)) if several else events, texts


def _text_of(delta: Any) -> str:
    if isinstance(delta, dict) and isinstance(delta.get("text"), str):
        return str(delta["text"])
    return delta if isinstance(delta, str) else json.dumps(delta)
