"""What becomes of a provider's failure: the client's answer, and the replica's breaker.

| the provider | the client | why | the breaker |
|---|---|---|---|
| 400, 409, 413, 415, 422, 451 | the same, in the provider's words | about its request | it answers |
| 403 of a content policy | the same | about its request | it answers |
| 429 | the same, with the provider's wait | its to slow down | it answers |
| 503, 529 | 503, with the provider's wait | 529 (Anthropic's "overloaded") is in no register | it answers |
| 408, 504 | 504 | the provider itself ran out of time | an error |
| 401 to 405, 407 | 502 | our key, our address, our name of a model: not the client's | it answers |
| any other status, no HTTP, half an answer | 502 | it failed | an error |
| no connection | 502 | it was not reached | not reached |
| LiteLLM refuses before it asks | by its status, in its words | about its request | it answers |

An overloaded provider, and one that does not like our key, work: to refuse other clients on their behalf
would put our guess in the place of their answer.

LiteLLM wraps an error several times, differs between providers, and loses the status (529 is 500, 413 is
400) and the headers on the way; the httpx exception below it has both, whatever the provider. What a
provider says is cleaned of our key and of its address before the client sees it; the log has none of it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from gateway.errors import UpstreamError, UpstreamOverloadedError, UpstreamRefusedError, UpstreamTimeoutError

LONGEST_WAIT_S = 24 * 3600
_LONGEST_MESSAGE = 2000
_ABOUT_THE_REQUEST = frozenset({400, 409, 413, 415, 422, 429, 451})
_ABOUT_OUR_SETTINGS = frozenset({401, 402, 403, 404, 405, 407})
_OVERLOADED = frozenset({503, 529})
_OUT_OF_TIME = frozenset({408, 504})
_POLICY = re.compile(r"content.?(policy|filter|management)|moderation|safety|flagged", re.IGNORECASE)
_HIDDEN = "[hidden]"


class Outcome(Enum):
    """What an attempt tells of the provider."""

    ANSWERED = "answered"
    ERRORED = "errored"
    NOT_REACHED = "not_reached"


class Failure(NamedTuple):
    error: UpstreamError
    outcome: Outcome


class Wait(NamedTuple):
    """How long the provider asks to be left alone."""

    seconds: int | None = None
    milliseconds: int | None = None
    """Where it gave them."""


def failure(error: BaseException, model: str, secrets: Iterable[str]) -> Failure:
    """An exception of LiteLLM, or of what it stands on, as what the client and the breaker get."""
    if isinstance(error, UpstreamError):
        return Failure(error, Outcome.ERRORED)
    chain = list(_chain(error))
    secrets = tuple(secrets)
    response = next((found for one in chain if (found := _response(one)) is not None), None)
    if response is not None:
        wait = wait_of(response.headers.get_list("retry-after"), response.headers.get_list("retry-after-ms"))
        result = _by_status(int(response.status_code), _said(response, secrets), wait, model)
    elif any(_is(one, "ConnectError", "ConnectTimeout", "ProxyError") for one in chain):
        result = Failure(UpstreamError(f"The provider of {model} cannot be reached."), Outcome.NOT_REACHED)
    elif any(isinstance(one, TimeoutError) or _is(one, "TimeoutException") for one in chain):
        result = Failure(_out_of_time(model), Outcome.ERRORED)
    elif (status := _litellms_status(chain)) is not None:
        words = _short(cleaned(_own_words(error), secrets))
        result = _by_status(status, {"message": words, "type": "invalid_request_error"}, Wait(), model)
    else:
        result = Failure(UpstreamError(f"The provider of {model} failed; try again."), Outcome.ERRORED)
    kinds = " < ".join(dict.fromkeys(type(one).__name__ for one in chain))
    said = "no HTTP answer" if response is None else f"status {response.status_code}"
    result.error.internal = f"the provider of {model}: {said}, {kinds}"
    return result


def _by_status(status: int, said: dict[str, Any], wait: Wait, model: str) -> Failure:
    policy = status == 403 and _POLICY.search(json.dumps(said)) is not None
    if status in _ABOUT_THE_REQUEST or policy:
        refused = UpstreamRefusedError(status, {"error": said}, retry_after_s=wait.seconds)
        refused.retry_after_ms = wait.milliseconds
        return Failure(refused, Outcome.ANSWERED)
    if status in _OVERLOADED:
        busy = UpstreamOverloadedError(f"The provider of {model} is overloaded: {said['message']}")
        busy.retry_after_s, busy.retry_after_ms = wait
        return Failure(busy, Outcome.ANSWERED)
    if status in _OUT_OF_TIME:
        return Failure(_out_of_time(model), Outcome.ERRORED)
    if status in _ABOUT_OUR_SETTINGS:
        text = (
            f"The provider of {model} does not accept what it is set up with here (status {status}); whoever "
            "runs this gateway has to look at its entry under providers."
        )
        return Failure(UpstreamError(text), Outcome.ANSWERED)
    return Failure(
        UpstreamError(f"The provider of {model} failed with status {status}; try again."), Outcome.ERRORED
    )


def wait_of(seconds: Iterable[str], milliseconds: Iterable[str]) -> Wait:
    """From the ``retry-after`` and ``retry-after-ms`` headers: the first of each that means something, up to
    a day. A date is a time from now."""
    exact = next((ms for text in milliseconds if (ms := _number(text)) is not None), None)
    found = next((s for text in seconds if (s := _seconds(text)) is not None), None)
    if exact is not None:
        exact = min(exact, LONGEST_WAIT_S * 1000)
        if found is None:
            found = exact / 1000
    return Wait(
        None if found is None else min(math.ceil(found), LONGEST_WAIT_S),
        None if exact is None else math.ceil(exact),
    )


def _seconds(text: str) -> float | None:
    if (number := _number(text)) is not None:
        return number
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _number(text: str) -> float | None:
    if not re.fullmatch(r"\s*[0-9]{1,12}(\.[0-9]{1,9})?\s*", text):
        return None
    return float(text)


def secrets_of(key: str, api_base: str | None) -> tuple[str, ...]:
    """What must be in no answer and no log: the key, the address, and the credentials in it."""
    found = {key} if len(key) >= 4 and key != "none" else set()
    if api_base:
        parts = urlsplit(api_base)
        found |= {api_base, api_base.rstrip("/"), parts.netloc, parts.netloc.rpartition("@")[2]}
        if parts.password:
            user, password = unquote(parts.username or ""), unquote(parts.password)
            basic = base64.b64encode(f"{user}:{password}".encode()).decode()
            found |= {password, parts.password, basic}
    return tuple(sorted(filter(None, found), key=len, reverse=True))


def cleaned(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text


def _said(response: Any, secrets: tuple[str, ...]) -> dict[str, Any]:
    """The provider's error object, in the fields of OpenAI's."""
    try:
        text = cleaned(response.text, secrets)
    except Exception:  # the body of a stream that nobody has read
        text = ""
    said: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
    if isinstance(said, list):
        said = said[0] if said else None
    if isinstance(said, dict):
        said = said.get("error", said)
    said = said if isinstance(said, dict) else {"message": said if isinstance(said, str) else None}
    message = said.get("message") or said.get("detail")
    code = said.get("code")
    return {
        "message": _short(
            message if isinstance(message, str) else f"the provider says {response.status_code}"
        ),
        "type": _text(said.get("type")) or _text(said.get("status")) or "invalid_request_error",
        "param": _text(said.get("param")),
        "code": code if isinstance(code, str) else None,
    }


def _litellms_status(chain: list[BaseException]) -> int | None:
    """LiteLLM's own word, where no HTTP answer is below it: it found the request wrong, or the provider is
    reached by other means. None where something broke."""
    if any(isinstance(one, ValueError) for one in chain) or any(_is(one, "TransportError") for one in chain):
        return None
    status = getattr(chain[0], "status_code", None)
    named = _is(
        chain[0], "BadRequestError", "RateLimitError", "ServiceUnavailableError", "AuthenticationError"
    )
    return status if named and isinstance(status, int) else None


def _own_words(error: BaseException) -> str:
    return re.sub(r"^(litellm\.)?\w+Error: ", "", str(getattr(error, "message", "") or error))


def _out_of_time(model: str) -> UpstreamTimeoutError:
    return UpstreamTimeoutError(f"The provider of {model} gave no answer in time.")


def _response(error: BaseException) -> Any:
    """What the provider answered, if this is httpx's word for it."""
    return getattr(error, "response", None) if _is(error, "HTTPStatusError") else None


def _is(error: BaseException, *names: str) -> bool:
    """By the names of its classes: httpx is LiteLLM's, and is not imported here."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None
