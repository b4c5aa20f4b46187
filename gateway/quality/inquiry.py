"""Asks engines on the watch's behalf: scores, second answers, copies, a judge. Never ahead of a user.

A bounded queue, a few requests at a time, of the lowest priority, none while the replica is busy; what does
not fit is given up, the oldest first, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp

from gateway.config import WatchSettings
from gateway.errors import UpstreamError
from gateway.routing.pools import Pools, Replica

_LOOK_AGAIN_S = 0.05
LATER = 3
_NO_PRIORITY = "priority"
"""What vLLM's refusal says when it was started without ``--scheduling-policy priority``."""


class UnansweredError(RuntimeError):
    """An engine did not give what was asked for."""


class ShedError(RuntimeError):
    """The replica is busy with users' requests, or there is none."""


Work = Callable[[], Awaitable[None]]


class Inquiry:
    """The queue, and the way to the engines. ``pools`` gives the present ones."""

    def __init__(self, settings: WatchSettings, model: str, pools: Callable[[], Pools]) -> None:
        self.settings = settings
        self.model = model
        self._pools = pools
        self._queue: deque[tuple[Work, Callable[[], None]]] = deque()
        self._later: deque[tuple[Work, Callable[[], None]]] = deque()
        self._taken = 0
        self._more = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._plain: set[str] = set()
        """Replicas that know no priorities."""
        self.under_way = 0

    def offer(self, work: Work, given_up: Callable[[], None] = lambda: None, *, later: bool = False) -> None:
        """Do it when there is time; ``later``: mostly after everything else. ``given_up`` is called
        instead when there is no time."""
        queue = self._later if later else self._queue
        if len(queue) >= self.settings.queue:
            queue.popleft()[1]()
        queue.append((work, given_up))
        self._more.set()

    @property
    def idle(self) -> bool:
        return not self._queue and not self._later and not self.under_way

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Work until cancelled."""
        self._session = session
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.in_flight):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            while not self._queue and not self._later:
                self._more.clear()
                await self._more.wait()
            work, given_up = self._next()
            self.under_way += 1
            try:
                await work()
            except ShedError:
                given_up()
                await asyncio.sleep(_LOOK_AGAIN_S)
            finally:
                self.under_way -= 1

    def _next(self) -> tuple[Work, Callable[[], None]]:
        """The first that came; of what may come later, one in ``LATER`` even when there is other work."""
        self._taken += 1
        late = self._later and (not self._queue or self._taken % LATER == 0)
        return (self._later if late else self._queue).popleft()

    def replica(self, variant: str) -> Replica:
        """The least busy one of a variant. Raises ShedError when users need them all."""
        pool = self._pools().by_variant.get(variant)
        free = [one for one in pool.usable() if one.in_flight < self.settings.busy_at] if pool else []
        if not free:
            raise ShedError(f"{variant} is busy or down")
        return min(free, key=lambda one: one.in_flight)

    async def ask(self, replica: Replica, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """An engine's answer to a POST, decoded. Raises UnansweredError."""
        whole = {**body, "model": self.model}
        if path != "/tokenize" and self.settings.priority and replica.url not in self._plain:
            whole["priority"] = self.settings.priority
        status, raw = await self._post(replica.url + path, whole)
        if status == 400 and "priority" in whole and _NO_PRIORITY in raw:
            self._plain.add(replica.url)
            del whole["priority"]
            status, raw = await self._post(replica.url + path, whole)
        if status != 200:
            raise UnansweredError(f"{replica.name}{path} answered {status}: {raw[:300]}")
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(raw), dict):
                return found
        raise UnansweredError(f"{replica.name}{path} answered what is no JSON object: {raw[:100]!r}")

    async def _post(self, url: str, body: Mapping[str, Any]) -> tuple[int, str]:
        if self._session is None:
            raise UnansweredError("nobody is there to ask")
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_s)
        try:
            async with self._session.post(url, json=body, timeout=timeout) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError) as error:
            raise UnansweredError(f"{url}: {type(error).__name__}: {error}") from None


Provider = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Gives a provider's model a chat completion's body, and its answer back. Raises UpstreamError."""


class Examiner:
    """What the watch asks about an answer."""

    def __init__(self, inquiry: Inquiry, reference: str, provider: Provider | None = None) -> None:
        self._inquiry = inquiry
        self._reference = reference
        self._provider = provider

    async def rows(self, request: Mapping[str, Any], text: str) -> list[Any]:
        """What the reference thinks of each token of ``text`` as an answer to ``request``; shape (tokens,).
        Raises UnansweredError or ShedError."""
        replica = self._inquiry.replica(self._reference)
        shared = {name: request[name] for name in ("tools", "chat_template_kwargs") if name in request}
        if "messages" in request:
            prompt = {"messages": request["messages"], "add_generation_prompt": True, **shared}
            path, whole = (
                "/v1/chat/completions",
                {
                    "messages": [*request["messages"], {"role": "assistant", "content": text}],
                    "add_generation_prompt": False,
                    "continue_final_message": True,
                    **shared,
                },
            )
            if "tools" in request:
                whole["tool_choice"] = "none"
        else:
            prompt = {"prompt": request["prompt"]}
            path, whole = "/v1/completions", {"prompt": request["prompt"] + text}
        start = int((await self._inquiry.ask(replica, "/tokenize", prompt))["count"])
        score = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        reply = await self._inquiry.ask(replica, path, {**whole, **score})
        rows = reply.get("prompt_logprobs")
        if rows is None and isinstance(choices := reply.get("choices"), list) and choices:
            rows = choices[0].get("prompt_logprobs")
        if not isinstance(rows, list):
            raise UnansweredError(f"{replica.name} gives no prompt_logprobs")
        return rows[start:]

    async def answer(self, variant: str, request: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """A variant's own answer to the same request, as its engine sends it. Raises UnansweredError or
        ShedError."""
        dropped = ("stream", "stream_options", "model", "n", "logprobs", "top_logprobs")
        body = {name: value for name, value in request.items() if name not in dropped}
        path = "/v1/chat/completions" if "messages" in request else "/v1/completions"
        return await self._inquiry.ask(self._inquiry.replica(variant), path, {**body, **more})

    async def judge(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        """The judge's answer: the model itself is its reference, ``model:variant`` a pool, else a provider.
        Raises UnansweredError or ShedError."""
        ours, _, variant = model.partition(":")
        if ours == self._inquiry.model:
            replica = self._inquiry.replica(variant or self._reference)
            return await self._inquiry.ask(replica, "/v1/chat/completions", body)
        if self._provider is None:
            raise UnansweredError(f"{model} is no model of ours, and there are no providers")
        try:
            return await self._provider(model, body)
        except UpstreamError as error:
            raise UnansweredError(f"the judge {model}: {error.internal or error.message}") from None

    async def message(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's own message. Raises UnansweredError or ShedError."""
        choices = (await self.answer(self._reference, request)).get("choices")
        found = choices[0].get("message") if isinstance(choices, list) and choices else None
        if not isinstance(found, dict):
            raise UnansweredError("the reference gave no message")
        return found
