"""The watch in a running gateway: harm is noticed, acted upon, and undone; requests never notice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from gateway_stack import Stack, eventually, full, make_cards, make_config, running_gateway
from prometheus_client import CollectorRegistry

from gateway.config import ConfigError
from gateway.identity import hash_of
from gateway.quality import observe
from gateway.quality import watch as watches
from gateway.quality.cells import Cell, Track
from gateway.quality.folding import Action
from gateway.quality.store import Store
from gateway.quality.watch import Watch, store_url
from gateway.telemetry.metrics import Metrics


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client waits for a check as long as a busy machine takes for it."""
    monkeypatch.setattr(observe, "ESCALATION_S", 10.0)


ROLE = {"x-agent-role": "intent_classifier"}
EAGER = {"rate": 1.0, "probation_rate": 1.0, "probation_after_s": 3600.0}


@contextlib.asynccontextmanager
async def watching(**changes: Any) -> AsyncIterator[Stack]:
    watch = EAGER | changes.pop("watch", {})
    async with running_gateway(watch=watch, **changes) as stack:
        yield stack


async def ask(stack: Stack, times: int = 1, **body: Any) -> list[str]:
    """Variants that answered."""

    async def one() -> str:
        async with stack.post(body, headers=ROLE) as response:
            assert response.status == 200, await response.text()
            await response.read()
            return str(response.headers["x-tiercel-variant"])

    return list(await asyncio.gather(*(one() for _ in range(times))))


async def report(stack: Stack) -> dict[str, Any]:
    async with stack.http.get(stack.url + "/admin/watch") as response:
        assert response.status == 200, await response.text()
        return dict(await response.json())


async def cell(stack: Stack, variant: str = "int4-kv8") -> dict[str, Any]:
    cells = (await report(stack))["cells"]
    return dict(next(c for c in cells if (c["variant"], c["role"]) == (full(variant), "intent_classifier")))


async def kinds(stack: Stack) -> list[str]:
    return [event["kind"] for event in (await report(stack))["events"]]


async def order(stack: Stack, action: str, variant: str = "int4-kv8", **more: str) -> tuple[int, Any]:
    body = {"action": action, "variant": variant, "role": "intent_classifier", **more}
    async with stack.http.post(stack.url + "/admin/watch", json=body) as response:
        return response.status, await response.json()


def harm(stack: Stack) -> None:
    """The variant begins to say what the reference would not, over and over."""
    stack.engines["int4-kv8"].script.text = "zebra " * 12 + "zebra"
    stack.engines["bf16"].script.disputes = "z"


async def test_harm_is_noticed_and_routed_around() -> None:
    async with watching() as stack:
        assert set(await ask(stack, 5)) == {"assistant:int4-kv8"}
        await eventually(stack.settled)
        await eventually(lambda: healthy(stack))
        harm(stack)
        async with asyncio.timeout(120):
            while "assistant:int8" not in await ask(stack, 2):
                await asyncio.sleep(0.1)
        assert set(await ask(stack, 3)) == {"assistant:int8"}
        found = await cell(stack)
        assert (found["status"], found["serves"], found["verdict"]) == ("demoted", False, "demoted")
        assert "shadow" in found["why"]
        assert "demoted" in await kinds(stack)
        assert stack.sample("tiercel_variant_demoted", variant="int4-kv8", role="intent_classifier") == 1
        async with stack.http.post(stack.url + "/v1/route", json={"model": "intent_classifier"}) as response:
            route = await response.json()
        assert route["reason"] == "raised_demoted"
        (step,) = [step for step in route["considered"] if step["variant"] == "assistant:int4-kv8"]
        assert step["verdict"] == "demoted"
        # Who names it outright goes up too.
        async with stack.post({"model": "assistant:int4-kv8"}, headers=ROLE) as response:
            assert response.headers["x-tiercel-variant"] == "assistant:int8"
            assert response.headers["x-tiercel-route-reason"] == "raised_demoted"


