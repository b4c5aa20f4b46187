"""The demo team over real HTTP: what reaches the gateway, and what comes back as results."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS
from deploy.team.run import TicketResult, run_team
from deploy.team.tickets import CONTACT, DETAILS, Aside, Ticket
from deploy.team.workflow import AGENTS, MAX_TOKENS, ROLES
from gateway.config import load_config

CALLS = len(AGENTS) + 1
"""Of a ticket: one per agent, and core's of its tool."""


def ticket(number: int) -> Ticket:
    return Ticket(
        id=f"t{number}",
        message=f"where is my order {number}",
        intent="order_status",
        record=f"Order A{number}\ncustomer: Ana Diaz",
        question=f"who is the customer on A{number}",
        answer="The customer is Ana Diaz.",
        summary="Ana Diaz ordered.",
        facts=("Ana Diaz",),
        specialists={
            CONTACT: Aside(question="who is it", answer="The customer is Ana Diaz."),
            DETAILS: Aside(question="when does it arrive", answer="The record does not say."),
        },
    )


def answers(gateway: Any) -> list[Any]:
    """The requests that are no tool calls."""
    return [seen for seen in gateway.seen if "tools" not in seen.body]


async def test_each_agent_sends_exactly_the_prompt_it_was_trained_on(gateway: Any) -> None:
    await run_team([ticket(7)], gateway.url, "assistant")
    record = "Order A7\ncustomer: Ana Diaz"
    users = {
        INTENT_CLASSIFIER: "where is my order 7",
        CONTACT: f"{record}\n\nwho is it",
        DETAILS: f"{record}\n\nwhen does it arrive",
        SUMMARIZER: record,
        CORE: f"{record}\n\nwho is the customer on A7",
    }
    assert {seen.agent: seen.body["messages"] for seen in answers(gateway)} == {
        agent: [
            {"role": "system", "content": SYSTEM_PROMPTS[role]},
            {"role": "user", "content": users[agent]},
        ]
        for agent, role in AGENTS.items()
    }
    assert len(gateway.seen) == CALLS
    for seen in answers(gateway):
        assert seen.body["model"] == "assistant"
        assert seen.body["temperature"] == 0
        assert seen.body["max_completion_tokens"] == MAX_TOKENS[AGENTS[seen.agent]]
        assert seen.body["stream"] is True


async def test_core_fetches_the_record_by_its_tool_before_it_answers(gateway: Any) -> None:
    await run_team([ticket(7)], gateway.url, "assistant")
    (call,) = (seen for seen in gateway.seen if "tools" in seen.body)
    assert call.agent == CORE
    (tool,) = call.body["tools"]
    assert tool["function"]["parameters"]["properties"]["record_id"]["enum"] == ["A7"]
    assert call.body["tool_choice"] == {"type": "function", "function": {"name": "find_record"}}
    assert call.body["messages"][-1]["content"] == "who is the customer on A7"
    assert gateway.seen.index(call) == CALLS - 2
    assert gateway.seen[-1].texts("user") == ["Order A7\ncustomer: Ana Diaz\n\nwho is the customer on A7"]


async def test_a_call_for_a_record_that_is_not_there_is_not_answered_from_another(gateway: Any) -> None:
    gateway.arguments = {"record_id": "A8"}
    (result,) = await run_team([ticket(7)], gateway.url, "assistant")
    assert gateway.seen[-1].texts("user") == ["who is the customer on A7"]
    assert result.agents[CORE].calls == 2, "it does not ask for it again and again"


