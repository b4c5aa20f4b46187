"""The demo team over real HTTP: what reaches the gateway, and what comes back as results."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS
from deploy.team.team import ROLES, Ticket, TicketResult, run_team


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
    )


async def test_each_agent_sends_exactly_the_prompt_it_was_trained_on(gateway: Any) -> None:
    await run_team([ticket(7)], gateway.url, "assistant")
    record = "Order A7\ncustomer: Ana Diaz"
    users = {
        INTENT_CLASSIFIER: "where is my order 7",
        SUMMARIZER: record,
        CORE: f"{record}\n\nwho is the customer on A7",
    }
    assert {seen.agent: seen.body["messages"] for seen in gateway.seen} == {
        role: [
            {"role": "system", "content": SYSTEM_PROMPTS[role]},
            {"role": "user", "content": users[role]},
        ]
        for role in ROLES
    }
    limits = {INTENT_CLASSIFIER: 8, SUMMARIZER: 64, CORE: 64}
    for seen in gateway.seen:
        assert seen.body["model"] == "assistant"
        assert seen.body["temperature"] == 0
        assert seen.body["max_completion_tokens"] == limits[seen.agent]
        assert seen.body["stream"] is True
        assert "tools" not in seen.body


async def test_the_gateway_learns_who_asks(gateway: Any) -> None:
    await run_team([ticket(1), ticket(2)], gateway.url, "assistant")
    assert sorted(seen.agent for seen in gateway.seen) == sorted(2 * ROLES)
    sessions: dict[str, set[str]] = {}
    for seen in gateway.seen:
        assert seen.headers["baggage"] == f"gen_ai.agent.name={seen.agent}"
        sessions.setdefault(seen.headers["x-session-id"], set()).add(seen.headers["x-invocation-id"])
    assert sorted(session.split("-")[0] for session in sessions) == ["t1", "t2"]
    assert all(len(invocations) == 1 for invocations in sessions.values())


async def test_the_classifier_is_first_and_the_others_run_side_by_side(gateway: Any) -> None:
    gateway.delay_s = 0.05
    await run_team([ticket(1)], gateway.url, "assistant", concurrency=1)
    assert gateway.seen[0].agent == INTENT_CLASSIFIER
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
    assert {role: one.text for role, one in result.roles.items()} == {
        INTENT_CLASSIFIER: "order_status",
        SUMMARIZER: "AnaAnaAnaAnaAna",
        CORE: "The end.",
    }
    assert {role: one.variant for role, one in result.roles.items()} == gateway.variant
    assert result.roles[CORE].route_reason == "cheapest that passed for core"
    for role, one in result.roles.items():
        words = len(gateway.words[role])
        assert one.completion_tokens == words
        assert one.ttft_s is not None
        assert one.latency_s is not None
        assert 0.02 <= one.ttft_s < 1
        assert one.latency_s - one.ttft_s >= 0.02 * (words - 1) * 0.5


async def test_first_use_of_the_libraries_is_not_counted_as_latency(gateway: Any) -> None:
    (result,) = await run_team([ticket(1)], gateway.url, "assistant")
    assert (result.roles[INTENT_CLASSIFIER].latency_s or 9) < 1
    assert len(gateway.seen) == 3


@pytest.mark.parametrize("failing", ROLES)
async def test_an_error_costs_one_answer_only(gateway: Any, failing: str, capfd: Any) -> None:
    def fail(seen: Any) -> int | None:
        return 503 if seen.agent == failing and seen.headers["x-session-id"].startswith("t1-") else None

    gateway.fail = fail
    results = await run_team([ticket(1), ticket(2)], gateway.url, "assistant")
    assert results[0].errors == (f"t1: {failing}: HTTP 503: no replica can take it",)
    assert results[0].roles[failing].text == ""
    answered = [one for result in results for one in result.roles.values() if one.error is None]
    assert [one.text for one in answered] == 5 * ["a word"]
    assert len(gateway.seen) == 6, "nothing is retried"
    assert capfd.readouterr() == ("", "")


async def test_a_stream_that_breaks_off_is_an_error(gateway: Any) -> None:
    gateway.break_stream = lambda seen: seen.agent == CORE
    (result,) = await run_team([ticket(1)], gateway.url, "assistant")
    assert result.errors == ("t1: core: the replica died",)
    assert result.roles[CORE].variant == "assistant:bf16"
    assert result.roles[SUMMARIZER].error is None


async def test_a_gateway_that_is_not_there_is_named(unused_tcp_port: int) -> None:
    (result,) = await run_team([ticket(1)], f"http://127.0.0.1:{unused_tcp_port}", "assistant")
    assert [one.variant for one in result.roles.values()] == [None, None, None]
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
