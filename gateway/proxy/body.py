"""The body of a request: taken apart at its first level only, and read only as far as the gateway needs it.

Everything else is the engine's affair: it passes as the bytes that the client sent, and what the engine says
to it is what the client sees. What is read here is read as vLLM reads it (Python's ``json``, then pydantic's
coercions), so that both see the same request:

- of a field that comes twice, in whatever spelling of its name, the last one counts;
- a byte order mark, UTF-16, NaN, lone surrogates are taken, as ``json.loads`` takes them;
- ``"stream": "false"``, ``"stream": 0`` and ``"n": "2"`` are what pydantic makes of them.

Three ways, the first that can: one pass of msgspec over the bytes with the types that clients nearly always
send (a prompt of 16 KB never becomes Python objects); the first level alone, and the few fields that matter
by pydantic; the whole body by ``json.loads`` where it is not the JSON of RFC 8259. A refusal names the field,
its value and the fix.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from gateway.errors import BadRequestError
from gateway.proxy.coercions import (
    BOOL,
    INT,
    STREAM_OPTIONS_FIX,
    bad,
    coerced,
    kind_of,
    kind_of_json,
    needed,
    stream_options_of,
)
from gateway.proxy.fields import GRAMMAR_FIELDS, KNOWN_NAMES, RequestFields, Usual
from gateway.proxy.lenient import in_utf8

LARGEST_READ_BYTES = 64 << 10
"""Of a field that the gateway reads besides the engine. A larger one passes unread: what says who asks is
short, and decoding megabytes would hold everybody up."""
LARGEST_LENIENT_BYTES = 64 << 10
"""Of a body that is not the JSON of RFC 8259 and that Python takes (NaN, for one). It has to be made objects
of as a whole, which takes a second for a few megabytes. A larger one is read by ``large.py``."""
LARGE_BYTES = 256 << 10
"""Of a body that is worth not being copied."""
NEEDED = ("model", "stream", "stream_options")
"""Fields that cannot be passed on unread."""
_SPACE = b" \t\r\n"
_USUAL_ENDS = (b'"}', b"]}", b"}}", b"e}", *(b"%d}" % digit for digit in range(10)))
"""Of an object that is not empty."""
TOO_DEEP = "The body is nested too deeply; send a flatter JSON object."


class Reads(enum.Enum):
    """How much of a body an endpoint needs to have read."""

    NAMES = enum.auto()
    """The model, and who asks. Its answers are never streamed."""
    STREAM = enum.auto()
    """Whether the answer is streamed, too."""
    OPTIONS = enum.auto()
    """Also what is asked for along with it: usage, log-probabilities."""


_USUAL = msgspec.json.Decoder(Usual)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KNOWN: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    msgspec.defstruct("_Known", [(name, msgspec.Raw | UnsetType, UNSET) for name in KNOWN_NAMES], gc=False)
)
"""The fields that are ever looked at one by one: however many others there are, they are skipped."""


class Body:
    """A JSON object by its first-level fields, and ``fields``, what matters of them here."""

    __slots__ = ("_all", "_known", "_raw", "_values", "fields", "prompts")

    def __init__(self, raw: bytes, reads: Reads = Reads.OPTIONS) -> None:
        """Raises BadRequestError for what is no JSON object, and for a field that is needed here and that
        vLLM could not read either."""
        self._raw = raw
        self.prompts: int | None = None
        """How many prompts it has, where that was counted while it was read."""
        self._all: dict[str, msgspec.Raw] | None = None
        self._known: dict[str, msgspec.Raw] | None = None
        self._values: dict[str, Any] = {}
        self.fields: RequestFields
        try:
            fields = _USUAL.decode(raw)
            if not raw.isascii():
                raw.decode()  # msgspec does not look into what it skips
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self.fields = self._read(reads)
            return
        if fields.metadata is not None:
            fields.metadata = _small(fields.metadata)
        if fields.vllm_xargs is not None:
            fields.vllm_xargs = _small(fields.vllm_xargs)
        self.fields = fields

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._raw)

    @property
    def json(self) -> bytes:
        """All of it, as JSON that every parser reads alike, but for what RFC 8259 does not know."""
        return self._raw

    @property
    def _fields(self) -> dict[str, msgspec.Raw]:
        """All of them."""
        if self._all is None:
            self._all = self._decoded(_FIELDS.decode)
        return self._all

    def _field(self, field: str) -> msgspec.Raw | None:
        if field not in KNOWN_NAMES:
            return self._fields.get(field)
        if self._known is None:
            self._known = self._decoded(_known)
        return self._known.get(field)

    def _decoded(self, decode: Callable[[bytes], dict[str, msgspec.Raw]]) -> dict[str, msgspec.Raw]:
        """What ``decode`` finds. Raises BadRequestError."""
        try:
            try:
                return _strictly(decode, self._raw)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if isinstance(error, msgspec.ValidationError):
                    raise
                if (unified := in_utf8(self._raw)) is None:
                    raise
                self._raw = unified
                return _strictly(decode, self._raw)
        except msgspec.ValidationError:
            raise BadRequestError(f"The body is {kind_of_json(self._raw)}; send a JSON object.") from None
        except RecursionError:
            raise BadRequestError(TOO_DEEP) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if len(self._raw) <= LARGEST_LENIENT_BYTES:
                return self._as_python_reads_it()
            raise BadRequestError(
                f"The body is not valid JSON ({error}); send a JSON object as RFC 8259 has it."
            ) from None

    def _as_python_reads_it(self) -> dict[str, msgspec.Raw]:
        """What RFC 8259 does not know and ``json`` does. The body becomes what was read of it, so that nobody
        after us can read anything else."""
        try:
            values = json.loads(self._raw)
            if not isinstance(values, dict):
                raise BadRequestError(f"The body is {kind_of(values)}; send a JSON object.")
            fields = {name: json.dumps(value).encode() for name, value in values.items()}
        except RecursionError:
            raise BadRequestError(TOO_DEEP) from None
        except ValueError as error:  # of Unicode and of numbers that are too long, too
            raise BadRequestError(f"The body is not valid JSON ({error}); send a JSON object.") from None
        self._values = values
        pairs = [b"%b:%b" % (json.dumps(name).encode(), value) for name, value in fields.items()]
        self._raw = b"{%b}" % b",".join(pairs)
        self._all = self._known = {name: msgspec.Raw(value) for name, value in fields.items()}
        return self._all

    def __contains__(self, field: str) -> bool:
        return self._field(field) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def raw(self, field: str) -> bytes:
        """A field's JSON; empty when it is absent."""
        value = self._field(field)
        return b"" if value is None else bytes(value)

    def view(self, field: str) -> memoryview:
        """The same without a copy."""
        value = self._field(field)
        return memoryview(b"" if value is None else value)

    def prompt(self, names: Sequence[str]) -> list[memoryview]:
        """The JSON of those of ``PROMPT_FIELDS`` that it has, without a copy."""
        fields = self.fields
        if self._known is None and type(fields) is Usual:
            return [memoryview(raw) for name in names if (raw := getattr(fields, name)) is not UNSET]
        return [part for name in names if (part := self.view(name))]

    def get(self, field: str) -> Any:
        """A field's value; None when it is absent."""
        raw = self._field(field)
        if raw is None:
            return None
        if field not in self._values:
            self._values[field] = value_of(field, raw)
        return self._values[field]

    def grammars(self) -> Sequence[tuple[str, msgspec.Raw]]:
        """Those of ``GRAMMAR_FIELDS`` that it has, as JSON."""
        fields = self.fields
        if self._known is None and type(fields) is Usual:
            none = fields.tools is fields.response_format is fields.structured_outputs is fields.text is UNSET
            if none and fields.output_config is UNSET:  # nearly always
                return ()
            return [(name, raw) for name in GRAMMAR_FIELDS if (raw := getattr(fields, name)) is not UNSET]
        return [(name, raw) for name in GRAMMAR_FIELDS if (raw := self._field(name)) is not None]

    def with_(self, changes: Mapping[str, bytes]) -> bytes:
        """The body's JSON with some fields set anew; ``changes`` are JSON too. They come last: whatever the
        client sent of the same names, in whatever spelling, and how often, the last one counts."""
        return self.with_fields(fields_of(changes))

    def with_fields(self, ours: bytes) -> bytes:
        """The same with what ``fields_of`` made of the changes."""
        raw = self._raw
        if not ours:
            return raw
        if raw.endswith(_USUAL_ENDS):  # nearly always: no space before the brace that ends it
            return b"%b%b}" % (raw[:-1], ours)
        head = raw.rstrip(_SPACE)[:-1]
        empty = head.endswith(b"{") or head.rstrip(_SPACE).endswith(b"{")
        return b"%b%b}" % (head, ours[1:] if empty else ours)

    def parts(self, ours: bytes) -> tuple[memoryview, bytes]:
        """The same in two parts, of which the first is the body's own bytes: megabytes are not copied."""
        raw = self._raw
        if raw.endswith(_USUAL_ENDS):
            return memoryview(raw)[:-1], ours + b"}"
        return memoryview(self.with_fields(ours)), b""

    def changed(self, changes: Mapping[str, bytes], reads: Reads) -> Body:
        """The body that ``with_`` gives. Raises BadRequestError as at the beginning."""
        return Body(self.with_(changes), reads)

    def only(self, names: Sequence[str]) -> bytes:
        """JSON of an object that has these of the fields, and perhaps others."""
        return self._raw

    def everything(self) -> dict[str, Any]:
        """All values, as a copy."""
        return {field: self.get(field) for field in self._fields}

    def _read(self, reads: Reads) -> RequestFields:
        """The fields that matter, with pydantic's coercions."""
        given = {
            name: _plain(self.get(name))
            for name in RequestFields.__struct_fields__
            if (raw := self._field(name)) is not None and len(memoryview(raw)) <= LARGEST_READ_BYTES
        }
        fields = RequestFields(**given)
        if "model" in self:
            self._refuse_large("model", "send a model id, or leave it out")
            fields.model = self._model(given.get("model"))
        fields.n = coerced(INT, given.get("n"))
        if fields.priority is not UNSET:
            fields.priority = coerced(INT, fields.priority, fields.priority)
        if reads is Reads.NAMES:
            fields.stream, fields.stream_options = None, UNSET
            return fields
        if "stream" in self:
            self._refuse_large("stream", "send true or false")
            fields.stream = needed(BOOL, "stream", self.get("stream"), "send true or false")
        if reads is Reads.OPTIONS:
            if not fields.stream:
                fields.stream_options = UNSET  # whatever it is, the engine says what it thinks of it
            elif "stream_options" in self:
                self._refuse_large("stream_options", STREAM_OPTIONS_FIX)
                fields.stream_options = stream_options_of(self.get("stream_options"))
            fields.logprobs = coerced(BOOL, fields.logprobs, fields.logprobs)
            if isinstance(fields.top_logprobs, float):
                fields.top_logprobs = coerced(INT, fields.top_logprobs, fields.top_logprobs)
        return fields

    def _refuse_large(self, field: str, fix: str) -> None:
        """Raises BadRequestError for a field that has to be read, and takes too long to read."""
        size = len(self.view(field))
        if size > LARGEST_READ_BYTES:
            raise BadRequestError(f"{field}: has {size} bytes; {fix}", param=field)

    def _model(self, model: Any) -> str:
        if model is None and self.get("model") is None:
            return ""
        if not isinstance(model, str):
            raise bad("model", self.get("model"), "send a model id as a string, or leave it out")
        return model