async def healthy(stack: Stack) -> bool:
    return bool((await cell(stack))["verdict"] == "healthy")


async def test_one_check_alone_is_not_enough_evidence() -> None:
    async with watching() as stack:
        stack.engines["bf16"].script.disputes = "T"  # the reference disputes what is not wrong otherwise
        stack.engines["bf16"].script.text = stack.engines["int4-kv8"].script.text
        for _ in range(8):
            await ask(stack, 4)
            await eventually(stack.settled)
            await asyncio.sleep(0.1)
        await eventually(lambda: alarmed(stack))
        assert (await cell(stack))["verdict"] == "not enough evidence"
        assert set(await ask(stack, 3)) == {"assistant:int4-kv8"}
        # The reference was asked to answer itself, and said the same.
        checks = (await cell(stack))["checks"]
        assert checks["regenerated"]["answers"] > 0
        assert checks["regenerated"]["bad"] == 0


async def alarmed(stack: Stack) -> bool:
    return "alarm" in await kinds(stack)


async def test_a_person_demotes_pins_and_restores() -> None:
    async with watching() as stack:
        status, event = await order(stack, "demote", why="looks odd")
        assert (status, event["kind"], event["why"]) == (200, "demoted", "looks odd")
        assert await ask(stack) == ["assistant:int8"]
        assert (await order(stack, "pin_serving"))[0] == 200
        assert await ask(stack) == ["assistant:int4-kv8"]
        assert (await order(stack, "unpin"))[0] == 200
        assert await ask(stack) == ["assistant:int8"]
        assert (await order(stack, "restore"))[0] == 200
        assert await ask(stack) == ["assistant:int4-kv8"]
        assert await kinds(stack) == ["restored", "unpinned", "pinned", "demoted"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"action": "demote", "variant": "bf16", "role": "core"}, "no watched variant 'bf16'"),
        (
            {"action": "demote", "variant": "int9", "role": "core"},
            "variants: assistant:int4-kv8, assistant:int8",
        ),
        ({"action": "demote", "variant": "int8", "role": "cook"}, "roles: core, intent_classifier"),
        ({"action": "explode", "variant": "int8", "role": "core"}, "action"),
        ({"action": "demote", "role": "core"}, "variant"),
    ],
)
async def test_an_order_that_means_nothing_is_refused(body: dict[str, str], words: str) -> None:
    async with watching() as stack, stack.http.post(stack.url + "/admin/watch", json=body) as response:
        assert response.status == 400
        assert words in (await response.json())["error"]["message"]


async def test_probation_judges_copies_that_no_client_gets() -> None:
    async with watching(watch={"probation_after_s": 0.1}) as stack:
        harm(stack)
        await order(stack, "demote")
        await eventually(lambda: on_probation(stack))
        assert set(await ask(stack, 6)) == {"assistant:int8"}
        await eventually(lambda: failed(stack), within_s=120)
        stack.engines["int4-kv8"].script.text = "The total is $277."
        await eventually(lambda: restored(stack), within_s=300)
        assert (await cell(stack))["verdict"] in ("healthy", "no evidence")


async def on_probation(stack: Stack) -> bool:
    return bool((await cell(stack))["status"] == "probation")


async def restored(stack: Stack) -> bool:
    """By copies of requests, which are sent meanwhile."""
    await ask(stack, 4)
    return (await kinds(stack))[0] == "restored"


async def failed(stack: Stack) -> bool:
    return "failed_probation" in await kinds(stack)


async def test_two_gateways_obey_one_store_and_a_restart_forgets_nothing(tmp_path: Path) -> None:
    shared = {"store": f"sqlite:///{tmp_path / 'watch.db'}"}
    async with watching(watch=shared) as one:
        async with watching(watch=shared) as other:
            await order(one, "demote")
            await eventually(lambda: moved(other))
            harm(other)
        assert await ask(one) == ["assistant:int8"]
    async with watching(watch=shared) as again:
        await eventually(lambda: moved(again))


