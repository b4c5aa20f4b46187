"""The body of a request: taken apart at its first level only, and checked as far as we depend on it.

A field that nobody here asks for stays the bytes that the client sent, and is put together again as such:
a prompt of 16 KB is scanned twice and never becomes Python objects. Fields that are not named here pass
as they are: the engine knows its own dialect. A refusal names the field, the value's type and the fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import UNSET

from gateway.errors import BadRequestError

Role = Literal["assistant", "developer", "function", "system", "tool", "user"]
_ROLES: tuple[str, ...] = get_args(Role)
_MESSAGES_FIX = 'send a list such as [{"role": "user", "content": "Hello"}]'


class _Part(msgspec.Struct, gc=False):
    """Part of a message's content; what it holds is the engine's affair."""

    type: Any = None


class _Message(msgspec.Struct, gc=False):
    role: Role
    content: str | list[_Part] | None = None


class RequestFields(msgspec.Struct):
    """The fields that the gateway itself depends on, found in one pass over the bytes."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    stream: bool | None = None
    stream_options: dict[str, Any] | msgspec.UnsetType | None = UNSET
    temperature: float | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    metadata: Any = None
    vllm_xargs: Any = None
    prompt_cache_key: Any = None
    user: Any = None
    logprobs: Any = UNSET
    top_logprobs: Any = UNSET
    cache_salt: Any = UNSET
    priority: Any = UNSET


class ChatFields(RequestFields, kw_only=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    logprobs: bool | msgspec.UnsetType | None = UNSET
    top_logprobs: Annotated[int, msgspec.Meta(ge=-1)] | msgspec.UnsetType | None = UNSET


Decoder = msgspec.json.Decoder
_FIELDS = Decoder(dict[str, msgspec.Raw])
CHAT_DECODER: Decoder[RequestFields] = Decoder(ChatFields)
DECODER = Decoder(RequestFields)


class Body:
    """A JSON object by its first-level fields, and what is ``asked`` in those that matter here."""

    __slots__ = ("_all", "_raw", "_values", "fields")

    def __init__(
        self,
        raw: bytes,
        check: Callable[[Body], None] | None = None,
        decoder: Decoder[RequestFields] | None = None,
    ) -> None:
        """``decoder`` reads ``asked`` and accepts only what is right; ``check`` is run where it does not, or
        where there is none, and says what is wrong in words. Raises BadRequestError."""
        self._raw = raw
        self._all: dict[str, msgspec.Raw] | None = None
        self._values: dict[str, Any] = {}
        if decoder is not None:
            try:
                self.fields = decoder.decode(raw)
                if not raw.isascii():
                    raw.decode()
                return
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                pass
        if check is not None:
            check(self)
        given = {field: self.get(field) for field in RequestFields.__struct_fields__ if field in self}
        self.fields = RequestFields(**{"model": "", **given})

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._raw)

    @property
    def _fields(self) -> dict[str, msgspec.Raw]:
        if self._all is None:
            raw = self._raw
            try:
                self._all = _FIELDS.decode(raw)
                if not raw.isascii():
                    raw.decode()
            except msgspec.ValidationError:
                raise BadRequestError(f"The body is {_kind_of_json(raw)}; send a JSON object.") from None
            except RecursionError:
                raise BadRequestError("The body is nested too deeply; send a flatter JSON object.") from None
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BadRequestError(f"The body is not valid JSON ({error}); send a JSON object.") from None
        return self._all

    def __contains__(self, field: str) -> bool:
        return field in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def raw(self, field: str) -> bytes:
        """A field's JSON; empty when it is absent."""
        value = self._fields.get(field)
        return b"" if value is None else bytes(value)

    def view(self, field: str) -> memoryview:
        """The same without a copy."""
        value = self._fields.get(field)
        return memoryview(b"" if value is None else value)

    def get(self, field: str) -> Any:
        """A field's value; None when it is absent."""
        raw = self._fields.get(field)
        if raw is None:
            return None
        if field not in self._values:
            self._values[field] = _value(raw)
        return self._values[field]

    def with_(self, changes: Mapping[str, bytes]) -> bytes:
        """The body's JSON with some fields set anew; ``changes`` are JSON too."""
        raw, tail = self._raw, b""
        for name, value in changes.items():
            if name == "model":
                replaced = _with_model(raw, self.fields.model, value)
            elif getattr(self.fields, name) is UNSET and raw.endswith(b"}"):
                tail += b',"%b":%b' % (name.encode(), value)
                continue
            else:
                replaced = None
            if replaced is None:
                fields = dict(self._fields) | {name: msgspec.Raw(value) for name, value in changes.items()}
                return msgspec.json.encode(fields)
            raw = replaced
        return b"%b%b}" % (raw[:-1], tail) if tail else raw

    def everything(self) -> dict[str, Any]:
        """All values, as a copy."""
        return {field: self.get(field) for field in self._fields}