EMPTY = Body(b"{}")


def fields_of(changes: Mapping[str, bytes]) -> bytes:
    """Fields of an object, each with a comma before it."""
    return b"".join([b',"%b":%b' % (name.encode(), value) for name, value in changes.items()])


def _known(raw: bytes) -> dict[str, msgspec.Raw]:
    found = _KNOWN.decode(raw)
    return {name: value for name in KNOWN_NAMES if (value := getattr(found, name)) is not UNSET}


def _strictly(decode: Callable[[bytes], dict[str, msgspec.Raw]], raw: bytes) -> dict[str, msgspec.Raw]:
    found = decode(raw)
    if not raw.isascii():
        raw.decode()
    return found


def _small(raw: msgspec.Raw) -> Any:
    """The value of a field that says who asks, which is small."""
    if len(memoryview(raw)) > LARGEST_READ_BYTES:
        return None
    try:
        return value_of("metadata", raw)
    except BadRequestError:
        return None  # it is the engine's to refuse


def value_of(field: str, raw: bytes | memoryview | msgspec.Raw) -> Any:
    """What a field's JSON says, as Python's ``json`` reads it. Raises BadRequestError."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        pass  # numbers out of its range, for one
    try:
        return json.loads(bytes(raw))
    except RecursionError:
        raise BadRequestError(TOO_DEEP, param=field) from None
    except ValueError as error:
        raise BadRequestError(f"{field}: {error}; send a smaller one", param=field) from None


def _plain(value: Any) -> Any:
    """The same without lone surrogates, which no log line and no header could hold."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode(errors="replace"))
    return value