async def test_what_is_reported_is_what_routing_does(tmp_path: Path) -> None:
    """Another process may have written it, or this one's round, that routing has not been told of yet."""
    config = make_config(watch={"store": f"sqlite:///{tmp_path / 'watch.db'}"})
    avoided: list[Mapping[tuple[str, str], str]] = []
    one, other = (
        Watch(config, make_cards(), Metrics(CollectorRegistry(), config.roles), told)
        for told in (avoided.append, lambda _: None)
    )
    pair = full("int4-kv8"), "intent_classifier"
    orders: tuple[tuple[Action, bool], ...] = (("demote", False), ("restore", True))
    for action, serves in orders:
        await other.act(action, *pair, "odd")
        cells = (await one.report())["cells"]
        assert [c["serves"] for c in cells if (c["variant"], c["role"]) == pair] == [serves]
        assert (pair not in avoided[-1]) is serves


async def moved(stack: Stack) -> bool:
    return await ask(stack) == ["assistant:int8"]


async def test_a_reference_that_is_down_or_talks_nonsense_harms_nobody() -> None:
    async with watching() as stack:
        for trouble in ({"status": 500}, {"garbage": True}, {"status": 400}):
            for name, value in trouble.items():
                setattr(stack.engines["bf16"].script, name, value)
            assert set(await ask(stack, 3)) == {"assistant:int4-kv8"}
            await eventually(stack.settled)
            stack.engines["bf16"].script.status, stack.engines["bf16"].script.garbage = 200, False
        labels = {"role": "intent_classifier", "variant": "int4-kv8"}
        assert stack.sample("tiercel_shadow_compared_total", result="error", **labels) == 9
        assert (await cell(stack))["checks"].get("shadow") is None


async def test_an_engine_that_knows_no_priorities_is_asked_without() -> None:
    async with watching() as stack:
        stack.engines["bf16"].script.knows_priority = False
        await ask(stack, 3)
        labels = {"role": "intent_classifier", "variant": "int4-kv8", "result": "agreed"}
        await eventually(lambda: stack.sample("tiercel_shadow_compared_total", **labels) == 3)


async def test_engines_that_ask_for_a_key_are_given_it_by_the_watch_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "sk-engine")
    async with watching(gateway={"engine_key_env": "ENGINE_KEY"}) as stack:
        for engine in stack.engines.values():
            engine.script.key = "sk-engine"
        await ask(stack, 3)
        labels = {"role": "intent_classifier", "variant": "int4-kv8", "result": "agreed"}
        await eventually(lambda: stack.sample("tiercel_shadow_compared_total", **labels) == 3)


async def test_the_watch_gives_way_to_users() -> None:
    async with watching(watch={"busy_at": 1, "queue": 2}) as stack:
        reference = stack.engines["bf16"]
        reference.script.token_delay_s, reference.script.text = 0.1, "so " * 1000  # until its client leaves
        async with stack.post({"stream": True}, headers={"x-agent-role": "core"}):
            await eventually(lambda: reference.running == 1)
            await ask(stack, 5)
            labels = {"role": "intent_classifier", "variant": "int4-kv8", "result": "shed"}
            shed = partial(stack.sample, "tiercel_shadow_compared_total", **labels)
            await eventually(lambda: shed() == 5)
        assert all("prompt_logprobs" not in body for body in reference.requests)


async def test_without_log_probabilities_there_is_nothing_to_compare() -> None:
    async with watching(quality={"logprobs": False}) as stack:
        await ask(stack, 2)
        await eventually(stack.settled)
        assert (await cell(stack))["verdict"] == "no evidence"


async def test_a_store_that_fails_is_said_and_requests_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "watch.db").mkdir()
    async with watching(watch={"store": f"sqlite:///{tmp_path / 'watch.db'}"}) as stack:
        assert await ask(stack) == ["assistant:int4-kv8"]
        await eventually(lambda: "watch.store" in caplog.text)
        status, answer = await order(stack, "demote")
        assert (status, answer["error"]["code"]) == (503, "store_down")
        assert await ask(stack) == ["assistant:int4-kv8"]


