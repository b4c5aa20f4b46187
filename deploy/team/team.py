"""The demo team: three ADK agents that work through support tickets behind the gateway.

A ticket carries a customer's message, a business record and a question about it. The team is an ADK
workflow: ``intent_classifier`` reads the message; then ``summarizer`` (the record in one sentence)
and ``core`` (the answer to the question) run side by side::

    START ─ intent_classifier ─┬─ summarizer ─┬─ done
                               └─ core ───────┘

All three ask for the same model at the same address. Which variant answers is the gateway's choice,
made from the agent's name that :class:`tiercel_agents.adk.GatewayPlugin` puts on each call.

The shipped model is tiny and knows exactly the prompts of :mod:`deploy.assistant.prompts`. ADK would add the
agent's identity and the other agents' turns, so each agent's request is built from the session's
ticket instead, in :func:`_ask_as_trained`.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.apps import App
from google.adk.models.lite_llm import LiteLlm
from google.adk.models.llm_response import LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.adk.workflow import START, JoinNode, Workflow
from google.genai import types

from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS, with_record
from deploy.team.tickets import Ticket, TicketError, read_tickets
from tiercel_agents.adk import GatewayPlugin
from tiercel_agents.adk.client import GatewayCall, GatewayClient, describe, keep_quiet

__all__ = [
    "ROLES",
    "RoleResult",
    "Ticket",
    "TicketError",
    "TicketResult",
    "build_team",
    "read_tickets",
    "run_team",
    "user_text",
]

ROLES = (INTENT_CLASSIFIER, SUMMARIZER, CORE)
MAX_TOKENS = {INTENT_CLASSIFIER: 8, SUMMARIZER: 64, CORE: 64}

_APP = "support_team"
_USER = "demo"
_TICKET = "ticket"
"""The key of the ticket in a session's state."""


@dataclass(frozen=True)
class RoleResult:
    """What one agent answered to a ticket, and what the call took, measured at the client."""

    role: str
    text: str
    latency_s: float | None = None
    ttft_s: float | None = None
    completion_tokens: int | None = None
    variant: str | None = None
    route_reason: str | None = None
    error: str | None = None
    """Why there is no answer; None when there is one."""


@dataclass(frozen=True)
class TicketResult:
    """A ticket with the result of every role of :data:`ROLES`."""

    ticket: Ticket
    roles: dict[str, RoleResult]

    @property
    def errors(self) -> tuple[str, ...]:
        """One line per role that has no answer."""
        return tuple(f"{self.ticket.id}: {r.role}: {r.error}" for r in self.roles.values() if r.error)


def user_text(role: str, ticket: Ticket) -> str:
    """The user message that a role was trained on, for a ticket."""
    if role == INTENT_CLASSIFIER:
        return ticket.message
    if role == SUMMARIZER:
        return ticket.record
    return with_record(ticket.record, ticket.question)


def build_team(model: Any) -> Workflow:
    """The workflow of the three agents, all on ``model`` (a LiteLlm that reaches the gateway)."""
    intent_classifier, summarizer, core = (_agent(role, model) for role in ROLES)
    # ADK allows a workflow one last node with an output, so the branches have to join.
    done = JoinNode(name="done")
    return Workflow(name=_APP, edges=[(START, intent_classifier, (summarizer, core), done)])


def _agent(role: str, model: Any) -> LlmAgent:
    return LlmAgent(
        name=role,
        model=model,
        instruction=SYSTEM_PROMPTS[role],
        output_key=role,
        generate_content_config=types.GenerateContentConfig(
            temperature=0.0, max_output_tokens=MAX_TOKENS[role]
        ),
        before_model_callback=_ask_as_trained,
        on_model_error_callback=_go_on_without_answer,
    )


def _ask_as_trained(callback_context: Any, llm_request: Any) -> None:
    """Replace what ADK put together by the prompt that the model was trained on."""
    role = callback_context.agent_name
    ticket = Ticket.model_validate(callback_context.state[_TICKET])
    part = types.Part(text=user_text(role, ticket))
    llm_request.config.system_instruction = SYSTEM_PROMPTS[role]
    llm_request.contents = [types.Content(role="user", parts=[part])]


def _go_on_without_answer(callback_context: Any, llm_request: Any, error: Exception) -> LlmResponse:
    """Let the other agents of the ticket go on; GatewayClient has already reported the error."""
    return LlmResponse(error_code="MODEL_ERROR", error_message=describe(error))


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
    its role's ``error`` and costs nothing but that answer; nothing is retried here, because the
    gateway retries what is safe to retry.
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


class _Crew:
    """The team in an ADK runner, and the calls that it has made so far."""

    def __init__(self, base: str, model: str, api_key: str, client: openai.AsyncOpenAI) -> None:
        self._calls: dict[tuple[str, str], GatewayCall] = {}
        self._sessions = InMemorySessionService()
        litellm = LiteLlm(
            model=f"openai/{model}",
            api_base=base,
            api_key=api_key,
            client=client,
            max_retries=0,  # or LiteLLM sets the client back to two
            llm_client=GatewayClient(self._note),
        )
        app = App(name=_APP, root_agent=build_team(litellm), plugins=[GatewayPlugin()])
        self.runner = Runner(app=app, session_service=self._sessions)

    def _note(self, call: GatewayCall) -> None:
        self._calls[call.session_id, call.agent] = call

    async def run(self, ticket: Ticket) -> TicketResult:
        """One ticket in a session of its own; never raises for what went wrong with the ticket."""
        session_id = f"{ticket.id}-{uuid.uuid4().hex[:8]}"
        where = {"app_name": _APP, "user_id": _USER, "session_id": session_id}
        state: dict[str, Any] = {}
        failure = "the agent did not run"
        await self._sessions.create_session(**where, state={_TICKET: ticket.model_dump(mode="json")})
        try:
            events = self.runner.run_async(
                user_id=_USER,
                session_id=session_id,
                new_message=types.Content(role="user", parts=[types.Part(text=ticket.message)]),
                run_config=RunConfig(streaming_mode=StreamingMode.SSE),
            )
            async for _ in events:
                pass
            state = (await self._sessions.get_session(**where)).state
        except Exception as error:
            failure = describe(error)
        finally:
            await self._sessions.delete_session(**where)
        return TicketResult(
            ticket,
            {
                role: _role_result(role, state.get(role), self._calls.pop((session_id, role), None), failure)
                for role in ROLES
            },
        )


@asynccontextmanager
async def _crew(base: str, model: str, api_key: str, http: httpx.AsyncClient) -> AsyncIterator[_Crew]:
    """A crew whose connections go through ``http``; closes them."""
    async with openai.AsyncOpenAI(base_url=base, api_key=api_key, http_client=http) as client:
        crew = _Crew(base, model, api_key, client)
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
    texts = dict.fromkeys(("message", "intent", "record", "question", "answer", "summary"), "ready")
    async with _crew(base, model, "unused", httpx.AsyncClient(transport=canned)) as crew:
        await crew.run(Ticket(id="warm-up", facts=("ready",), **texts))


def _role_result(role: str, text: str | None, call: GatewayCall | None, failure: str) -> RoleResult:
    if call is None:
        return RoleResult(role, "", error=failure)
    return RoleResult(
        role,
        (text or "").strip(),
        latency_s=call.latency_s,
        ttft_s=call.ttft_s,
        completion_tokens=call.completion_tokens,
        variant=call.variant,
        route_reason=call.route_reason,
        error=call.error,
    )
