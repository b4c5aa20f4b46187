"""Answers of one request: from what the thread delivers to a whole reply or a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from deploy.engine_server import StreamOptions, error_reply
from deploy.llama.engine import Answering, Engine
from deploy.llama.replies import Choice, Replies, usage
from deploy.llama.sampling import Drawn
from quantize.export.llama import GrammarError, LlamaError

Event = tuple[int, Drawn | str | Exception]
"""Of which answer, and what the thread delivered."""


def deliver(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], index: int, what: Drawn | str | Exception
) -> None:
    """Called in the thread that decodes."""
    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(events.put_nowait, (index, what))


@dataclass
class Running:
    """Answers of one request, and what is delivered of them."""

    engine: Engine
    works: list[Answering]
    choices: list[Choice]
    events: asyncio.Queue[Event]

    def submit(self) -> None:
        try:
            for work in self.works:
                self.engine.submit(work)
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        for work in self.works:
            work.cancelled = True

    async def parts(self) -> AsyncGenerator[tuple[Choice, str, list[Drawn]], None]:
        """Text and tokens as they come. Raises what the thread met; whoever leaves cancels."""
        left = len(self.works)
        try:
            while left:
                index, what = await self.events.get()
                choice = self.choices[index]
                if isinstance(what, Exception):
                    raise what
                if choice.finish is not None:
                    continue
                if isinstance(what, str):
                    yield choice, choice.end(what), []
                    left -= 1
                    continue
                ends = self.engine.model.ends(what.token) and not self.works[index].how.ignore_eos
                text = choice.add(what, b"" if ends else self.engine.model.piece(what.token))
                if choice.finish is not None:
                    self.works[index].cancelled = True
                    left -= 1
                yield choice, text, [what]
        finally:
            self.cancel()


async def whole_reply(request: Request, running: Running, replies: Replies) -> Response:
    async def all_of_it() -> None:
        async for _ in running.parts():
            pass

    answering = asyncio.create_task(all_of_it())
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)
        await answering
    except GrammarError as error:
        return error_reply(400, f"response_format: {error}", "response_format")
    except LlamaError as error:
        return error_reply(500, str(error))
    finally:
        for one in (answering, leaving):
            one.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
    return JSONResponse(replies.whole(running.choices))


async def _left(request: Request) -> None:
    """Until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream_reply(
    running: Running, replies: Replies, chat: bool, options: StreamOptions | None
) -> AsyncIterator[str]:
    """Events as they come; an error ends them with one of its own."""
    wanted = options or StreamOptions()

    def event(found: dict[str, Any]) -> str:
        if wanted.include_usage and wanted.continuous_usage_stats and "usage" not in found:
            found["usage"] = usage(running.choices)
        return f"data: {json.dumps(found, ensure_ascii=False)}\n\n"

    try:
        if chat:
            yield event(replies.first(running.choices))
        async with contextlib.aclosing(running.parts()) as parts:
            async for choice, text, drawn in parts:
                if text or drawn or choice.finish:
                    yield event(replies.part(choice, text, drawn))
        if wanted.include_usage:
            yield event(replies.last(running.choices))
        yield "data: [DONE]\n\n"
    except Exception as error:
        said = {"message": f"{type(error).__name__}: {error}", "type": "server_error", "code": 500}
        yield f"data: {json.dumps({'error': said})}\n\n"
    finally:
        running.cancel()