async def test_events_are_posted() -> None:
    posted: list[Any] = []

    async def take(request: web.Request) -> web.Response:
        posted.append(await request.json())
        return web.Response(status=500 if len(posted) == 1 else 200)

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        async with watching(watch={"webhook": url}) as stack:
            await order(stack, "demote", why="for the hook")
            await eventually(lambda: len(posted) == 2)
    finally:
        await runner.cleanup()
    assert posted[0] == posted[1]
    assert (posted[1]["kind"], posted[1]["variant"], posted[1]["why"]) == (
        "demoted",
        "assistant:int4-kv8",
        "for the hook",
    )


async def test_only_an_admin_may_look_and_act() -> None:
    keys = [{"name": "plain", "sha256": hash_of("sk-plain")}]
    async with watching(keys=keys) as stack:
        for headers, status in (({}, 401), ({"authorization": "Bearer sk-plain"}, 403)):
            async with stack.http.get(stack.url + "/admin/watch", headers=headers) as response:
                assert response.status == status


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"watch": {"store": "no url"}}, "watch.store: is no database URL"),
        ({"watch": {"rate": 2}}, "less than or equal to 1"),
        (
            {"roles": {"core": {"rates": {"mood": [0.1, 0.2]}}}, "default_role": "core"},
            "'mood' is not a check; known: shadow",
        ),
        (
            {"roles": {"core": {"rates": {"shadow": [0.3, 0.2]}}}, "default_role": "core"},
            "two shares, the lower one first",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(**changes)


def test_the_store_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(watch={"store": None, "store_env": "THE_STORE"})
    with pytest.raises(ConfigError, match="the environment has no 'THE_STORE'"):
        store_url(config)
    monkeypatch.setenv("THE_STORE", "sqlite://")
    assert store_url(config) == "sqlite://"
    with pytest.raises(ValueError, match="both say where"):
        make_config(watch={"store": "sqlite://", "store_env": "THE_STORE"})


def test_the_store_is_sqlite_unless_another_is_given() -> None:
    assert Store("sqlite://", "one").decisions() == 0


JSON = {"response_format": {"type": "json_object"}}


def escalating(**role: Any) -> dict[str, Any]:
    return {"roles": {"intent_classifier": {"escalate": True, **role}, "summarizer": {}, "core": {}}}


async def test_an_answer_that_fails_a_check_is_asked_of_a_higher_precision() -> None:
    async with watching(**escalating()) as stack:
        stack.engines["int4-kv8"].script.text = "no json"
        stack.engines["int8"].script.text = '{"intent": "pay"}'
        async with stack.post(JSON, headers=ROLE) as response:
            answer = await response.json()
            assert response.headers["x-tiercel-variant"] == "assistant:int8"
            assert response.headers["x-tiercel-route-reason"] == "escalated"
        assert answer["choices"][0]["message"]["content"] == '{"intent": "pay"}'
        labels = {"role": "intent_classifier", "variant": "int4-kv8"}
        assert stack.sample("tiercel_escalations_total", check="json", **labels) == 1
        # Both answers are in the books, and the worse one is evidence.
        tokens = stack.sample("tiercel_tokens_total", kind="completion", **labels)
        assert tokens == 2
        await eventually(lambda: rules_seen(stack))


@pytest.mark.parametrize("fault", ["unreachable", "breaks", "garbage", "silent"])
async def test_where_nothing_better_comes_the_client_gets_the_answer_that_was_there(fault: str) -> None:
    times = {"answer_timeout_s": 1.0} if fault == "silent" else {}
    async with watching(gateway=times, **escalating()) as stack:
        stack.engines["int4-kv8"].script.text = "no json"
        higher = stack.gateway.plane.snapshot.pools.by_variant["assistant:int8"].replicas[0]
        if fault == "unreachable":
            higher.connections._port = 1
            higher.connections.discard_idle()
        elif fault == "garbage":
            stack.engines["int8"].script.garbage = True
        elif fault == "breaks":
            stack.engines["int8"].script.status = 500
        else:
            stack.engines["int8"].script.hold = asyncio.Event()
        async with stack.post(JSON, headers=ROLE) as response:
            answer = await response.json()
            assert (response.status, response.headers["x-tiercel-variant"]) == (200, "assistant:int4-kv8")
            assert response.headers["x-tiercel-route-reason"] != "escalated"
        assert answer["choices"][0]["message"]["content"] == "no json"
        labels = {"role": "intent_classifier", "variant": "int4-kv8"}
        assert len(stack.asked("int4-kv8")) == 1, "it is not asked again"
        assert stack.sample("tiercel_tokens_total", kind="completion", **labels) == 2, "booked once"
        await eventually(lambda: rules_seen(stack))


async def rules_seen(stack: Stack) -> bool:
    found = (await cell(stack))["checks"].get("rules")
    return found is not None and (found["answers"], found["bad"]) == (1, 1)


@pytest.mark.parametrize(
    ("body", "role", "texts"),
    [
        ({**JSON, "model": "assistant:int4-kv8"}, {}, ("no json", "{}")),  # the client has chosen
        ({**JSON, "stream": True}, {}, ("no json", "{}")),  # it has gone out already
        (JSON, {}, ('{"a": 1}', "{}")),  # it is good
        ({}, {"confidence": 0.5}, ("sure", "surer")),
    ],
)
async def test_what_is_not_asked_again(
    body: dict[str, Any], role: dict[str, Any], texts: tuple[str, str]
) -> None:
    async with watching(**escalating(**role)) as stack:
        stack.engines["int4-kv8"].script.text, stack.engines["int8"].script.text = texts
        assert await ask(stack, **body) == ["assistant:int4-kv8"]
        assert stack.asked("int8") == []


async def test_an_unsure_answer_is_asked_again() -> None:
    async with watching(**escalating(confidence=0.95)) as stack:  # a fake's tokens have 0.9
        assert await ask(stack) == ["assistant:int8"]


async def test_escalation_is_bounded_and_happens_once() -> None:
    async with watching(watch={"escalated_share": 0.1}, **escalating()) as stack:
        for engine in stack.engines.values():
            engine.script.text = "no json"
        variants = [(await ask(stack, **JSON))[0] for _ in range(40)]
        assert 2 <= variants.count("assistant:int8") <= 8
        assert "assistant:bf16" not in variants


LABELS = '{"1": "unsupported"}'
CORE = {"x-agent-role": "core"}
JUDGED = {
    "roles": {
        "intent_classifier": {},
        "summarizer": {},
        "core": {"grounded": True, "budget": {"min_weight_bits": 16}},
    },
    "watch": {"judge": {"model": "assistant:int8", "rate": 1.0}},
}


async def judged(stack: Stack, outcome: str) -> float:
    labels = {"role": "core", "variant": "bf16", "check": "judge", "outcome": outcome}
    return stack.sample("tiercel_quality_checks_total", **labels)


async def asked_once(stack: Stack) -> None:
    async with stack.post(headers=CORE) as response:
        assert response.status == 200


async def test_a_judge_labels_answers_and_its_errors_are_counted() -> None:
    async with watching(**JUDGED) as stack:
        stack.engines["int8"].script.text = LABELS
        await asked_once(stack)
        await eventually(lambda: judged(stack, "failed"))
        (body,) = stack.engines["int8"].requests
        assert body["response_format"]["type"] == "json_schema"
        assert body["priority"] == 1000
        for trouble in ({"text": "who knows"}, {"status": 500}, {"garbage": True}):
            before = await judged(stack, "error")
            for name, value in trouble.items():
                setattr(stack.engines["int8"].script, name, value)
            await asked_once(stack)
            await eventually(lambda before=before: more_errors(stack, before))


async def more_errors(stack: Stack, before: float) -> bool:
    return await judged(stack, "error") == before + 1


async def test_a_judges_own_errors_are_told_and_corrected() -> None:
    async with watching(**JUDGED) as stack:
        errors = {"model": "assistant:int8", "sensitivity": 0.8, "specificity": 0.9, "bad": 100, "good": 100}
        url = stack.url + "/admin/watch/judge"
        async with stack.http.post(url, json=errors) as response:
            assert response.status == 200
        assert (await report(stack))["judge"] == errors
        async with stack.http.post(url, json=errors | {"model": "another"}) as response:
            assert response.status == 400
            assert "the judge is 'assistant:int8'" in (await response.json())["error"]["message"]
        async with stack.http.post(url, json=errors | {"sensitivity": 2}) as response:
            assert response.status == 400


def test_a_judge_must_exist() -> None:
    with pytest.raises(ValueError, match=r"watch\.judge\.model: 'gpt-9' does not exist; known: assistant, "):
        make_config(watch={"judge": {"model": "gpt-9"}})


async def test_an_unusual_answer_is_asked_for_again() -> None:
    async with watching(watch={"rate": 0.0}) as stack:
        engine = stack.engines["int4-kv8"]
        await ask(stack)
        await eventually(lambda: signals_seen(stack))
        watch = stack.gateway.watch
        assert watch is not None
        key = watch.key("assistant:int4-kv8", "intent_classifier")
        assert key is not None
        taught = Cell(key=key, tracks={"signals": Track(usual=(0.5, 0.6))})  # a fake's answers are at 0.105
        await watch._in_thread(lambda: watch._open().change([taught], []))
        await eventually(lambda: watch.unusual(key, 0.105))
        await ask(stack)
        await eventually(lambda: len(engine.requests) == 5)
        assert [body["temperature"] for body in engine.requests[2:]] == [1.0] * 3
        labels = {"role": "intent_classifier", "variant": "int4-kv8", "check": "consistency"}
        await eventually(lambda: stack.sample("tiercel_quality_score_sum", **labels) == 1.0)


async def signals_seen(stack: Stack) -> bool:
    return "signals" in (await cell(stack))["checks"]


async def test_evaluations_are_events_of_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

    exporter, provider = InMemoryLogRecordExporter(), LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    monkeypatch.setattr("gateway.telemetry.evaluations.get_logger", provider.get_logger)
    async with watching() as stack:
        await ask(stack)
        await eventually(exporter.get_finished_logs)
    (found,) = exporter.get_finished_logs()
    assert found.log_record.event_name == "gen_ai.evaluation.result"
    attributes = dict(found.log_record.attributes or {})
    assert attributes["gen_ai.evaluation.name"] == "shadow"
    assert attributes["gen_ai.evaluation.score.label"] == "agreed"
    assert attributes["gen_ai.evaluation.score.value"] == 1.0
    assert attributes["gen_ai.agent.name"] == "intent_classifier"
    assert attributes["tiercel.variant"] == "assistant:int4-kv8"


async def test_a_round_is_made_soon_where_a_check_has_said_something_and_not_for_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watches, "ROUND_S", 0)
    monkeypatch.setattr(watches, "QUIET_S", 1e9)
    config = make_config()
    watch = Watch(config, make_cards(), Metrics(CollectorRegistry(), config.roles), lambda demoted: None)
    for soon in (False, True):
        rest = asyncio.create_task(watch._rest())
        watch.note_latency("assistant:int8", 0.1, 0.01)
        watch.note_engine("assistant:int8", 1e9, 0.5, 0.0)
        if soon:
            key = watch.key("assistant:int8", "summarizer")
            assert key is not None
            watch.note(key, "rules", bad=False)
            await rest
        else:
            for _ in range(100):
                await asyncio.sleep(0)
            assert not rest.done()
            rest.cancel()
    assert len(watch._waiting) == 11, "and nothing of it is lost"
