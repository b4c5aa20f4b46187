"""What is read of an answer while it passes: its usage, whether it is whole, and what the client gets of it.

An answer that nobody listens to passes as bytes: an event is looked at with ``bytes.find``, and JSON is
decoded once per answer, for the usage. One that the quality signals are taken from is decoded as it goes.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import msgspec

from gateway.errors import UpstreamError, UpstreamRefusedError
from gateway.proxy.record import Usage
from gateway.quality.answer import Answer
from gateway.upstream.options import OutputOptions, as_wished
from gateway.upstream.sse import DONE, EventSplitter, ServerEvent, events_of, garbage


class _Counts(msgspec.Struct):
    """Tokens of an answer, under the names of OpenAI's completions and of its responses and Anthropic."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def prompt(self) -> int | None:
        return self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens

    @property
    def completion(self) -> int | None:
        return self.completion_tokens if self.completion_tokens is not None else self.output_tokens


class _Whole(msgspec.Struct):
    """What is read of an answer that is not streamed."""

    usage: _Counts | None = None
    error: Any = None


class _Inner(msgspec.Struct):
    usage: _Counts | None = None


class _NamedEvent(msgspec.Struct):
    """An event of responses (``response``) or of Anthropic's messages (``message``)."""

    type: str = ""
    usage: _Counts | None = None
    response: _Inner | None = None
    message: _Inner | None = None
    error: Any = None


_WHOLE = msgspec.json.Decoder(_Whole)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_USAGE = msgspec.json.Decoder(_Counts)
_NAMED = msgspec.json.Decoder(_NamedEvent)
_TAIL = re.compile(rb"(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|null)\}")
"""What follows ``,"usage":`` at the end of an event: one object of at most two levels, and the end."""
_USAGE_KEY = b',"usage":'
_FLAT_USAGE, _USAGE_END = b',"usage":{', b"}}\n\n"
_ERROR = b'data: {"error"'
_NOT_AN_ANSWER = (_ERROR, b"data:{", b"data: [", b"data: \n")


def _of_list(data: bytes) -> _Whole:
    """What an engine renders of several prompts: a list, which has no usage."""
    _LIST.decode(data)
    return _Whole()


class Reader(Protocol):
    """Reads one answer. ``done``: it is whole. Tokens are None until the engine has said a number."""

    done: bool

    @property
    def usage(self) -> Usage: ...

    def feed(self, data: bytes, at: float) -> bytes:
        """What the client gets of ``data``, which arrived at ``at`` (seconds of the gateway's clock).
        Raises UpstreamError for what is no answer, and for an error within it."""
        ...


class WholeReader:
    """An answer that is not streamed: ``feed`` is given all of it."""

    __slots__ = ("completion_tokens", "done", "prompt_tokens")

    def __init__(self) -> None:
        self.done = False
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0

    @property
    def usage(self) -> Usage:
        return Usage(prompt=self.prompt_tokens, completion=self.completion_tokens)

    def feed(self, data: bytes, at: float) -> bytes:
        try:
            whole = _WHOLE.decode(data) if data[:1] != b"[" else _of_list(data)
        except (msgspec.MsgspecError, RecursionError):
            raise garbage(data) from None
        self.done = True
        if (usage := whole.usage) is not None:
            self.prompt_tokens = usage.prompt_tokens
            self.completion_tokens = usage.completion_tokens or 0
            if usage.prompt_tokens is None:  # not OpenAI's names
                self.prompt_tokens = usage.prompt
                self.completion_tokens = usage.completion or 0
        return data


