"""What is read of an answer while it passes: its usage, whether it is whole, and what the client gets of it.

There is one reader for each form of an answer (``reader_for``). Nothing here looks at what an answer says:
one that is listened to is only kept, for others to look at outside the event loop.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from gateway.errors import UpstreamError
from gateway.proxy.endpoints import Form
from gateway.proxy.record import NO_USAGE, Usage
from gateway.quality.answer import Answer
from gateway.upstream.completions import StreamReader, TappedStreamReader, listen
from gateway.upstream.logprobs import without_logprobs
from gateway.upstream.options import OutputOptions
from gateway.upstream.refusals import raise_if_error, refusal
from gateway.upstream.sse import UNREADABLE, EventSplitter, fields_of, garbage, object_of
from gateway.upstream.usage import NOT_GIVEN, Counts, Raw, counted, is_null, usage_of

__all__ = [
    "NamedStreamReader",
    "Reader",
    "StreamReader",
    "TappedReader",
    "TappedStreamReader",
    "TappedWholeReader",
    "WholeReader",
    "is_json",
    "reader_for",
    "refusal",
]


class Reader(Protocol):
    """Reads one answer of one attempt.

    ``done``: it is whole. ``began``: something of an answer has come, more than comments that keep the
    connection alive. ``usage``: as far as the engine has said.
    """

    done: bool
    began: bool

    @property
    def usage(self) -> Usage: ...

    def feed(self, data: bytes, at: float) -> bytes:
        """What the client gets of ``data``, which arrived at ``at`` (seconds of the gateway's clock).
        Raises UpstreamError for what is no answer, and for an error within it."""
        ...

    def flush(self) -> bytes:
        """What is held back, for a client whose answer breaks off here."""
        ...


def reader_for(
    form: Form, options: OutputOptions, content_type: bytes | None = None, *, tapped: bool = False
) -> Reader:
    """The reader of an answer with status 200. ``tapped``: it is listened to, and has an ``answer``."""
    if form is Form.COMPLETIONS and tapped:
        return TappedStreamReader(options) if options.stream else TappedWholeReader(options, content_type)
    if not options.stream:
        return (CompletionReader if form is Form.COMPLETIONS else WholeReader)(content_type)
    return StreamReader(options) if form is Form.COMPLETIONS else NamedStreamReader()


class _Meta(msgspec.Struct, gc=False):
    billed_units: Counts | None = None


class _Whole(msgspec.Struct, gc=False):
    """What is read of an answer that is not streamed."""

    usage: Counts | None = None
    meta: _Meta | None = None


_WHOLE = msgspec.json.Decoder(_Whole, strict=False)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_NO_ANSWERS = (b"text/html", b"text/event-stream")


class WholeReader:
    """An answer that is not streamed: ``feed`` is given all of it.

    Only JSON is read. Any other content passes as it is, its usage unknown (embeddings as bytes, audio);
    an error page in HTML is no answer.
    """

    __slots__ = ("began", "content_type", "done", "usage")
    _LISTS = True
    """A list is an answer: what an engine renders of several prompts, which has no usage."""

    def __init__(self, content_type: bytes | None = None) -> None:
        self.content_type = content_type
        """As the engine's answer names it. It may be set later, before ``feed``. None is JSON."""
        self.done = False
        self.began = False
        self.usage = NO_USAGE

    def feed(self, data: bytes, at: float) -> bytes:
        self.began = True
        kind = self.content_type
        if kind is None or is_json(kind):
            try:
                usage = _WHOLE.decode(data).usage
            except UNREADABLE:
                usage = None
            if usage is not None:
                self.usage = counted(usage)
            else:
                self._read(data)
        elif media_type(self.content_type) in _NO_ANSWERS:
            raise garbage(data)
        self.done = True
        return data

    def flush(self) -> bytes:
        return b""

    def _read(self, data: bytes) -> None:
        try:
            if self._LISTS and data.startswith(b"["):
                _LIST.decode(data)
                return
            whole = _WHOLE.decode(data)
        except UNREADABLE:
            object_of(data)  # what is an object is an answer, whatever its usage says
            return
        if whole.usage is not None:
            self.usage = counted(whole.usage)
        elif whole.meta is not None and whole.meta.billed_units is not None:
            self.usage = counted(whole.meta.billed_units)


class CompletionReader(WholeReader):
    """An answer of completions, which is an object."""

    __slots__ = ()
    _LISTS = False


class TappedWholeReader(CompletionReader):
    """An answer that is listened to and not streamed: ``answer`` has all of it.

    What cannot be understood passes all the same; ``confused`` says so.
    """

    __slots__ = ("_options", "answer", "confused")

    def __init__(self, options: OutputOptions, content_type: bytes | None = None) -> None:
        super().__init__(content_type)
        self._options = options
        self.answer = Answer()
        self.confused = False

    def feed(self, data: bytes, at: float) -> bytes:
        super().feed(data, at)
        if not is_json(self.content_type):
            self.confused = True
            return data
        whole = object_of(data)
        self.confused = not listen(self.answer, whole, at, data)
        return without_logprobs(data, whole, self._options)


TappedReader = TappedStreamReader | TappedWholeReader


class _Inner(msgspec.Struct, gc=False):
    usage: Raw = NOT_GIVEN


class _NamedEvent(msgspec.Struct, gc=False):
    """An event of responses (``response``) or of Anthropic's messages (``message``)."""

    type: str = ""
    usage: Raw = NOT_GIVEN
    response: _Inner | None = None
    message: _Inner | str | None = None
    error: Raw = NOT_GIVEN


_NAMED = msgspec.json.Decoder(_NamedEvent)
_LAST_RESPONSE = ("response.completed", "response.incomplete", "response.failed")
_LAST_MESSAGE = "message_stop"


class NamedStreamReader:
    """A stream of named events: OpenAI's responses, Anthropic's messages. It passes as it is.

    ``last_event`` is the data (JSON) of the event that ended a response; empty until then.
    """

    __slots__ = ("_split", "_unsent", "began", "done", "last_event", "usage")

    def __init__(self) -> None:
        self._split = EventSplitter().split
        self._unsent = b""
        self.usage = NO_USAGE
        self.last_event = b""
        self.began = False
        self.done = False

    def feed(self, data: bytes, at: float) -> bytes:
        events = self._split(data)
        for number, event in enumerate(events):
            try:
                self._read(event)
            except UpstreamError:  # what came before it is the client's
                self._unsent = b"".join(events[:number])
                raise
        return events[0] if len(events) == 1 else b"".join(events)

    def flush(self) -> bytes:
        unsent, self._unsent = self._unsent, b""
        return unsent

    def _read(self, event: bytes) -> None:
        start, end = event.find(b"\ndata: {"), len(event) - 2
        if (
            event.find(b"\n") == start > 0
            and event.find(b"\n", start + 1) == end
            and event.startswith(b"event:")
        ):
            payload = event[start + 7 : end]  # nearly always: two lines
        else:
            payload, _ = fields_of(event)
        if not payload or payload == b"[DONE]":
            return
        try:
            named = _NAMED.decode(payload)
        except UNREADABLE:
            object_of(payload)  # what is no object is no answer; a strange one is the client's affair
            self.began = True
            return
        if named.type == "error" or (not named.type and not is_null(named.error)):
            raise_if_error(payload, always=True)
        self.began = True
        inner = named.response or (named.message if isinstance(named.message, _Inner) else None)
        for usage in (inner.usage if inner is not None else NOT_GIVEN, named.usage):
            if not is_null(usage):
                self.usage = usage_of(usage, self.usage, exact=named.type != "message_start")
        if named.type in _LAST_RESPONSE:
            self.last_event, self.done = payload, True
        elif named.type == _LAST_MESSAGE:
            self.done = True


def media_type(content_type: bytes | None) -> bytes:
    return (content_type or b"").partition(b";")[0].strip().lower()


def is_json(content_type: bytes | None) -> bool:
    """An answer that does not say what it is is taken for JSON."""
    kind = media_type(content_type)
    return not kind or kind == b"application/json" or kind.endswith(b"+json")