EMPTY = Body(b"{}")


def _with_model(raw: bytes, old: str, new: bytes) -> bytes | None:
    """The body with another model, if there is but one place where the old one can be."""
    before, found, after = raw.partition(b'"model"')
    if not found or b'"model"' in after:
        return None
    value = after.lstrip(b" \t\r\n:")
    quoted = b'"%b"' % old.encode()
    if not value.startswith(quoted):
        return None
    return b'%b"model":%b%b' % (before, new, value[len(quoted) :])


def _value(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        raise BadRequestError("The body is nested too deeply; send a flatter JSON object.") from None


def check_chat(body: Body) -> None:
    """What every endpoint needs, and messages. Raises BadRequestError."""
    check_common(body)
    _check_messages(body)
    expect(body, "logprobs", (bool,), "true or false")
    expect(body, "top_logprobs", (int,), "a whole number from 0 to 20")
    if (body.get("top_logprobs") or 0) < -1:
        raise _bad("top_logprobs", f"is {body.get('top_logprobs')}", "send a whole number from 0 to 20")


def check_prompt(body: Body) -> None:
    """A text completion."""
    check_common(body)
    require(body, "prompt", "send the text to continue")


def check_responses(body: Body) -> None:
    check_common(body)
    require(body, "input", "send a string or a list of items")
    expect(body, "input", (str, list), "a string or a list of items")
    expect(body, "instructions", (str,), "a string")
    expect(body, "max_output_tokens", (int,), "a whole number of at least 1")


def check_anthropic(body: Body) -> None:
    """A request in Anthropic's form."""
    check_common(body)
    if "max_tokens" not in body:
        raise _bad("max_tokens", "is missing", "send a whole number of at least 1")
    check_anthropic_prompt(body)


def check_anthropic_prompt(body: Body) -> None:
    """The same without the answer's length, as for counting tokens."""
    check_common(body)
    _check_messages(body)
    expect(body, "system", (str, list), "a string or a list of blocks")


def check_embeddings(body: Body) -> None:
    check_common(body)
    if "messages" not in body:
        require(body, "input", "send the text, or a list of texts")


def check_common(body: Body) -> None:
    if "model" not in body:
        raise _bad("model", "is missing", "name a model, a role or model:variant; GET /v1/models lists them")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _bad("model", f"is {_kind(model)}", "send a model id as a non-empty string")
    expect(body, "stream", (bool,), "true or false")
    expect(body, "stream_options", (dict,), 'an object such as {"include_usage": true}')
    expect(body, "temperature", (int, float), "a number such as 0.7")
    for field in ("max_tokens", "max_completion_tokens"):
        if field in body:
            expect(body, field, (int,), "a whole number of at least 1")
            value = body.get(field)
            if value is not None and value < 1:
                raise _bad(field, f"is {value}", "send a whole number of at least 1")


def require(body: Body, field: str, fix: str) -> None:
    if field not in body:
        raise _bad(field, "is missing", fix)


def expect(body: Body, field: str, types: tuple[type, ...], wanted: str) -> None:
    """Refuse a value of another type. Null means absent, as OpenAI's clients send it; bool is no int."""
    if field not in body:
        return
    value = body.get(field)
    if value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
        return
    raise _bad(field, f"is {_kind(value)}", f"send {wanted}")


def _check_messages(body: Body) -> None:
    if "messages" not in body:
        raise _bad("messages", "is missing", _MESSAGES_FIX)
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _bad("messages", f"is {_kind(messages)}", _MESSAGES_FIX)
    if not messages:
        raise _bad("messages", "is empty", _MESSAGES_FIX)
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise _bad(where, f"is {_kind(message)}", "send an object with role and content")
    if "role" not in message:
        raise _bad(f"{where}.role", "is missing", f"use one of {', '.join(_ROLES)}")
    role = message["role"]
    if not isinstance(role, str):
        raise _bad(f"{where}.role", f"is {_kind(role)}", f"use one of {', '.join(_ROLES)}")
    if role not in _ROLES:
        raise _bad(f"{where}.role", f"is {role[:40]!r}", f"use one of {', '.join(_ROLES)}")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise _bad(f"{where}.content", f"is {_kind(content)}", "send a string or a list of parts")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, dict):
            fix = 'send an object such as {"type": "text", "text": "Hello"}'
            raise _bad(f"{where}.content[{index}]", f"is {_kind(part)}", fix)


def _bad(field: str, what: str, fix: str) -> BadRequestError:
    return BadRequestError(f"{field}: {what}; {fix}", param=field)


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def _kind_of_json(raw: bytes) -> str:
    examples: dict[bytes, Any] = {b'"': "", b"[": [], b"n": None, b"t": True, b"f": False}
    return _kind(examples.get(raw.lstrip()[:1], 0))