class StreamReader:
    """A stream of completions: events without names, a usage with each, ``[DONE]`` at the end."""

    __slots__ = ("_last_usage", "_options", "_plain", "_splitter", "chunks", "done")

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self._plain = not (options.continuous_usage and options.include_usage)
        """No usage is shown but that at the end, if any."""
        self._splitter = EventSplitter()
        self._last_usage = b""
        self.chunks = 0
        self.done = False

    @property
    def prompt_tokens(self) -> int | None:
        return self._usage().prompt

    @property
    def completion_tokens(self) -> int:
        """The engine's count; one per chunk where it gives none."""
        counted = self._usage().completion
        return self.chunks if counted is None else counted

    @property
    def usage(self) -> Usage:
        return Usage(prompt=self.prompt_tokens, completion=self.completion_tokens)

    def feed(self, data: bytes, at: float) -> bytes:
        end = len(data) - 2
        if (
            self._plain
            and data.startswith(b'data: {"')
            and data.find(b"\n\n") == end
            and b"\r" not in data
            and not self._splitter.rest
        ):
            # Nearly always: one event, and its usage at the end of it.
            cut = data.rfind(_USAGE_KEY)
            usage = data[cut + 9 : end - 1]
            flat = usage.startswith(b"{") and usage.endswith(b"}") and data.endswith(b"}}\n\n")
            # An object without another in it, after choices that are not none.
            if flat and usage.count(b"{") == usage.count(b"}") == 1 and not data.startswith(b"[]", cut - 2):
                self._last_usage = usage
                self.chunks += 1
                return data[:cut] + b"}\n\n"
        return self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        whole = self._splitter.cut(data)
        if not whole:
            return b""
        if b"\r" in whole:
            return b"".join([self._read_slowly(event) for event in events_of(whole)])
        out = []
        if self._plain and (usual := _usual(whole)) is not None:
            self._last_usage, events, passed, length = usual
            self.chunks += events
            if length == len(whole):
                return passed
            out.append(passed)
            whole = whole[length:]
        for event in whole[:-2].split(b"\n\n"):
            cut = event.rfind(_USAGE_KEY)
            if cut > 0 and (tail := _TAIL.fullmatch(event, cut + 9)):
                out.append(self._without_usage(event, cut, tail[1]))
            elif event == b"data: [DONE]":
                self.done = True
                out.append(DONE)
            elif not event.startswith(b'data: {"') or event.startswith(_NOT_AN_ANSWER) or cut > 0:
                out.append(b"".join([self._read_slowly(one) for one in events_of(event + b"\n\n")]))
            else:
                self.chunks += 1
                out.append(event + b"\n\n")
        return out[0] if len(out) == 1 else b"".join(out)

    def _without_usage(self, event: bytes, cut: int, usage: bytes) -> bytes:
        """What the client gets of an event that ends with a usage."""
        options = self._options
        if usage != b"null":
            self._last_usage = usage
            if b'"choices":[]' in event:
                return event + b"\n\n" if options.include_usage else b""
        self.chunks += 1
        return (
            event + b"\n\n" if options.continuous_usage and options.include_usage else event[:cut] + b"}\n\n"
        )

    def _read_slowly(self, event: ServerEvent) -> bytes:
        raise_if_error(event)
        if event.done:
            self.done = True
        elif event.data is not None:
            self.chunks += bool(event.data.get("choices"))
            if event.data.get("usage"):
                self._last_usage = msgspec.json.encode(event.data["usage"])
        return as_wished(event, self._options)

    def _usage(self) -> _Counts:
        if not self._last_usage or self._last_usage == b"null":
            return _Counts()
        try:
            return _USAGE.decode(self._last_usage)
        except msgspec.MsgspecError:
            return _Counts()


def _usual(events: bytes) -> tuple[bytes, int, bytes, int] | None:
    """The beginning of ``events``, up to those of a stream's end, if all in it are as they are nearly always:
    each with a flat usage at its end. The last usage, how many events, they without it, and their length."""
    last = events.find(b'"choices":[]')
    if last < 0:
        last = events.find(b"data: [DONE]")
    if last >= 0:
        events = events[: events.rfind(b"\n\n", 0, last) + 2]
    first, *others = events.split(_FLAT_USAGE)
    if not first.startswith(b'data: {"') or len(others) != events.count(b"\n\n") or _ERROR in events:
        return None
    parts, end = [first], 0
    for part in others:
        end = part.find(b"}")
        if not part.startswith(_USAGE_END, end) or b"{" in part[:end]:
            return None
        parts.append(part[end + 1 :])
    if events.count(b'\n\ndata: {"') != len(others) - 1:
        return None
    return b"{" + others[-1][: end + 1], len(others), b"".join(parts), len(events)


