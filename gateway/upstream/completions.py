"""A stream of completions while it passes: what is read of it, and what the client gets of it.

One grammar, whether the answer is listened to (``TappedStreamReader``) or not: every event is decoded as
far as it is needed. The client gets what the engine would have sent without the usage that only the gateway
asked for:

* a usage is cut out of every event, and an event that has nothing else is left out;
* what stands on that last event alone (vLLM's ``system_fingerprint``) goes to the events that end a
  choice, which is where vLLM writes it for who asks for no usage. They are held back until then;
* a client that did ask for the usage gets it as an event of its own before the end, also where a provider
  writes it into the last event of the answer.

Nothing here looks at what an answer says.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import msgspec

from gateway.errors import UpstreamError
from gateway.proxy.record import NO_USAGE, Usage
from gateway.quality.answer import Answer
from gateway.upstream.logprobs import without_logprobs
from gateway.upstream.options import OutputOptions
from gateway.upstream.refusals import raise_if_error
from gateway.upstream.sse import LONGEST_EVENT_BYTES, UNREADABLE, EventSplitter, fields_of, object_of
from gateway.upstream.usage import NOT_GIVEN, Raw, is_null, sane, usage_of

MOST_CHOICES = 1 << 16


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    """An event of a stream of completions."""

    choices: list[_Choice] | None = None
    usage: Raw = NOT_GIVEN
    error: Raw = NOT_GIVEN


_NULL = Raw(b"null")
_TAIL = b',"usage":%b}\n\n'
_CHUNK = msgspec.json.Decoder(_Chunk)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_OF_EVERY_CHUNK = ("id", "object", "created", "model", "choices")
_ASKED_FOR = ("usage", "metrics")
"""What vLLM writes only for who asks for the usage."""
_SAYING = ("delta", "text", "message", "token_ids", "logprobs", "finish_reason")
"""Fields of a choice that are part of an answer. vLLM's answers in token ids have no text."""


