"""The models that a request may name, for whoever asks: what its key may not use is not there.

In OpenAI's form, with vLLM's ``max_model_len``; in Anthropic's for its clients, which send
``anthropic-version``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gateway.config import parts_of
from gateway.errors import ForbiddenError, UnknownModelError, some_of
from gateway.identity import Identities, Sender
from gateway.proxy.fields import RequestFields
from gateway.proxy.plane import DataPlane, Snapshot
from gateway.routing.ladders import precision
from quantize.card import ONNX

_CREDENTIALS = ("authorization", "x-api-key")
_PAGE = 20
"""Models that Anthropic's API lists at a time, unless asked for more."""
_LONGEST_PAGE = 1000


class Models:
    """The routes below ``/v1/models``, and the same without the version."""

    def __init__(self, plane: DataPlane, created: int) -> None:
        """``created``: Unix time, said of every model."""
        self._plane = plane
        self._created = created

    def add_to(self, app: FastAPI) -> None:
        app.get("/v1/models")(self.list)
        app.get("/v1/models/{model:path}")(self.get)
        for path, show in (("/models", self.list), ("/models/{model:path}", self.get)):
            app.get(path, include_in_schema=False)(show)

    async def list(self, request: Request) -> Response:
        """Every id that a request with this key may name."""
        return self._listed(request)

    async def get(self, model: str, request: Request) -> Response:
        """One of them."""
        if not model:
            return self._listed(request)
        snapshot = self._plane.snapshot
        usable = usable_models(snapshot, request.headers)
        if model not in usable:
            raise UnknownModelError(
                f"model: {model[:80]!r} does not exist; use one of: {some_of(usable)}", param="model"
            )
        return JSONResponse(self._form(request)(model, longest(snapshot, model)))

    def _listed(self, request: Request) -> Response:
        snapshot, form = self._plane.snapshot, self._form(request)
        usable = usable_models(snapshot, request.headers)
        entries = [form(model, longest(snapshot, model)) for model in usable]
        if form == self._anthropic:
            return JSONResponse(_page(entries, request))
        return JSONResponse({"object": "list", "data": entries})

    def _form(self, request: Request) -> Callable[[str, int | None], dict[str, Any]]:
        return self._anthropic if "anthropic-version" in request.headers else self._openai

    def _openai(self, model: str, tokens: int | None) -> dict[str, Any]:
        entry = {"id": model, "object": "model", "created": self._created, "owned_by": "tiercel"}
        return entry if tokens is None else {**entry, "max_model_len": tokens}

    def _anthropic(self, model: str, tokens: int | None) -> dict[str, Any]:
        created = datetime.fromtimestamp(self._created, UTC).isoformat().replace("+00:00", "Z")
        entry = {"type": "model", "id": model, "display_name": model, "created_at": created}
        return entry if tokens is None else {**entry, "max_input_tokens": tokens}


def usable_models(snapshot: Snapshot, headers: Mapping[str, str]) -> list[str]:
    """The known models that a request with this key may name, and gets. Raises UnauthenticatedError."""
    given = {name: headers[name] for name in _CREDENTIALS if name in headers}
    sender = Identities(snapshot.config).sender(given)
    known = snapshot.router.known_models()
    return [model for model in known if _may_use(snapshot, sender, model)]


def _may_use(snapshot: Snapshot, sender: Sender, model: str) -> bool:
    """Asked of those who would refuse the request."""
    try:
        caller = sender.caller(RequestFields(model=model))
    except ForbiddenError:
        return False
    if model in snapshot.config.roles:
        return caller.role == model  # a bound key names another role in vain
    lowest, cards = caller.key.lowest if caller.key else None, snapshot.cards
    if lowest is None or model not in cards or parts_of(model)[0] != parts_of(lowest)[0]:
        return True
    return precision(cards[model]) >= precision(cards[lowest])


def longest(snapshot: Snapshot, model: str) -> int | None:
    """Tokens of prompt and answer together that every engine takes which may serve a model; None where that
    is not ours to know, as of a provider's model. A classifier, which reads the beginning of a longer
    message, does not count beside others."""
    config, cards = snapshot.config, snapshot.cards

    def context(variant: str) -> int:
        of = config.models[parts_of(variant)[0]]
        engine, card = config.engine.changed(of.engine), cards[variant]
        return engine.context(card.max_model_len, card.kv_bytes_per_token)

    variants = snapshot.router.variants_of(model)
    writing = [one for one in variants if cards[one].target != ONNX]
    return min(map(context, writing or variants), default=None)


def _page(entries: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """A page of a list in Anthropic's form, by ``limit``, ``after_id`` and ``before_id``."""
    asked = request.query_params
    ids = [entry["id"] for entry in entries]
    limit = _limit(asked.get("limit", ""))
    if (before := asked.get("before_id")) in ids:
        end = ids.index(before)
        start = max(0, end - limit)
        more = start > 0
    else:
        after = asked.get("after_id")
        start = ids.index(after) + 1 if after in ids else 0
        end = start + limit
        more = end < len(ids)
    shown = entries[start:end]
    return {
        "data": shown,
        "has_more": more,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def _limit(given: str) -> int:
    if not (given.isascii() and given.isdigit() and len(given) < 5):
        return _PAGE
    return min(int(given), _LONGEST_PAGE) or _PAGE