class NamedStreamReader:
    """A stream of named events: OpenAI's responses, Anthropic's messages. It passes as it is."""

    __slots__ = ("_splitter", "chunks", "completion_counted", "done", "prompt_tokens")

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self.chunks = 0
        self.completion_counted: int | None = None
        self.prompt_tokens: int | None = None
        self.done = False

    @property
    def completion_tokens(self) -> int:
        """The engine's count; until it is sent with the last events, one per event with text."""
        return self.chunks if self.completion_counted is None else self.completion_counted

    @property
    def usage(self) -> Usage:
        return Usage(prompt=self.prompt_tokens, completion=self.completion_tokens)

    def feed(self, data: bytes, at: float) -> bytes:
        whole = self._splitter.cut(data)
        for event in whole.split(b"\n\n"):
            if b"delta" in event[:80] and b'"usage"' not in event:
                self.chunks += 1
            elif event.strip() and event.strip() != b"data: [DONE]":
                self._read(event)
        return whole

    def _read(self, event: bytes) -> None:
        start = event.find(b"data:")
        if start < 0:
            if event.startswith((b":", b"event:", b"id:", b"retry:")):
                return
            raise garbage(event)
        try:
            named = _NAMED.decode(event[start + 5 :])
        except (msgspec.MsgspecError, RecursionError):
            raise garbage(event) from None
        if named.type == "error" or (named.error is not None and not named.type):
            raise_if_error(events_of(event + b"\n\n")[-1])
        for usage in (
            named.usage,
            named.response and named.response.usage,
            named.message and named.message.usage,
        ):
            if usage:
                self.prompt_tokens = usage.prompt or self.prompt_tokens
                self.completion_counted = usage.completion or self.completion_counted
        if named.type in ("response.completed", "response.incomplete", "response.failed", "message_stop"):
            self.done = True


class TappedReader:
    """An answer that is listened to, streamed or not: ``answer`` has all of it in the end.

    What cannot be understood is passed on all the same; ``confused`` says so.
    """

    __slots__ = ("_options", "_splitter", "answer", "confused", "done")

    def __init__(self, options: OutputOptions) -> None:
        self._options = options
        self._splitter = EventSplitter() if options.stream else None
        self.answer = Answer()
        self.confused = False
        self.done = False

    @property
    def prompt_tokens(self) -> int | None:
        return self.answer.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return self.answer.completion_tokens

    @property
    def usage(self) -> Usage:
        return Usage(prompt=self.prompt_tokens, completion=self.completion_tokens)

    def feed(self, data: bytes, at: float) -> bytes:
        events = self._splitter.feed(data) if self._splitter else [whole_event(data)]
        out = []
        for event in events:
            if self._splitter:
                raise_if_error(event)
            out.append(as_wished(event, self._options))
            if event.data is not None and not self.confused:
                try:
                    self.answer.add(event.data, at)
                except Exception:  # an engine may send what we have never seen: that breaks no request
                    self.confused = True
            self.done = self.done or event.done or not self._splitter
        return b"".join(out)


def whole_event(raw: bytes) -> ServerEvent:
    """The whole of an answer that is not streamed. Raises UpstreamError."""
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise garbage(raw)
    return ServerEvent(raw, data)


def raise_if_error(event: ServerEvent) -> None:
    """Raise the error that came as an event: vLLM has sent its 200 by the time it looks closely."""
    if event.data is None or not event.data.get("error"):
        return
    error = event.data["error"]
    code = error.get("code") if isinstance(error, dict) else None
    raise refusal(code if isinstance(code, int) else 500, msgspec.json.encode(event.data))


def refusal(status: int, raw: bytes) -> UpstreamError:
    """An answer other than 200: the client's own mistake is passed on, anything else is a 502."""
    if 400 <= status < 500:
        try:
            return UpstreamRefusedError(status, msgspec.json.decode(raw))
        except (msgspec.MsgspecError, RecursionError):
            return UpstreamRefusedError(status, {})
    internal = f"the engine answered {status}, with {len(raw)} bytes"
    return UpstreamError(f"The engine failed with status {status}; try again.", internal=internal)
