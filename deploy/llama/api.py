"""The routes: chat and plain completions here, the others in ``operations.py``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from deploy.engine_server import BadRequestError, add_handlers, asked_of
from deploy.llama.answering import Event, Running, deliver, stream_reply, whole_reply
from deploy.llama.engine import WAITING, Answering
from deploy.llama.operations import Operations
from deploy.llama.replies import Choice, Replies
from deploy.llama.requests import Asked, ChatAsked, CompletionAsked, TokenizeAsked
from deploy.llama.server import Server
from deploy.llama.text import Text

USUAL_TOKENS = 16
"""Of a plain completion that does not say how many, as at OpenAI's."""

MOST_TOLD = 1 << 20
"""Log-probabilities of one request: each takes about a kB until it is sent."""


def make_app(server: Server) -> FastAPI:
    """The application."""
    app = FastAPI(title="llama.cpp", docs_url=None, redoc_url=None)
    answers, operations = Answers(server), Operations(server)
    for method, path, work in (
        ("POST", "/v1/chat/completions", answers.chat),
        ("POST", "/v1/completions", answers.completions),
        ("POST", "/tokenize", answers.tokenize),
        ("GET", "/v1/models", operations.models),
        ("GET", "/health", operations.health),
        ("GET", "/version", operations.version),
        ("GET", "/metrics", operations.metrics),
        ("GET", "/tiercel/account", operations.account),
        ("GET", "/tiercel/score", operations.describe),
        ("POST", "/tiercel/score", operations.score),
        ("POST", "/tiercel/drain", operations.drain),
    ):
        app.add_api_route(path, work, methods=[method], response_model=None)
    add_handlers(app)
    return app


class Answers:
    """What is written by the model, and what it reads."""

    def __init__(self, server: Server) -> None:
        self._server, self._engine = server, server.engine

    async def chat(self, request: Request) -> Response:
        asked = await asked_of(request, ChatAsked)
        tokens = await asyncio.to_thread(
            self._server.tokens_of, asked.messages, asked.add_generation_prompt, asked.chat_template_kwargs
        )
        return await self._answer(request, asked, [tokens], asked.told, asked.longest)

    async def completions(self, request: Request) -> Response:
        asked = await asked_of(request, CompletionAsked)
        if not 0 < (count := len(asked.prompts) * (asked.n or 1)) <= WAITING:
            text = f"prompt: {count:,} answers; a request has one at least and {WAITING} at most"
            raise BadRequestError(text, "prompt")
        tokens_in = self._server.tokens_in
        prompts = [
            await asyncio.to_thread(tokens_in, one, "prompt", True) if isinstance(one, str) else one
            for one in asked.prompts
        ]
        longest = USUAL_TOKENS if asked.max_tokens is None else asked.max_tokens
        return await self._answer(request, asked, prompts, asked.logprobs, longest)

    async def _answer(
        self,
        request: Request,
        asked: Asked,
        prompts: Sequence[list[int]],
        told: int | None,
        longest: int | None,
    ) -> Response:
        server, loop = self._server, asyncio.get_running_loop()
        model = self._engine.model
        how = asked.sampling(told, model.vocabulary, server.defaults)
        grammar, events = asked.grammar(), asyncio.Queue[Event]()
        works: list[Answering] = []
        choices: list[Choice] = []
        rooms = [self._room(tokens, longest) for tokens in prompts]
        self._refuse_too_much_told(how.logprobs, sum(rooms) * (asked.n or 1), model.vocabulary)
        for tokens, room in zip(prompts, rooms, strict=True):
            for number in range(asked.n or 1):
                hear = partial(deliver, loop, events, len(choices))
                works.append(Answering(tokens, room, how.nth(number), hear, grammar, asked.cache_salt or ""))
                counted = len(tokens) if number == 0 else 0
                choices.append(Choice(len(choices), Text(asked.stops), counted))
        chat = isinstance(asked, ChatAsked)
        replies = Replies(model, asked.model or server.name, chat, told, bool(asked.return_token_ids))
        running = Running(self._engine, works, choices, events)
        running.submit()
        if not asked.stream:
            return await whole_reply(request, running, replies)
        stream = stream_reply(running, replies, chat, asked.stream_options)
        return StreamingResponse(stream, media_type="text/event-stream")

    def _refuse_too_much_told(self, told: int | None, places: int, vocabulary: int) -> None:
        """Raise BadRequestError where the log-probabilities of a whole request take too much memory."""
        each = vocabulary if told == -1 else min(told or 0, vocabulary)
        if each * places > MOST_TOLD:
            raise BadRequestError(
                f"logprobs: {each:,} likeliest tokens of each of {places:,}; no more than {MOST_TOLD:,} are "
                "told in all: ask for fewer, or for shorter answers (max_tokens)",
                "logprobs",
            )

    def _room(self, tokens: list[int], longest: int | None) -> int:
        """Tokens that may be written after a prompt. Raises BadRequestError where it is too long."""
        size, context = self._engine.model.vocabulary, self._server.context
        if wrong := next((token for token in tokens if not 0 <= token < size), None):
            text = f"prompt: token {wrong} is out of vocabulary, which has {size} tokens"
            raise BadRequestError(text, "prompt")
        if not tokens:
            raise BadRequestError("prompt: it is empty; give at least one token", "prompt")
        left = context - len(tokens)
        wanted = left if longest is None else longest
        if left < 1 or wanted > left:
            raise BadRequestError(
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{max(1, wanted)} output tokens and your prompt contains {len(tokens)} tokens.",
                "messages",
                "context_length_exceeded",
            )
        return max(1, wanted)

    async def tokenize(self, request: Request) -> Response:
        asked, server = await asked_of(request, TokenizeAsked), self._server
        if asked.messages is not None:
            tokens = await asyncio.to_thread(
                server.tokens_of, asked.messages, asked.add_generation_prompt, asked.chat_template_kwargs
            )
        elif asked.prompt is not None:
            special = asked.add_special_tokens is not False
            tokens = await asyncio.to_thread(server.tokens_in, asked.prompt, "prompt", special)
        else:
            raise BadRequestError("prompt: give a prompt, or messages", "prompt")
        found = {"count": len(tokens), "max_model_len": self._server.context, "tokens": tokens}
        return JSONResponse(found)
