"""The demo's team as an ADK workflow: who is in it, what each is asked, and the tools.

A ticket is a customer's message and a question about a record of theirs, which lies in the session store::

    START ─ intent_classifier ─┬─ contact_specialist ─┬─ join ─ summarizer ─ core ─ file_answer
                               └─ details_specialist ─┘

``intent_classifier`` names what the message is about. Two specialists look into the record at the same time,
for the person and for one detail; ``summarizer`` puts it into a sentence for whoever takes over; ``core``
fetches the record by its tool ``find_record`` and answers the customer; ``file_answer`` puts answer and
summary into the store.

All ask for the same model at the same address. Which variant answers is the gateway's choice, made from the
agent's name that :class:`tiercel_agents.adk.GatewayPlugin` puts on each call.

What the shipped model decides are the label, the sentences and the answers. It has 4 M parameters and knows
the prompts of :mod:`deploy.assistant.prompts` alone, so each request is made of these instead of what ADK
would put together (:func:`_ask_as_trained`). That ``core`` calls ``find_record`` is the tool choice, and
the schema of the argument lists the customer's records: where there is one, the call is the grammar's work.
``file_answer`` is called by the workflow.
"""

from __future__ import annotations

from typing import Any

from google.adk.agents import LlmAgent
from google.adk.agents.context import Context
from google.adk.models.llm_response import LlmResponse
from google.adk.tools import FunctionTool, ToolContext
from google.adk.workflow import START, JoinNode, Workflow
from google.genai import types

from deploy.assistant.prompts import (
    CORE,
    INTENT_CLASSIFIER,
    SPECIALIST,
    SUMMARIZER,
    SYSTEM_PROMPTS,
    with_record,
)
from deploy.team.tickets import CONTACT, DETAILS, Ticket
from tiercel_agents.adk.client import describe

APP = "support_team"
AGENTS = {
    INTENT_CLASSIFIER: INTENT_CLASSIFIER,
    CONTACT: SPECIALIST,
    DETAILS: SPECIALIST,
    SUMMARIZER: SUMMARIZER,
    CORE: CORE,
}
"""Agent to the role that it is served in, in the order of their work."""
ROLES = tuple(dict.fromkeys(AGENTS.values()))
MAX_TOKENS = {INTENT_CLASSIFIER: 8, SPECIALIST: 48, SUMMARIZER: 64, CORE: 64}

RECORD_ID = "record_id"
"""The key of the record's number in a session's state; ``ASKED`` that of what each agent is asked."""
ASKED = "asked"
RECORDS = "user:records"
"""The customer's records in the store, by their number; of all their sessions."""
FILED = "user:filed"
"""What was answered about them."""
FIND, FILE = "find_record", "file_answer"


def state_of(ticket: Ticket) -> dict[str, Any]:
    """What a session begins with. The answers that are right are no part of it."""
    questions = {agent: aside.question for agent, aside in ticket.specialists.items()}
    return {
        RECORDS: {ticket.record_id: ticket.record},
        RECORD_ID: ticket.record_id,
        ASKED: {INTENT_CLASSIFIER: ticket.message, SUMMARIZER: "", CORE: ticket.question, **questions},
    }


def user_text(agent: str, ticket: Ticket) -> str:
    """The user message that an agent's model was trained on, for a ticket."""
    return _user_text(agent, state_of(ticket)[ASKED][agent], ticket.record)


def _user_text(agent: str, asked: str, record: str) -> str:
    if agent == INTENT_CLASSIFIER:
        return asked
    return with_record(record, asked) if asked else record


def find_record(record_id: str, tool_context: ToolContext) -> dict[str, str]:
    """The customer's record with that number."""
    found = tool_context.state.get(RECORDS, {}).get(record_id)
    return {"record": found} if found is not None else {"error": f"there is no record {record_id}"}


def file_answer(record_id: str, answer: str, summary: str, tool_context: ToolContext) -> dict[str, str]:
    """Keep what was answered about a record, for whoever takes over."""
    filed = dict(tool_context.state.get(FILED, {}))
    tool_context.state[FILED] = {**filed, record_id: {"answer": answer, "summary": summary}}
    return {"filed": record_id}


def build_team(model: Any) -> Workflow:
    """The workflow, all agents on ``model`` (a LiteLlm that reaches the gateway)."""
    classifier, contact, details, summarizer, core = (_agent(name, model) for name in AGENTS)
    join = JoinNode(name="join")
    return Workflow(
        name=APP, edges=[(START, classifier, (contact, details), join, summarizer, core, _file_answer)]
    )


def _agent(name: str, model: Any) -> LlmAgent:
    tools = [FunctionTool(find_record), FunctionTool(file_answer)] if name == CORE else []
    return LlmAgent(
        name=name,
        model=model,
        instruction=SYSTEM_PROMPTS[AGENTS[name]],
        output_key=name,
        tools=tools,
        generate_content_config=types.GenerateContentConfig(
            temperature=0.0, max_output_tokens=MAX_TOKENS[AGENTS[name]]
        ),
        before_model_callback=_ask_as_trained,
        on_model_error_callback=_go_on_without_answer,
    )


def _file_answer(ctx: Context) -> dict[str, str]:
    """The workflow's last step: the second tool, with what is in the session's state."""
    answer, summary = (str(ctx.state.get(agent) or "").strip() for agent in (CORE, SUMMARIZER))
    return file_answer(ctx.state[RECORD_ID], answer, summary, ctx)


def _ask_as_trained(callback_context: Any, llm_request: Any) -> None:
    """Replace what ADK put together by the prompt that the model was trained on; have ``core`` call its first
    tool before it answers."""
    agent = callback_context.agent_name
    state = callback_context.state
    records, asked = state[RECORDS], state[ASKED][agent]
    record: str | None = records[state[RECORD_ID]]
    if agent == CORE:
        record = _found(llm_request.contents)
        _choose_tool(llm_request, sorted(records) if record is None else None)
    text = _user_text(agent, asked, record) if record else asked
    llm_request.config.system_instruction = SYSTEM_PROMPTS[AGENTS[agent]]
    llm_request.contents = [types.Content(role="user", parts=[types.Part(text=text)])]


def _found(contents: Any) -> str | None:
    """The record that the tool has given, empty where it has none; None where it has not been called."""
    for content in reversed(contents):
        for part in content.parts or ():
            if part.function_response is not None and part.function_response.name == FIND:
                return str((part.function_response.response or {}).get("record", ""))
    return None


def _choose_tool(llm_request: Any, records: list[str] | None) -> None:
    """Have ``find_record`` called for one of ``records``; None: no tool."""
    config = llm_request.config
    if records is None:
        config.tools, config.tool_config = None, None
        return
    wanted = types.FunctionDeclaration(
        name=FIND,
        description=find_record.__doc__,
        parameters_json_schema={
            "type": "object",
            "properties": {"record_id": {"type": "string", "enum": records}},
            "required": ["record_id"],
            "additionalProperties": False,
        },
    )
    config.tools = [types.Tool(function_declarations=[wanted])]
    mode = types.FunctionCallingConfigMode.ANY
    config.tool_config = types.ToolConfig(function_calling_config=types.FunctionCallingConfig(mode=mode))


def _go_on_without_answer(callback_context: Any, llm_request: Any, error: Exception) -> LlmResponse:
    """Let the other agents of the ticket go on; GatewayClient has already reported the error."""
    return LlmResponse(error_code="MODEL_ERROR", error_message=describe(error))
