"""LiteLLM, on an event loop of its own in a thread of its own.

It takes seconds to import, holds more than 100 MB, spends milliseconds on what an engine's chunk takes
microseconds for, and asks some providers things over connections that block (Ollama, for what a model can
do). None of that is the gateway's loop's to wait for. It is imported when there are providers, before the
gateway listens: Python's lock is held for tenths of a second at a time meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

_CLOSE_WITHIN_S = 2.0
T = TypeVar("T")


class Library:
    """The thread, its loop, and the imported module. One per gateway."""

    def __init__(self) -> None:
        self.module: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting: asyncio.Lock | None = None
        self._unwaited: set[Future[Any]] = set()

    async def start(self, models: Iterable[str]) -> None:
        """Import LiteLLM, if it has not been; ``models`` are its names of those that may be asked for."""
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name="litellm", daemon=True)
                self._thread.start()
            if self.module is None:
                self.module = await self.run(_imported())
            for model in models:
                _make_known(self.module, model)

    def _run(self) -> None:
        assert self._loop is not None
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` there and wait for it here. It is cancelled when the waiting is."""
        assert self._loop is not None
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def start_soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do ``work`` there without waiting for it."""
        if self._loop is None:  # closed meanwhile
            work.close()
            return
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._unwaited.add(future)
        future.add_done_callback(self._unwaited.discard)

    async def close(self) -> None:
        """End what runs there, and the thread. It may be started again."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_WITHIN_S):
                unwaited = [asyncio.wrap_future(future) for future in tuple(self._unwaited)]
                await asyncio.gather(*unwaited, return_exceptions=True)
                await self.run(_wound_up(self.module))
        except TimeoutError:
            return  # something blocks it; the thread is a daemon, and ends with the process
        finally:
            self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(thread.join, _CLOSE_WITHIN_S)
        if not thread.is_alive():
            loop.close()


async def _wound_up(litellm: Any) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if litellm is not None:
        await litellm.close_litellm_async_clients()
        litellm.in_memory_llm_clients_cache.flush_cache()
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    # LiteLLM makes some clients that it keeps nowhere; only the loop knows their connections.
    for transport in tuple(getattr(loop, "_transports", {}).values()):
        transport.abort()
    for _ in range(5):  # a transport is closed by what is called next, and a TLS one by what that calls
        await asyncio.sleep(0)


async def _imported() -> Any:
    return import_litellm()


def import_litellm() -> Any:
    """LiteLLM without its price list from the network, a ``.env``, its reports and its chatter."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")
    litellm: Any = importlib.import_module("litellm")
    # Else it breaks off a stream in which a hundred chunks are alike, such as a long row of dashes. Not by
    # its environment variable: that is read once, by whoever imports it first.
    litellm.REPEATED_STREAMING_CHUNK_LIMIT = 1 << 30
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _keep_no_accounts()
    return litellm


def _keep_no_accounts() -> None:
    """The gateway has books of its own. LiteLLM's would cost as much again as the request, and have it ask
    Ollama for prices over a blocking connection."""
    kind = importlib.import_module("litellm.litellm_core_utils.litellm_logging").Logging

    async def nothing(*_: Any, **__: Any) -> None: ...

    def nothing_now(*_: Any, **__: Any) -> None: ...

    for name in ("async_success_handler", "async_failure_handler", "dispatch_success_handlers"):
        setattr(kind, name, nothing)
    for name in ("success_handler", "failure_handler"):
        setattr(kind, name, nothing_now)


def _make_known(litellm: Any, model: str) -> None:
    """Of an Ollama model that LiteLLM does not know it asks the server, over a blocking connection."""
    provider, _, _ = model.partition("/")
    if provider in ("ollama", "ollama_chat") and model not in litellm.model_cost:
        known = {"litellm_provider": provider, "mode": "chat", "supports_function_calling": True}
        litellm.register_model({model: known})
