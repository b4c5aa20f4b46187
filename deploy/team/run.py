"""The demo's team at work: tickets in, the results of every agent out."""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.apps import App
from google.adk.models.lite_llm import LiteLlm
from google.adk.runners import Runner
from google.adk.sessions.sqlite_session_service import SqliteSessionService
from google.genai import types

from deploy.team.tickets import CONTACT, DETAILS, Aside, Ticket
from deploy.team.workflow import AGENTS, APP, build_team, state_of
from tiercel_agents.adk import GatewayPlugin
from tiercel_agents.adk.client import GatewayCall, GatewayClient, describe, keep_quiet


@dataclass(frozen=True)
class AgentResult:
    """What one agent answered to a ticket, and what that took, measured at the client: seconds and tokens of
    all its calls, the rest of the last one."""

    agent: str
    text: str
    latency_s: float | None = None
    ttft_s: float | None = None
    completion_tokens: int | None = None
    variant: str | None = None
    route_reason: str | None = None
    error: str | None = None
    """Why there is no answer; None when there is one."""
    calls: int = 0

    @property
    def role(self) -> str:
        return AGENTS[self.agent]


@dataclass(frozen=True)
class TicketResult:
    """A ticket with the result of every agent of the team."""

    ticket: Ticket
    agents: dict[str, AgentResult]

    def of(self, role: str) -> list[AgentResult]:
        """The results of the agents of a role."""
        return [one for one in self.agents.values() if one.role == role]

    @property
    def errors(self) -> tuple[str, ...]:
        """One line per agent that has no answer."""
        return tuple(f"{self.ticket.id}: {r.agent}: {r.error}" for r in self.agents.values() if r.error)


