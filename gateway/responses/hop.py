"""The hop that makes a request to ``/v1/responses`` whole: what it goes on from, and what is to be kept.

The engine gets a request of its own kind: the whole conversation, nothing to look up and nothing to keep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from gateway.config import ApiKey
from gateway.errors import BadRequestError, ConversationTooLongError, PreviousResponseError
from gateway.identity import owner_of
from gateway.proxy.body import LARGE_BYTES
from gateway.proxy.reply import Reply
from gateway.responses import conversation
from gateway.responses.background import Background
from gateway.responses.conversation import Asked, Previous, flag
from gateway.responses.reader import ResponseObjects
from gateway.responses.service import Responses
from gateway.responses.store import Stored

if TYPE_CHECKING:
    from gateway.proxy.exchange import Exchange

PATH = "/v1/responses"
ABOUT = tuple(f"{PATH}/{name}" for name in ("input_tokens", "compact", "render"))
"""Paths that say something of a request which they do not answer: it may go on from a response as well."""


class ContinueResponse:
    """After the body has been read and its sender is known; before a route is chosen, since the engine that
    has a conversation in its cache is found by all of it."""

    def __init__(
        self, responses: Responses, background: Background, reply: Reply, models: frozenset[str]
    ) -> None:
        """``models``: those that exist. A request for another one is refused like any other, and not later
        in the background."""
        self._reply = reply
        self._models = models
        self._responses = responses
        self._background = background

    def __call__(self, exchange: Exchange) -> Awaitable[None] | None:
        path = exchange.endpoint.path
        if not path.startswith(PATH):
            return None
        body = exchange.body
        asked = conversation.read(body.only(conversation.ASKED))
        if asked is None:
            asked = Asked(**{name: body.get(name) for name in conversation.ASKED})
        self._refuse(asked)
        if path != PATH:
            goes_on = path in ABOUT and asked.previous_response_id is not None
            return self._continue(exchange, asked, keeps=False, background=False) if goes_on else None
        settings = self._responses.settings
        store = flag(asked.store, "store")
        background = bool(flag(asked.background, "background"))
        if background and exchange.model and exchange.model not in self._models:
            return None
        keeps = (settings.by_default if store is None else store) and settings.enabled
        if background:
            self._check_background(asked, store)
        elif asked.previous_response_id is None:
            if not keeps or asked.previous_input_messages is not None:
                return None
            if body.size <= LARGE_BYTES:
                self._begin(exchange, conversation.own_input(body.raw("input")), None, keeps=True)
                return None
        return self._continue(exchange, asked, keeps=keeps, background=background)

    async def _continue(self, exchange: Exchange, asked: Asked, *, keeps: bool, background: bool) -> None:
        # Megabytes take long to be copied; joining them leaves the interpreter to others.
        new = conversation.own_input(await asyncio.to_thread(b"".join, (exchange.body.view("input"),)))
        if (keeps or background) and len(new) > conversation.MOST_ITEMS:
            keeps = await self._may_keep(new, background=background)
        previous = None
        if asked.previous_response_id is not None:
            previous = await self._previous(owner_of(_key(exchange)), asked.previous_response_id, new)
            exchange.client.grow(exchange.body.size + len(previous.input))
        if background:
            await self._background.begin(
                exchange, self._stored(exchange, new, previous), previous, self._reply
            )
        else:
            self._begin(exchange, new, previous, keeps=keeps)

    async def _may_keep(self, new: bytes, *, background: bool) -> bool:
        """Whether it is few enough items. Raises BadRequestError where it must be."""
        many = await asyncio.to_thread(conversation.has_too_many_items, new)
        if many and background:
            raise BadRequestError(
                f"input: has more than {conversation.MOST_ITEMS:,} items, which are more than are kept; send "
                "fewer, or send it without background",
                param="input",
            )
        if many:
            self._responses.dropped("too_large")
        return not many

    async def _previous(self, owner: str, response_id: str, new: bytes) -> Previous:
        """Raises PreviousResponseError, ConversationTooLongError, and what ``Responses.chain`` raises."""
        settings = self._responses.settings

        def read(chain: list[Stored]) -> Previous:
            last = chain[-1]
            if last.running:
                raise PreviousResponseError(
                    f"Previous response with id '{response_id}' is still {last.status}; wait until it is "
                    "done."
                )
            if chain[0].depth != 1:
                raise PreviousResponseError(
                    f"Previous response with id '{response_id}' goes on from '{chain[0].previous}', which "
                    "was not found: it was deleted, or has expired."
                )
            if last.depth >= settings.max_turns:
                raise ConversationTooLongError(
                    f"previous_response_id: the conversation has {last.depth} responses, of which "
                    f"responses.max_turns allows {settings.max_turns}; begin another one"
                )
            # A response that took the place of another under the same id may be larger than that was.
            context = sum(stored.size for stored in chain)
            if context + len(new) > settings.max_conversation_bytes:
                raise ConversationTooLongError(
                    f"previous_response_id: the conversation has {context + len(new)} bytes, of which "
                    f"responses.max_conversation_bytes allows {settings.max_conversation_bytes}; begin "
                    "another one"
                )
            return Previous(last.id, last.depth, context, conversation.conversation(chain, new))

        found = None
        if conversation.is_id(response_id):
            found = await self._responses.chain(owner, response_id, read)
        if found is None:
            raise PreviousResponseError(
                f"Previous response with id '{response_id[:80]}' not found.",
                internal="previous_response_id: was not found",
            )
        return found

    def _begin(self, exchange: Exchange, new: bytes, previous: Previous | None, *, keeps: bool) -> None:
        """Give the engine its own request, and have the answer followed."""
        if keeps and not self._responses.usable:
            self._responses.dropped("store_down")
            keeps = False
        changes = {"store": b"false"}
        if previous is not None:
            changes |= {"input": previous.input, "previous_response_id": b"null"}
        body = exchange.body = exchange.body.changed(changes, exchange.endpoint.reads)
        body.fields.model = exchange.model
        shown = {
            "previous_response_id": msgspec.json.encode(previous and previous.id),
            "store": b"true" if keeps else b"false",
        }
        stored = self._stored(exchange, new, previous)
        keep = partial(self._keep, stored) if keeps else _forget
        exchange.follower = ResponseObjects(shown, keep)

    def _keep(self, stored: Stored, response_id: str, status: str, response: bytes) -> None:
        self._responses.keep(replace(stored, id=response_id, status=status, response=response))

    def _stored(self, exchange: Exchange, new: bytes, previous: Previous | None) -> Stored:
        """What will be kept, as far as it is known before there is an answer."""
        return Stored(
            owner=owner_of(_key(exchange)),
            id="",
            status="queued",
            input=new,
            response=b"",
            previous=previous.id if previous else None,
            depth=previous.depth + 1 if previous else 1,
        )

    def _refuse(self, asked: Asked) -> None:
        """What cannot be done at all."""
        previous = asked.previous_response_id
        if asked.conversation is not None:
            raise BadRequestError(
                "conversation: is not served here; send previous_response_id, or the whole conversation as "
                "`input`",
                param="conversation",
            )
        if previous is None:
            return
        if not isinstance(previous, str):
            raise BadRequestError("previous_response_id: is no string", param="previous_response_id")
        if not self._responses.settings.enabled:
            raise BadRequestError(
                "previous_response_id: nothing is kept here (responses.enabled is false); send the whole "
                "conversation as `input`",
                param="previous_response_id",
            )
        if asked.previous_input_messages is not None:
            raise BadRequestError(
                "previous_response_id: cannot be sent together with previous_input_messages; send one",
                param="previous_response_id",
            )

    def _check_background(self, asked: Asked, store: bool | None) -> None:
        settings = self._responses.settings
        why = None
        if not settings.enabled or settings.max_background == 0:
            setting = "enabled is false" if not settings.enabled else "max_background is 0"
            why = f"is not served here (responses.{setting})"
        elif store is False:
            why = "can only be used when `store` is true, since its answer is asked for later"
        elif flag(asked.stream, "stream"):
            why = "cannot be streamed here; leave `stream` out and ask GET /v1/responses/{id} for the answer"
        if why is not None:
            raise BadRequestError(f"background {why}", param="background")


def _key(exchange: Exchange) -> ApiKey | None:
    return exchange.caller.key if exchange.caller else None


def _forget(response_id: str, status: str, response: bytes) -> None:
    pass
