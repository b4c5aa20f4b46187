"""The process that reads content: whatever becomes of it, and whatever a client makes it read, requests go on
as they went."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gateway_stack import Stack, eventually, make_config, running_gateway
from prometheus_client import CollectorRegistry

import gateway
from gateway.identity import hash_of
from gateway.quality import observe, process
from gateway.quality.answer import Answer
from gateway.quality.examine import Tools, look
from gateway.quality.grounded import Grounded
from gateway.quality.inquiry import Inquiry
from gateway.quality.observe import Observed, Observer
from gateway.quality.process import CheckProcess, LostError
from gateway.quality.records import AnswerRecord, CheckOutcome, Look, encode
from gateway.quality.sampling import is_in
from gateway.quality.schemas import (
    DEADLY_KEPT,
    DEADLY_OF_A_TENANT,
    LONGEST,
    Deadly,
    Mark,
    Schemas,
)
from gateway.telemetry.metrics import Metrics
from gateway.upstream.litellm import LiteLLM

ROLE = {"x-agent-role": "intent_classifier"}
ASKED = {"role": "intent_classifier", "model": "assistant", "variant": "int4-kv8"}
SLOW_S = 30.0
"""For what takes no time on a machine that has nothing else to do."""


def bomb(levels: int = 60) -> dict[str, Any]:
    """A small schema that takes 2 ** ``levels`` steps, whatever it is that is checked."""
    steps: dict[str, Any] = {"s0": {"type": "object"}}
    for level in range(1, levels + 1):
        steps[f"s{level}"] = {"allOf": [{"$ref": f"#/$defs/s{level - 1}"}] * 2}
    return {"$defs": steps, "$ref": f"#/$defs/s{levels}"}


def by_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def record(text: str = "It is done.", **asked: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "Is it done?"}], **asked}
    whole = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return encode(AnswerRecord(json.dumps(body).encode(), [json.dumps(whole).encode()]))


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[CheckProcess, Metrics]]:
    metrics = Metrics(CollectorRegistry(), ())
    checks = CheckProcess("checks", metrics)
    task = asyncio.create_task(checks.run())
    try:
        yield checks, metrics
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def ready(checks: CheckProcess) -> int:
    """The id of a process that has started."""
    checks.want()
    async with asyncio.timeout(SLOW_S):
        await checks.ready()
    assert checks.pid is not None
    return checks.pid


async def ask(stack: Stack, times: int = 1, **body: Any) -> None:
    for _ in range(times):
        async with stack.post(body, headers=ROLE) as response:
            assert response.status == 200, await response.text()
            await response.read()


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def outcome(stack: Stack, check: str, outcome: str) -> float:
    return stack.sample("tiercel_quality_checks_total", **ASKED, check=check, outcome=outcome)


# what becomes of the process


async def test_a_process_that_is_killed_is_replaced() -> None:
    async with running_gateway() as stack:
        await ask(stack)
        await eventually(lambda: outcome(stack, "empty", "passed") == 1, within_s=SLOW_S)
        first = await ready(stack.gateway.checks)
        os.kill(first, signal.SIGKILL)
        await ask(stack, 3)
        await eventually(lambda: stack.gateway.checks.pid not in (None, first), within_s=SLOW_S)
        await ask(stack)
        await eventually(stack.settled, within_s=SLOW_S)
        # What waited has been looked at; what it was busy with when it was killed, if anything, is an error.
        assert outcome(stack, "empty", "passed") + outcome(stack, "rules", "error") == 5
        assert stack.sample("tiercel_quality_errors_total", part="checks") == 1


async def test_an_answer_that_hangs_it_delays_no_request_and_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "STEP_S", 3600.0)
    async with running_gateway() as stack:
        checks = stack.gateway.checks
        stack.engines["int4-kv8"].script.text = "{}"
        pid = await ready(checks)
        await ask(stack, **by_schema(bomb()))
        await eventually(lambda: checks._current is not None)
        hung = checks._current
        await ask(stack, 100)
        assert checks._current is hung, "all of these were answered while it hung"
        os.kill(pid, signal.SIGKILL)
        await eventually(stack.settled, within_s=SLOW_S)
        assert outcome(stack, "rules", "error") == 1
        assert outcome(stack, "empty", "passed") == 100


async def test_a_step_has_a_bound() -> None:
    async with running() as (checks, metrics):
        first = await ready(checks)
        with pytest.raises(LostError):
            await checks.step(Look(), record("{}", **by_schema(bomb())), limit_s=0.2)
        step = await checks.step(Look(), record(), limit_s=SLOW_S)
        assert step.findings is not None
        assert checks.pid != first
        assert metrics.registry.get_sample_value("tiercel_quality_errors_total", {"part": "checks"}) == 1


async def test_a_schema_over_which_a_process_was_lost_is_not_looked_at_again() -> None:
    async with running() as (checks, metrics):
        await ready(checks)
        with pytest.raises(LostError):
            await checks.step(Look(), record("{}", **by_schema(bomb())), limit_s=0.5)
        pid = await ready(checks)
        again = await checks.step(Look(), record("{}", **by_schema(bomb())), limit_s=SLOW_S)
        assert again.findings is not None
        assert again.findings.outcomes["json"] is CheckOutcome.SKIPPED
        assert again.findings.outcomes["empty"] is CheckOutcome.PASSED
        other = await checks.step(Look(), record("{}", **by_schema({"type": "object"})), limit_s=SLOW_S)
        assert other.findings is not None
        assert other.findings.outcomes["json"] is CheckOutcome.PASSED
        assert checks.pid == pid
        assert metrics.registry.get_sample_value("tiercel_quality_errors_total", {"part": "checks"}) == 1


async def test_a_process_that_is_lost_over_something_else_blames_no_schema() -> None:
    async with running() as (checks, _):
        pid = await ready(checks)
        assert (await checks.step(Look(), record("{}", **by_schema({"type": "object"})))).findings is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(LostError):
            await checks.step(Look(), record("{}", **by_schema({"type": "object"})), limit_s=0.2)
        assert not checks.deadly.marks


def test_deadly_schemas_are_a_tenants_own_and_bounded() -> None:
    def mark(tenant: str, number: int) -> Mark:
        return Mark(tenant.encode(), b"%d" % number)

    deadly = Deadly(mark("a", number) for number in range(DEADLY_OF_A_TENANT - 1))
    assert mark("a", 0) in deadly
    assert mark("a", 1000) not in deadly
    assert mark("b", 0) not in deadly
    deadly.add(mark("a", 1))
    assert mark("a", 1000) not in deadly, "the same one twice is one"
    deadly.add(mark("a", 999))
    assert mark("a", 1000) in deadly, "whoever sends so many is not looked at any more"
    assert mark("b", 1000) not in deadly
    for number in range(2 * DEADLY_KEPT):
        deadly.add(mark(f"tenant {number}", 0))
    assert len(deadly.marks) == DEADLY_KEPT
    assert mark("a", 0) not in deadly


async def test_what_it_cannot_take_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MOST_WAITING", 8)
    async with running_gateway() as stack:
        pid = await ready(stack.gateway.checks)
        os.kill(pid, signal.SIGSTOP)
        try:
            await ask(stack, 20)
        finally:
            os.kill(pid, signal.SIGCONT)
        await eventually(stack.settled, within_s=SLOW_S)
        dropped = stack.sample("tiercel_quality_dropped_total", reason="full")
        assert dropped >= 11  # 8 waited, and one was with it
        assert outcome(stack, "empty", "passed") == 20 - dropped


async def test_an_answer_that_is_too_long_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "LONGEST", 1000)
    async with running_gateway() as stack:
        stack.engines["int4-kv8"].script.text = "so it is. " * 200
        await ask(stack)
        assert stack.sample("tiercel_quality_dropped_total", reason="too_long") == 1


async def test_signals_to_the_group_do_not_end_it_and_closing_does() -> None:
    async with running() as (checks, _):
        pid = await ready(checks)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert (await checks.step(Look(), record(), limit_s=SLOW_S)).findings is not None
        assert checks.pid == pid
        assert os.getpgid(pid) != os.getpgid(0)
        assert psutil.Process(pid).nice() > psutil.Process().nice()
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("busy", [False, True])
async def test_it_does_not_outlive_its_gateway(tmp_path: Path, busy: bool) -> None:
    """Not even where it hangs when the gateway is killed."""
    script = textwrap.dedent(f"""
        import asyncio, os, sys
        sys.path[:0] = [{str(Path(gateway.__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        from prometheus_client import CollectorRegistry
        from gateway.quality.process import CheckProcess
        from gateway.quality.records import Look
        from gateway.telemetry.metrics import Metrics
        from test_quality_process import bomb, by_schema, record

        async def main():
            checks = CheckProcess("checks", Metrics(CollectorRegistry(), ()))
            running = asyncio.create_task(checks.run())
            checks.want()
            await checks.ready()
            if {busy}:
                checks.submit(Look(), record("{{}}", **by_schema(bomb())), print, limit_s=1.0)
            print(checks.pid, flush=True)
            if {busy}:
                await asyncio.sleep(0.3)
                os.kill(os.getpid(), 9)
            await asyncio.sleep(3600)

        asyncio.run(main())
    """)
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = int(await parent.stdout.readline())
        if not busy:
            parent.kill()
        await parent.wait()
        await eventually(lambda: gone(child), within_s=SLOW_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        await parent.wait()


# what it is given to read


async def test_a_schema_elsewhere_is_not_fetched() -> None:
    connections = []

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/schema.json"
    async with server, running_gateway() as stack:
        stack.engines["int4-kv8"].script.text = "{}"
        for schema in ({"$ref": url}, {"$schema": url}, {"$id": url, "$ref": "other.json"}):
            await ask(stack, **by_schema(schema))
        await eventually(stack.settled, within_s=SLOW_S)
        assert outcome(stack, "json", "passed") == 3
    assert connections == []


@pytest.mark.parametrize(
    ("schema", "text", "allowed"),
    [
        ({"type": "string", "pattern": "^(a|a)*b$"}, json.dumps("a" * 50_000), False),
        ({"type": "string", "pattern": "^(a|a)*b$"}, json.dumps("a" * 50_000 + "b"), True),
        # What cannot be compiled says nothing about an answer.
        ({"pattern": "(?=a)a"}, '"b"', True),
        ({"pattern": "(a{1000}){1000}"}, '"b"', True),
        ({"$ref": "file:///etc/passwd"}, "1", True),
        ({"type": 5}, "1", True),
        ({"$ref": "#/nowhere"}, "1", True),
        ({"enum": ["x" * LONGEST]}, "1", True),
        (json.loads('{"not":' * 200 + "{}" + "}" * 200), "1", True),
        ("no schema", "1", True),
        ({"type": "string"}, r'"\ud800"', True),
        ({}, "[" * 100_000, False),
    ],
)
def test_a_schema_can_do_no_harm(schema: Any, text: str, allowed: bool) -> None:
    schemas = Schemas()
    assert schemas.allows(text, schema) is allowed
    assert schemas.allows(text, schema) is allowed


def test_few_compiled_schemas_are_kept() -> None:
    schemas = Schemas(kept=3)
    for number in range(10):
        assert schemas.allows(str(number), {"const": number})
    assert len(schemas._compiled) == 3


def test_a_check_that_raises_is_counted_and_the_others_go_on() -> None:
    class Broken:
        def check(self, answer: str, context: str) -> Grounded:
            raise RuntimeError(f"a defect that quotes {answer}")

    found = look(Look("rules"), record(), Tools(detectors={"rules": Broken()}))
    assert found.outcomes["grounded"] is CheckOutcome.ERROR
    assert found.outcomes["empty"] is CheckOutcome.PASSED
    (problem,) = found.problems
    assert "RuntimeError at test_quality_process.py" in problem
    assert "quotes" not in problem


# answers that a client waits for


def escalating(**more: Any) -> dict[str, Any]:
    return {"roles": {"intent_classifier": {"escalate": True}, "summarizer": {}, "core": {}}, **more}


async def test_an_answer_that_cannot_be_checked_in_time_is_sent_as_it_is() -> None:
    async with running_gateway(**escalating()) as stack:
        pid = await ready(stack.gateway.escalation)
        stack.engines["int4-kv8"].script.text = "no json"
        os.kill(pid, signal.SIGSTOP)
        async with stack.post({"response_format": {"type": "json_object"}}, headers=ROLE) as response:
            assert response.headers["x-tiercel-variant"] == "assistant:int4-kv8"
        assert stack.sample("tiercel_quality_dropped_total", reason="late") == 1
        # The process is replaced by one that answers.
        await eventually(lambda: stack.gateway.escalation.pid not in (None, pid), within_s=SLOW_S)
        await ready(stack.gateway.escalation)


async def test_an_answer_that_is_too_long_to_be_checked_is_sent_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "LONGEST_WAITED_FOR", 10)
    async with running_gateway(**escalating()) as stack:
        stack.engines["int4-kv8"].script.text = "no json"
        async with stack.post({"response_format": {"type": "json_object"}}, headers=ROLE) as response:
            assert response.headers["x-tiercel-variant"] == "assistant:int4-kv8"
        assert stack.sample("tiercel_quality_dropped_total", reason="too_long") >= 1


# samples, salts, and loops that go on


def test_samples_are_independent_of_each_other() -> None:
    """Those that are listened to, and of those the ones that the reference is asked about."""
    share = 1 << 30  # a quarter
    numbers = [f"0f3a77c1b2{number:022x}" for number in range(20_000)]
    heard = [number for number in numbers if zlib.crc32(number.encode()) < share]
    for what in ("shadow", "judge", "probation"):
        found = sum(is_in(number, what, share) for number in heard)
        assert found / len(heard) == pytest.approx(0.25, abs=0.03)
    both = sum(is_in(n, "shadow", share) and is_in(n, "judge", share) for n in numbers)
    assert both / len(numbers) == pytest.approx(1 / 16, abs=0.02)
    assert not any(is_in(number, "shadow", 0) for number in numbers)
    assert all(is_in(number, "shadow", 1 << 32) for number in numbers)


async def test_a_client_cannot_choose_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[Observed] = []
    monkeypatch.setattr(Observer, "offer", lambda _, seen: offered.append(seen))
    async with running_gateway() as stack:
        for _ in range(2):
            async with stack.post(headers={**ROLE, "x-request-id": "chosen"}) as response:
                await response.read()
    one, other = offered
    assert one.request_id == other.request_id == "chosen"
    assert one.sample_id != other.sample_id


async def test_what_the_watch_asks_carries_the_tenants_salt() -> None:
    keys = [{"name": "a", "sha256": hash_of("sk-a"), "tenant": "a"}]
    judge = {"model": "assistant:int8", "rate": 1.0}
    watch = {"rate": 1.0, "judge": judge}
    roles = {"core": {"grounded": True, "canary": {"variant": "int8", "percent": 100}}}
    async with running_gateway(keys=keys, watch=watch, roles=roles, default_role="core") as stack:
        headers = {"authorization": "Bearer sk-a"}
        async with stack.post(headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-tiercel-variant"] == "assistant:int8"
            await response.read()
        scored, judged = stack.engines["bf16"].requests, stack.engines["int8"].requests
        await eventually(lambda: len(scored) == 1 and len(judged) == 2, within_s=SLOW_S)
        user, asked = judged
        assert "prompt_logprobs" in scored[0]
        assert "response_format" in asked
        assert user["cache_salt"]
        assert scored[0]["cache_salt"] == asked["cache_salt"] == user["cache_salt"]


async def test_no_exception_ends_the_inquiries() -> None:
    metrics = Metrics(CollectorRegistry(), ())
    settings = make_config().watch
    inquiry = Inquiry(settings, "assistant", lambda: None, metrics)  # type: ignore[arg-type, return-value]
    done = asyncio.Event()

    async def broken() -> None:
        raise KeyError("a provider that a reload has removed")

    async def fine() -> None:
        done.set()

    task = asyncio.create_task(inquiry.run(None))  # type: ignore[arg-type]
    try:
        for _ in range(3 * settings.in_flight):
            inquiry.offer(broken)
        inquiry.offer(fine)
        async with asyncio.timeout(SLOW_S):
            await done.wait()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    errors = metrics.registry.get_sample_value("tiercel_quality_errors_total", {"part": "inquiry"})
    assert errors == 3 * settings.in_flight


async def test_a_judge_that_a_reload_removed_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: LiteLLM) -> None:
        """LiteLLM takes seconds to import, and is not asked here."""

    monkeypatch.setattr(LiteLLM, "load", nothing)
    watch = {"judge": {"model": "elsewhere", "rate": 1.0}}
    providers = [{"model": "elsewhere", "litellm_model": "openai/x", "api_base": "http://127.0.0.1:9"}]
    async with running_gateway(watch=watch, providers=providers) as stack:
        stack.gateway.providers.know(())
        async with stack.post(headers={"x-agent-role": "core"}) as response:
            assert response.status == 200
        await eventually(stack.settled, within_s=SLOW_S)
        labels = {"role": "core", "variant": "bf16", "check": "judge", "outcome": "error"}
        assert stack.sample("tiercel_quality_checks_total", **labels) == 1


async def test_an_offer_raises_nothing() -> None:
    config = make_config()
    metrics = Metrics(CollectorRegistry(), config.roles)
    checks = CheckProcess("checks", metrics)
    observer = Observer(config, metrics, checks, checks)
    observer.offer(Observed("a role that is gone", "assistant:bf16", "r", "/", b"{}", Answer()))
    labels = {
        "role": "a role that is gone",
        "model": "assistant",
        "variant": "bf16",
        "check": "listen",
        "outcome": "error",
    }
    assert metrics.registry.get_sample_value("tiercel_quality_checks_total", labels) == 1
