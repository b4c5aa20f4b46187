"""Checks of an answer that need no model and cannot be wrong about what they say.

Each looks at one property and is silent where the property has no meaning: an answer is not asked for its
JSON unless the request wanted JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gateway.quality.claims import extract
from gateway.quality.grounded import context_of
from gateway.quality.schemas import Schemas, UncheckedError
from gateway.quality.transcript import Transcript

LONGEST_TEXT = 400_000
"""Characters beyond which no values are looked for: a table of 3 MB takes as long as all checks may."""
LONGEST_PERIOD = 40
"""Words of the longest passage whose repetition is looked for."""
LOOKED_AT = 1500
"""Words, and letters, at the end of an answer in which loops are looked for."""
_SAME_LETTERS = re.compile(r"([^\W\d_]{1,8}?)\1{15,}|([!?,;:%$&@\"'()<>/\\0-9])\2{31,}")
"""What breaks a model's numbers makes it say its first token for ever, mostly an exclamation mark."""
_DRAWN = re.compile(r"[-|:=+*_~.]+")
"""A word of a table or a rule, which may repeat itself."""
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['\u2019]?m|i am) (?:sorry|unable|not able)|sorry,|"
    r"i (?:cannot|can['\u2019]?t|won['\u2019]?t) (?:help|assist|answer|do|provide|comply)|as an ai\b|"
    r"unfortunately,? i (?:cannot|can['\u2019]?t))",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")
_URL = re.compile(r"\bhttps?://[^\s<>\"')\]]+", re.IGNORECASE)

Request = Mapping[str, Any]
"""The body of the request that an answer is of; empty where it could not be read."""
Check = Callable[[Request, Transcript, Schemas], bool | None]
"""True: the answer fails. None: it has no meaning here."""


def bad_json(request: Request, answer: Transcript, schemas: Schemas) -> bool | None:
    """The request wanted JSON, by a schema or without: every choice must be such. What is said beside a
    tool's call is no answer yet."""
    wanted: Any = request.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    said = answer.texts and not answer.tool_calls and not answer.cut_short
    if kind not in ("json_object", "json_schema") or not said:
        return None
    given = wanted.get("json_schema")
    schema = given.get("schema") if kind == "json_schema" and isinstance(given, dict) else {"type": "object"}
    return not all(schemas.allows(text, schema) for text in answer.texts)


def unknown_tool(request: Request, answer: Transcript, _: Schemas) -> bool | None:
    """A tool is called that the request does not have."""
    if not answer.tool_calls:
        return None
    return any(name not in _tools(request) for name, _ in answer.tool_calls)


def bad_arguments(request: Request, answer: Transcript, schemas: Schemas) -> bool | None:
    """A tool is called with arguments that are no JSON, or that its schema does not allow."""
    if not answer.tool_calls or answer.cut_short:
        return None
    tools = _tools(request)
    return any(
        not schemas.allows(arguments or "{}", tools[name])
        for name, arguments in answer.tool_calls
        if name in tools
    )


def repetition(_: Request, answer: Transcript, __: Schemas) -> bool | None:
    """The answer goes round in circles: a passage comes four times in a row, one of up to three words eight
    times, one of up to eight letters sixteen times, a punctuation mark 32 times."""
    return any(map(_loops, answer.texts)) if answer.texts else None


def truncation(_: Request, answer: Transcript, __: Schemas) -> bool | None:
    """It was cut off by the limit on its length. That may be what the client wanted."""
    return answer.cut_short if answer.finish_reasons else None


def empty(_: Request, answer: Transcript, __: Schemas) -> bool | None:
    """It says nothing at all, and calls nothing."""
    if not answer.finish_reasons:
        return None
    return not answer.tool_calls and not answer.reasoned and not any(text.strip() for text in answer.texts)


def refusal(_: Request, answer: Transcript, __: Schemas) -> bool | None:
    """It declines to answer."""
    return any(_REFUSAL.match(text) for text in answer.texts) if answer.texts else None


def invented_value(request: Request, answer: Transcript, _: Schemas) -> bool | None:
    """A web address, or a number or identifier of three digits or more, that nobody gave to the model.

    Only where the conversation itself has such values: otherwise the model is asked for what it knows.
    """
    messages = request.get("messages")
    if not isinstance(messages, list) or not answer.texts:
        return None
    if sum(map(len, answer.texts)) > LONGEST_TEXT:
        return None
    said = set().union(*map(_values, answer.texts))
    if not said:
        return None  # most answers: then the context, which may be long, need not be read
    context = context_of(messages)
    if len(context) > LONGEST_TEXT:
        return None
    known = _values(context)
    if not known:
        return None
    return any(value not in known and value not in context for value in said)


CHECKS: Mapping[str, Check] = {
    "json": bad_json,
    "tool": unknown_tool,
    "arguments": bad_arguments,
    "repetition": repetition,
    "truncation": truncation,
    "empty": empty,
    "refusal": refusal,
    "invented": invented_value,
}
"""By the names under which they are counted."""
HARD = ("json", "tool", "arguments", "repetition", "empty")
"""Those that an answer to anybody's question should pass. The others have a rate of their own in every role,
and say something by its change alone."""


def failures(
    request: Request, answer: Transcript, schemas: Schemas, unchecked: set[str] | None = None
) -> dict[str, bool]:
    """Every check that has a meaning here, and whether the answer fails it. To ``unchecked`` those are added
    whose schema is not looked at."""
    found = {}
    for name, check in CHECKS.items():
        try:
            bad = check(request, answer, schemas)
        except UncheckedError:
            if unchecked is not None:
                unchecked.add(name)
            continue
        if bad is not None:
            found[name] = bad
    return found


def _loops(text: str) -> bool:
    if _SAME_LETTERS.search(text[-LOOKED_AT:]):
        return True
    words = [word for word in text.split()[-LOOKED_AT:] if not _DRAWN.fullmatch(word)]
    for period in range(1, LONGEST_PERIOD + 1):
        needed = (7 if period < 4 else 3) * period
        run = 0
        for before, after in zip(words, words[period:], strict=False):
            run = run + 1 if before == after else 0
            if run >= needed:
                return True
    return False


def _tools(request: Request) -> dict[str, Any]:
    """Schema of each tool's arguments, by name."""
    found = {}
    given = request.get("tools")
    for tool in given if isinstance(given, list) else ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            found[function["name"]] = function.get("parameters") or {}
    return found


def _values(text: str) -> set[str]:
    """Web addresses, and what has three digits or more, in its common form."""
    if len(_DIGIT.findall(text)) < 3 and _URL.search(text) is None:
        return set()
    claims, _ = extract(text)
    found = {url.rstrip(".,;:!?").lower() for url in _URL.findall(text)}
    for claim in claims:
        if claim.kind in ("number", "money", "identifier") and sum(c.isdigit() for c in claim.value[0]) >= 3:
            found.add(claim.value[0])
    return found