async def run_team(
    tickets: Sequence[Ticket],
    gateway_url: str,
    model: str,
    *,
    concurrency: int = 8,
    progress: Callable[[TicketResult], None] | None = None,
    api_key: str = "unused",
    timeout_s: float = 120.0,
) -> list[TicketResult]:
    """Work through ``tickets``, at most ``concurrency`` at a time; results in the tickets' order.

    ``gateway_url`` is the gateway's root, such as ``http://127.0.0.1:8080``; ``model`` one of its
    model ids. ``progress`` is called with each ticket's result as it is done. A call that fails is
    its agent's ``error`` and costs nothing but that answer; nothing is retried here, because the
    gateway retries what is safe to retry. The session store is a file of its own, removed afterwards.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: must be at least 1, got {concurrency}")
    keep_quiet()
    base = gateway_url.rstrip("/").removesuffix("/v1") + "/v1"
    await _warm_up(base, model)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=2 * concurrency)
    # A client of our own: closed when we are done, and deaf to the environment's proxies.
    http = httpx.AsyncClient(trust_env=False, limits=limits, timeout=timeout_s)
    turn = asyncio.Semaphore(concurrency)

    async def work(crew: _Crew, ticket: Ticket) -> TicketResult:
        async with turn:
            result = await crew.run(ticket)
        if progress is not None:
            progress(result)
        return result

    async with _crew(base, model, api_key, http) as crew, asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(crew, ticket)) for ticket in tickets]
    return [task.result() for task in tasks]


class _NamedTool(GatewayClient):
    """ADK says that a tool has to be called and not which one; where there is one, it is meant, and an engine
    that is told so writes nothing but its arguments."""

    async def acompletion(self, model: Any, messages: Any, tools: Any, **kwargs: Any) -> Any:
        if kwargs.get("tool_choice") == "required" and len(tools or ()) == 1:
            name = tools[0]["function"]["name"]
            kwargs["tool_choice"] = {"type": "function", "function": {"name": name}}
        return await super().acompletion(model, messages, tools, **kwargs)


class _Crew:
    """The team in an ADK runner, and the calls that it has made so far."""

    def __init__(self, base: str, model: str, api_key: str, client: openai.AsyncOpenAI, store: Path) -> None:
        self._calls: dict[tuple[str, str], list[GatewayCall]] = {}
        self._sessions = SqliteSessionService(str(store))
        litellm = LiteLlm(
            model=f"openai/{model}",
            api_base=base,
            api_key=api_key,
            client=client,
            max_retries=0,  # or LiteLLM sets the client back to two
            llm_client=_NamedTool(self._note),
        )
        app = App(name=APP, root_agent=build_team(litellm), plugins=[GatewayPlugin()])
        self.runner = Runner(app=app, session_service=self._sessions)

    def _note(self, call: GatewayCall) -> None:
        self._calls.setdefault((call.session_id, call.agent), []).append(call)

    async def run(self, ticket: Ticket) -> TicketResult:
        """One ticket in a session of its own; never raises for what went wrong with the ticket."""
        session_id = f"{ticket.id}-{uuid.uuid4().hex[:8]}"
        where = {"app_name": APP, "user_id": ticket.id, "session_id": session_id}
        state: dict[str, Any] = {}
        failure = "the agent did not run"
        await self._sessions.create_session(**where, state=state_of(ticket))
        try:
            events = self.runner.run_async(
                user_id=ticket.id,
                session_id=session_id,
                new_message=types.Content(role="user", parts=[types.Part(text=ticket.message)]),
                run_config=RunConfig(streaming_mode=StreamingMode.SSE),
            )
            async for _ in events:
                pass
            session = await self._sessions.get_session(**where)
            state = dict(session.state) if session is not None else {}
        except Exception as error:
            failure = describe(error)
        finally:
            await self._sessions.delete_session(**where)
        return TicketResult(
            ticket,
            {
                agent: _result(agent, state.get(agent), self._calls.pop((session_id, agent), []), failure)
                for agent in AGENTS
            },
        )


@asynccontextmanager
async def _crew(base: str, model: str, api_key: str, http: httpx.AsyncClient) -> AsyncIterator[_Crew]:
    """A crew whose connections go through ``http``; closes them."""
    with tempfile.TemporaryDirectory(prefix="tiercel-team-") as place:
        async with openai.AsyncOpenAI(base_url=base, api_key=api_key, http_client=http) as client:
            crew = _Crew(base, model, api_key, client, Path(place) / "sessions.db")
            try:
                yield crew
            finally:
                await crew.runner.close()


async def _warm_up(base: str, model: str) -> None:
    """Run a ticket against a canned answer, within this process.

    LiteLLM and ADK import parts of themselves on first use, which takes seconds and would count as
    the latency of the first tickets.
    """
    chunk = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": model}
    choice = {"index": 0, "delta": {"role": "assistant", "content": "ready"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    events = [{**chunk, "choices": [choice]}, {**chunk, "choices": [], "usage": usage}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    canned = httpx.MockTransport(
        lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)
    )
    texts = dict.fromkeys(("message", "intent", "question", "answer", "summary"), "ready")
    asides = {name: Aside(question="ready", answer="ready") for name in (CONTACT, DETAILS)}
    ticket = Ticket(id="warm-up", record="Order A1", facts=("ready",), specialists=asides, **texts)
    async with _crew(base, model, "unused", httpx.AsyncClient(transport=canned)) as crew:
        await crew.run(ticket)


def _result(agent: str, text: str | None, calls: Sequence[GatewayCall], failure: str) -> AgentResult:
    if not calls:
        return AgentResult(agent, "", error=failure)
    last = calls[-1]
    tokens = [call.completion_tokens for call in calls if call.completion_tokens is not None]
    return AgentResult(
        agent,
        (text or "").strip(),
        latency_s=sum(call.latency_s for call in calls),
        ttft_s=last.ttft_s,
        completion_tokens=sum(tokens) if tokens else None,
        variant=last.variant,
        route_reason=last.route_reason,
        error=next((call.error for call in calls if call.error), None),
        calls=len(calls),
    )