async def test_the_answer_is_filed_in_the_store(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filed: list[Any] = []
    from deploy.team import workflow

    def kept(record_id: str, answer: str, summary: str, tool_context: Any) -> dict[str, str]:
        done = workflow_file_answer(record_id, answer, summary, tool_context)
        filed.append(tool_context.state[workflow.FILED])
        return done

    workflow_file_answer = workflow.file_answer
    monkeypatch.setattr(workflow, "file_answer", kept)
    gateway.words = {CORE: ["The", " end."], SUMMARIZER: ["Short."]}
    await run_team([ticket(7)], gateway.url, "assistant")
    assert filed[-1] == {"A7": {"answer": "The end.", "summary": "Short."}}


def test_the_demos_file_has_a_role_for_each_agent() -> None:
    config = load_config(Path(__file__).parents[2] / "tiercel.yaml")
    assert set(ROLES) == set(config.roles)
    named = {agent: name for name, role in config.roles.items() for agent in (*role.agents, name)}
    assert {agent: named[agent] for agent in AGENTS} == AGENTS


async def test_the_gateway_learns_who_asks(gateway: Any) -> None:
    await run_team([ticket(1), ticket(2)], gateway.url, "assistant")
    assert sorted(seen.agent for seen in answers(gateway)) == sorted(2 * tuple(AGENTS))
    sessions: dict[str, set[str]] = {}
    for seen in gateway.seen:
        assert seen.headers["baggage"] == f"gen_ai.agent.name={seen.agent}"
        sessions.setdefault(seen.headers["x-session-id"], set()).add(seen.headers["x-invocation-id"])
    assert sorted(session.split("-")[0] for session in sessions) == ["t1", "t2"]
    assert all(len(invocations) == 1 for invocations in sessions.values())


async def test_the_classifier_is_first_the_specialists_are_side_by_side_and_core_is_last(
    gateway: Any,
) -> None:
    gateway.delay_s = 0.05
    await run_team([ticket(1)], gateway.url, "assistant", concurrency=1)
    order = [seen.agent for seen in gateway.seen]
    assert order[0] == INTENT_CLASSIFIER
    assert set(order[1:3]) == {CONTACT, DETAILS}
    assert order[3:] == [SUMMARIZER, CORE, CORE]
    assert gateway.most_under_way == 2


async def test_a_result_has_text_timing_tokens_and_the_variant_that_served(gateway: Any) -> None:
    gateway.words = {
        INTENT_CLASSIFIER: [" order", "_status"],
        SUMMARIZER: ["Ana"] * 5,
        CORE: ["The", " end."],
    }
    gateway.variant = {
        INTENT_CLASSIFIER: "assistant:int4-kv8",
        SUMMARIZER: "assistant:int8",
        CORE: "assistant:bf16",
    }
    gateway.delay_s = 0.02
    (result,) = await run_team([ticket(1)], gateway.url + "/v1/", "assistant")
    assert result.errors == ()
    assert {agent: result.agents[agent].text for agent in gateway.words} == {
        INTENT_CLASSIFIER: "order_status",
        SUMMARIZER: "AnaAnaAnaAnaAna",
        CORE: "The end.",
    }
    assert {agent: result.agents[agent].variant for agent in gateway.words} == gateway.variant
    assert result.agents[CORE].route_reason == "cheapest that passed for core"
    for agent, texts in gateway.words.items():
        one, words = result.agents[agent], len(texts)
        assert one.calls == (2 if agent == CORE else 1)
        assert one.completion_tokens == words + (3 if agent == CORE else 0), "the tool's call took three"
        assert one.ttft_s is not None
        assert one.latency_s is not None
        assert 0.02 <= one.ttft_s < 1
        assert one.latency_s - one.ttft_s >= 0.02 * (words - 1) * 0.5


async def test_first_use_of_the_libraries_is_not_counted_as_latency(gateway: Any) -> None:
    (result,) = await run_team([ticket(1)], gateway.url, "assistant")
    assert (result.agents[INTENT_CLASSIFIER].latency_s or 9) < 1
    assert len(gateway.seen) == CALLS


@pytest.mark.parametrize("failing", AGENTS)
async def test_an_error_costs_one_answer_only(gateway: Any, failing: str, capfd: Any) -> None:
    def fail(seen: Any) -> int | None:
        return 503 if seen.agent == failing and seen.headers["x-session-id"].startswith("t1-") else None

    gateway.fail = fail
    results = await run_team([ticket(1), ticket(2)], gateway.url, "assistant")
    assert results[0].errors == (f"t1: {failing}: HTTP 503: no replica can take it",)
    assert results[0].agents[failing].text == ""
    answered = [one for result in results for one in result.agents.values() if one.error is None]
    assert [one.text for one in answered] == (2 * len(AGENTS) - 1) * ["a word"]
    assert len(gateway.seen) == 2 * CALLS - (failing == CORE), "nothing is retried"
    assert capfd.readouterr() == ("", "")


async def test_a_stream_that_breaks_off_is_an_error(gateway: Any) -> None:
    gateway.break_stream = lambda seen: seen.agent == CORE
    (result,) = await run_team([ticket(1)], gateway.url, "assistant")
    assert result.errors == ("t1: core: the replica died",)
    assert result.agents[CORE].variant == "assistant:bf16"
    assert result.agents[SUMMARIZER].error is None


async def test_a_gateway_that_is_not_there_is_named(unused_tcp_port: int) -> None:
    (result,) = await run_team([ticket(1)], f"http://127.0.0.1:{unused_tcp_port}", "assistant")
    assert [one.variant for one in result.agents.values()] == [None] * len(AGENTS)
    for error in result.errors:
        assert f"no answer from http://127.0.0.1:{unused_tcp_port}/v1/chat/completions" in error


async def test_order_progress_and_concurrency(gateway: Any) -> None:
    tickets = [ticket(number) for number in range(4)]
    gateway.delay_s = 0.01
    done: list[TicketResult] = []
    results = await run_team(tickets, gateway.url, "assistant", concurrency=2, progress=done.append)
    assert [result.ticket for result in results] == tickets
    assert sorted(done, key=lambda result: result.ticket.id) == results
    assert gateway.most_under_way <= 4, "two tickets at a time, each with two agents side by side"
    assert await run_team([], gateway.url, "assistant") == []
    with pytest.raises(ValueError, match="concurrency: must be at least 1, got 0"):
        await run_team(tickets, gateway.url, "assistant", concurrency=0)


async def test_being_cancelled_stops_the_run(gateway: Any) -> None:
    gateway.delay_s = 30
    run = asyncio.create_task(run_team([ticket(1)], gateway.url, "assistant"))
    await asyncio.wait_for(gateway.asked.wait(), timeout=25)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