class StreamReader:
    """A stream of completions: events without names, a usage with each, ``[DONE]`` at the end."""

    __slots__ = (
        "_bare",
        "_by_choice",
        "_continuous",
        "_each",
        "_ended",
        "_exact",
        "_final",
        "_held",
        "_held_bytes",
        "_last",
        "_options",
        "_splitter",
        "_unsent",
        "_usual",
        "began",
        "done",
    )
    _SHORTCUT = True

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self._each = options.continuous_usage and options.include_usage
        """The client wants a usage in every chunk."""
        self._splitter = EventSplitter()
        self._by_choice: dict[int, Raw] = {}
        """The last usage in a chunk of each choice: vLLM counts every choice for itself until the end."""
        self._final: Raw | None = None
        """The usage of all of them."""
        self._exact = False
        """The engine has said it after all of the answer."""
        self._continuous = False
        """The engine has put a usage into a chunk of the answer."""
        self._bare = False
        """There was a chunk of the answer without one: the usage that comes after it is of all choices."""
        self._last = b""
        """The last event with a choice and a usage."""
        self._ended: set[int] = set()
        """Choices that have ended, by index."""
        self._held: dict[int, list[bytes]] | None = None
        """Events that end a choice, by the choice's index."""
        self._held_bytes = 0
        self._unsent = b""
        """What came together with an error, before it."""
        self._usual = False
        """The shortcut may be taken."""
        self.began = False
        self.done = False

    @property
    def usage(self) -> Usage:
        """Exact is the engine's final count. Of a stream that was cut off: what it said until then, with no
        prompt as long as it has not spoken of all of them."""
        if self._final is not None:
            return usage_of(self._final, exact=self._exact or self.done)
        if not self._by_choice:
            return NO_USAGE
        prompts: dict[int, Usage] = {}
        completion = 0
        for index, raw in self._by_choice.items():
            one = usage_of(raw)
            completion += one.completion
            prompts[index // self._options.n if self._options.prompts > 1 else 0] = one
        if len(prompts) < self._options.prompts or any(one.prompt is None for one in prompts.values()):
            return Usage(None, 0, sane(completion), False)
        prompt = sane(sum(one.prompt or 0 for one in prompts.values()))
        cached = min(prompt, sum(one.cached for one in prompts.values()))
        return Usage(prompt, cached, sane(completion), self.done)

    def feed(self, data: bytes, at: float) -> bytes:
        splitter = self._splitter
        if self._usual and not splitter.pending and (usual := self._shortcut(data)) is not None:
            return usual
        shown: list[bytes] = []
        try:
            for one in splitter.split(data):
                shown.append(self._shortcut(one) or self._grammar(one, at))
        except UpstreamError:  # what came before it is the client's
            self._unsent = b"".join(shown)
            raise
        return b"".join(shown)

    def flush(self) -> bytes:
        held, self._held, self._held_bytes = self._held, None, 0
        unsent, self._unsent = self._unsent, b""
        return unsent + b"".join([event for events in (held or {}).values() for event in events])

    def _shortcut(self, event: bytes) -> bytes | None:
        """What ``_grammar`` gives for nearly all events: those of one choice that goes on, with the usage as
        their last field. None where this is not one."""
        end = len(event) - 2
        if not self._usual or not event.startswith(b'data: {"') or event.find(b"\n") != end:
            return None
        try:
            chunk = _CHUNK.decode(event[6:end])
            if not event.isascii():
                event.decode()
        except UNREADABLE:
            return None
        choices, usage = chunk.choices, chunk.usage
        # The value that was decoded is all that follows the name up to the brace that ends the object.
        tail = _TAIL % usage
        if not event.endswith(tail) or not choices or len(choices) > 1 or chunk.error is not NOT_GIVEN:
            return None
        choice = choices[0]
        if choice.finish_reason is not None or usage == _NULL or choice.index not in self._by_choice:
            return None
        self._by_choice[choice.index] = usage
        self._last = event
        return event[: -len(tail)] + b"}\n\n"

    def _grammar(self, event: bytes, at: float) -> bytes:
        """What the client gets of one event, now."""
        payload, others = fields_of(event)
        if not payload:  # a comment
            return event
        if payload == b"[DONE]":
            return self._end(event)
        chunk = _chunk_of(payload)
        if chunk.error is not NOT_GIVEN:
            raise_if_error(payload)
        self.began = True
        options, usage, choices = self._options, chunk.usage, chunk.choices
        shown = event
        if is_null(usage):
            self._bare = self._bare or (bool(choices) and not self._continuous)
            if usage is not NOT_GIVEN and not options.include_usage:
                shown = _without(event, payload, others, usage)
        elif not choices or (self._may_be_total(choices) and _hollow(payload)):
            return self._usage_event(event, payload, usage, at)
        else:
            self._note(event, choices, usage)
            if not self._each:
                shown = _without(event, payload, others, usage)
        shown = self._shown(shown, payload, at)
        if not choices:
            return shown
        if _ends(choices):
            self._ended.update([choice.index for choice in choices])
            _refuse_many(self._ended)
            self._usual = False  # from here on anything may come
        return shown if options.include_usage or not self._ended else self._hold(choices, shown)

    def _may_be_total(self, choices: list[_Choice]) -> bool:
        """Whether an event that says nothing would have the usage of the whole answer: one before which none
        had a usage, or one of a choice that has ended."""
        return not self._continuous or choices[0].index in self._ended

    def _shown(self, shown: bytes, payload: bytes, at: float) -> bytes:
        """What the client gets of an event that has something of the answer."""
        return shown

    def _note(self, event: bytes, choices: list[_Choice], usage: Raw) -> None:
        self._last = event
        if self._bare or len(choices) > 1:
            self._final = usage
            return
        self._continuous = True
        self._usual = self._SHORTCUT and not self._each and not self._ended
        index = choices[0].index
        self._by_choice[index] = usage
        _refuse_many(self._by_choice)

    def _usage_event(self, event: bytes, payload: bytes, usage: Raw, at: float) -> bytes:
        """The event that has the usage of the whole answer and nothing of the answer."""
        self._final, self._last, self._exact = usage, b"", True
        if self._options.include_usage:
            return event
        held, self._held, self._held_bytes = self._held, None, 0
        more = {
            name: value
            for name, value in _fields_of(payload).items()
            if name not in _OF_EVERY_CHUNK and name not in _ASKED_FOR and not is_null(value)
        }
        return b"".join([_with(event, more) for events in (held or {}).values() for event in events])

    def _hold(self, choices: list[_Choice], shown: bytes) -> bytes:
        """Hold back an event that ends a choice, and what the engine says of that choice after it."""
        if self._held is None:
            self._held = {}
        index = choices[0].index
        if index not in self._held and not _ends(choices):
            return shown
        self._held.setdefault(index, []).append(shown)
        self._held_bytes += len(shown)
        return self.flush() if self._held_bytes > LONGEST_EVENT_BYTES else b""

    def _end(self, event: bytes) -> bytes:
        self.began = self.done = True
        if self._last and self._options.include_usage:
            one = next(iter(self._by_choice.values())) if len(self._by_choice) == 1 else None
            return _usage_event(self._last, self.usage, self._final or one) + event
        return self.flush() + event


class TappedStreamReader(StreamReader):
    """A stream of completions that is listened to: ``answer`` has all of it in the end.

    What cannot be understood passes all the same; ``confused`` says so.
    """

    __slots__ = ("answer", "confused")
    _SHORTCUT = False

    def __init__(self, options: OutputOptions) -> None:
        super().__init__(options)
        self.answer = Answer()
        self.confused = False

    def _shown(self, shown: bytes, payload: bytes, at: float) -> bytes:
        data = object_of(payload)
        if not self.confused:
            self.confused = not listen(self.answer, data, at, payload)
        seen, others = fields_of(shown)
        kept = without_logprobs(seen, data, self._options)
        if kept is seen:
            return shown
        before, line, after = shown.partition(seen)
        return before + kept + after if line else _event(others, kept)

    def _usage_event(self, event: bytes, payload: bytes, usage: Raw, at: float) -> bytes:
        if not self.confused:
            self.confused = not listen(self.answer, object_of(payload), at, payload)
        return super()._usage_event(event, payload, usage, at)


def _chunk_of(payload: bytes) -> _Chunk:
    """Raises UpstreamError for what is no JSON object in UTF-8."""
    try:
        chunk = _CHUNK.decode(payload)
        if not payload.isascii():
            payload.decode()
        return chunk
    except UNREADABLE:
        data = object_of(payload)
    # A JSON object, but not such a one as engines send: NaN, or fields of other types.
    choices = data.get("choices")
    read = []
    for choice in choices if isinstance(choices, list) else ():
        index, reason = (
            (choice.get("index"), choice.get("finish_reason")) if isinstance(choice, dict) else (0, 0)
        )
        read.append(_Choice(index if isinstance(index, int) else 0, str(reason) if reason else None))
    usage = Raw(_encoded(data["usage"])) if "usage" in data else NOT_GIVEN
    return _Chunk(read, usage, Raw(b"{}") if "error" in data else NOT_GIVEN)


def _refuse_many(choices: Collection[int]) -> None:
    if len(choices) > MOST_CHOICES:
        raise UpstreamError("The engine answered with more choices than anybody can have asked for.")


def _ends(choices: list[_Choice]) -> bool:
    for choice in choices:  # noqa: SIM110 -- on the path of every event
        if choice.finish_reason is not None:
            return True
    return False


def _hollow(payload: bytes) -> bool:
    """Whether no choice of an event says anything."""
    for choice in object_of(payload)["choices"]:
        if isinstance(choice, dict) and any(choice.get(name) not in (None, {}, []) for name in _SAYING):
            return False
    return True


def _without(event: bytes, payload: bytes, others: bytes, usage: Raw) -> bytes:
    """An event without its usage, everything else in it as it came."""
    tail = _TAIL % usage
    if event.startswith(b'data: {"') and event.find(b"\n") == len(event) - 2 and event.endswith(tail):
        return event[: -len(tail)] + b"}\n\n"  # its last field, nearly always
    fields = _fields_of(payload)
    fields.pop("usage", None)
    return _written(others, fields)


def _with(event: bytes, more: dict[str, Raw]) -> bytes:
    """An event with ``more`` fields, where it does not have them."""
    payload, others = fields_of(event)
    fields = _fields_of(payload)
    if not more.keys() - fields.keys():
        return event
    return _written(others, {**more, **fields})


def _written(others: bytes, fields: dict[str, Any]) -> bytes:
    return _event(others, _encoded(fields))


def _encoded(value: Any) -> bytes:
    """Raises UpstreamError for what ``json`` reads and nobody should write: halves of characters, numbers
    without bounds."""
    try:
        return msgspec.json.encode(value)
    except (*UNREADABLE, OverflowError):
        raise UpstreamError("The engine sent something that is no answer.") from None


def _event(others: bytes, payload: bytes) -> bytes:
    """What came in several lines goes in several lines."""
    return others + b"data: " + payload.replace(b"\n", b"\ndata: ") + b"\n\n"


def _fields_of(payload: bytes) -> dict[str, Raw]:
    try:
        return _FIELDS.decode(payload)
    except UNREADABLE:
        return {name: Raw(json.dumps(value).encode()) for name, value in object_of(payload).items()}


def _usage_event(last: bytes, usage: Usage, said: Raw | None) -> bytes:
    """The event that a provider left out which wrote its usage into the last one of the answer. ``said``: as
    it did, where that is one usage."""
    payload, _ = fields_of(last)
    fields: dict[str, Any] = {
        name: value for name, value in _fields_of(payload).items() if name in _OF_EVERY_CHUNK
    }
    prompt = usage.prompt or 0
    counted = {
        "prompt_tokens": prompt,
        "completion_tokens": usage.completion,
        "total_tokens": prompt + usage.completion,
    }
    return _written(b"", {**fields, "choices": [], "usage": counted if said is None else said})


def listen(answer: Answer, data: dict[str, Any], at: float, raw: bytes) -> bool:
    """Whether it was understood: an engine may send what we have never seen, which breaks no request. ``raw``
    is ``data`` as it came."""
    try:
        answer.add(data, at, raw)
    except Exception:
        return False
    return True
