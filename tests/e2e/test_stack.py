"""The whole path on real vLLM engines: variants, gates, routing, cancelling, metrics, the team."""

import asyncio
import json
import os
import signal
import time

import aiohttp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.assistant.prompts import SYSTEM_PROMPTS
from deploy.assistant.records import HELD_OUT_SEED, make_record
from deploy.team.run import run_team
from deploy.team.tickets import read_tickets
from quantize.card import Outcome, variant_directory, verify_files
from tests.e2e.conftest import CLINC150, ROOT, Stack, clinc150_items

pytestmark = pytest.mark.engine

REFERENCE, QUANTIZED = "assistant:bf16", {"assistant:int8", "assistant:int4-kv8"}


def ask(role: str, user: str, **more: object) -> dict[str, object]:
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[role]}, {"role": "user", "content": user}]
    return {"model": "assistant", "messages": messages, "temperature": 0, **more}


async def metric(http: aiohttp.ClientSession, url: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that carry these labels."""
    async with http.get(url + "/metrics") as response:
        text = await response.text()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def until_idle(http: aiohttp.ClientSession, engine: str) -> None:
    """Wait until the engine has no running or waiting request."""
    async with asyncio.timeout(300):
        while any([await metric(http, engine, f"vllm:num_requests_{s}") for s in ("running", "waiting")]):
            await asyncio.sleep(0.1)


def test_cards_say_what_each_variant_lost(stack: Stack) -> None:
    cards = stack.cards
    for name, card in cards.items():
        verify_files(card, variant_directory(stack.model.variants_dir, name))
        assert card.evaluation is not None
        assert set(card.gate) == set(stack.config.roles)
    kl = {name: card.evaluation.text.kl_mean for name, card in cards.items() if card.evaluation}
    assert kl["bf16"] == 0.0
    assert 0.0 < kl["int8"] < kl["int4"] < 0.1
    assert cards["int4"].weight_bytes < cards["int8"].weight_bytes < cards["bf16"].weight_bytes
    assert cards["int4-kv8"].kv_bytes_per_token * 2 == cards["int4"].kv_bytes_per_token
    assert cards["int8"].gate["core"].outcome == Outcome.FAILED  # policy: 16-bit weights
    assert cards["bf16"].gate["core"].outcome == Outcome.PASSED


def test_cards_say_how_many_answers_are_valid_json(stack: Stack) -> None:
    """Half of the role's items are guided by the engine, and valid by construction; the model knows no
    JSON."""
    for name, card in stack.cards.items():
        assert card.evaluation is not None
        figures = card.evaluation.roles["extractor"]
        assert figures.valid_json is not None, name
        assert (figures.valid_json.items, figures.valid_json.good) == (8, 4), name
        assert figures.valid_json.reference_good == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_roles_land_on_their_precision(stack: Stack, http: aiohttp.ClientSession, stream: bool) -> None:
    record = make_record(HELD_OUT_SEED + 7)
    question, _ = record.questions[0]
    users = {
        "intent_classifier": "when is my credit card bill due",
        "summarizer": record.text,
        "core": f"{record.text}\n\n{question}",
    }
    for role, user in users.items():
        async with http.post(
            stack.url + "/v1/chat/completions",
            json=ask(role, user, stream=stream, max_tokens=64),
            headers={"x-agent-role": role},
        ) as response:
            assert response.status == 200, await response.text()
            variant = response.headers["x-tiercel-variant"]
            text = await response.text()
        assert variant in (QUANTIZED if role != "core" else {REFERENCE}), role
        assert "logprobs" not in text or '"logprobs":null' in text.replace(" ", "")


async def test_an_engine_wakes_up_for_every_message(stack: Stack, http: aiohttp.ClientSession) -> None:
    """A wake-up that is lost costs 5 s (``deploy/engine_site/serve_vllm.py``); answers without
    log-probabilities come so fast that it was lost often."""
    (engine,) = stack.config.replicas("assistant:int8")
    record = make_record(HELD_OUT_SEED + 9)
    for _ in range(30):
        began = time.monotonic()
        body = ask("summarizer", record.text, max_tokens=40)
        async with http.post(engine + "/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()
        assert time.monotonic() - began < 4.5


async def test_openai_client(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="unused") as client:
        models = [model.id async for model in client.models.list()]
        assert {"assistant", "assistant:bf16", "assistant:int8", "core", "intent_classifier"} <= set(models)
        messages = [
            {"role": "system", "content": SYSTEM_PROMPTS["intent_classifier"]},
            {"role": "user", "content": "when is my credit card bill due"},
        ]
        answer = await client.chat.completions.create(
            model="intent_classifier", messages=messages, temperature=0
        )
        assert answer.choices[0].message.content == "bill_due"
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 1
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model="intent_classifier",
            messages=messages,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        ):
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == "bill_due"
        assert usage == answer.usage


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after_first_token", [True, False])
async def test_disconnect_frees_the_engine(
    stack: Stack, http: aiohttp.ClientSession, stream: bool, after_first_token: bool
) -> None:
    """Mid-stream, before the first token of a stream, and while a whole answer is waited for."""
    if after_first_token and not stream:
        pytest.skip("a whole answer has no middle")
    (engine,) = stack.config.replicas(REFERENCE)
    # Fill the engine, so that the last one has to wait for its first token.
    body = ask("core", "go on", stream=stream, max_tokens=900, ignore_eos=True)
    crowd = 1 if after_first_token else 80
    before = await metric(http, engine, "vllm:generation_tokens_total")
    clients = [aiohttp.ClientSession() for _ in range(crowd)]
    posts = [
        asyncio.create_task(client.post(stack.url + "/v1/chat/completions", json=body)) for client in clients
    ]
    try:
        if after_first_token:
            response = await posts[0]
            assert await response.content.readline()
        else:
            while await metric(http, engine, "vllm:num_requests_waiting") == 0:
                await asyncio.sleep(0.05)
        assert await metric(http, engine, "vllm:num_requests_running") >= 1
    finally:
        for post in posts:
            post.cancel()
        for answered in await asyncio.gather(*posts, return_exceptions=True):
            if isinstance(answered, aiohttp.ClientResponse):
                answered.close()
        for client in clients:
            await client.close()
    await until_idle(http, engine)
    written = await metric(http, engine, "vllm:generation_tokens_total") - before
    assert written < crowd * 900, "it would have gone on to the end"
    assert await metric(http, stack.url, "tiercel_requests_total", outcome="499") >= 1


@pytest.mark.skipif(not CLINC150.exists(), reason=f"CLINC150 is not at {CLINC150}")
@pytest.mark.parametrize("variant", ["bf16", "int8", "int4-kv8"])
async def test_accuracy_through_the_gateway_is_the_cards(
    stack: Stack, http: aiohttp.ClientSession, variant: str
) -> None:
    slots = asyncio.Semaphore(24)

    async def right(item: dict[str, object]) -> bool:
        body = {"model": f"assistant:{variant}", "temperature": 0, "max_tokens": 8}
        async with (
            slots,
            http.post(
                stack.url + "/v1/chat/completions",
                json={**body, "messages": item["messages"]},
                headers={"x-agent-role": "intent_classifier"},
            ) as response,
        ):
            assert response.status == 200, await response.text()
            assert response.headers["x-tiercel-variant"] == f"assistant:{variant}"
            return (await response.json())["choices"][0]["message"]["content"] == item["expected"]

    answers = await asyncio.gather(*(right(item) for item in clinc150_items()))
    evaluation = stack.cards[variant].evaluation
    assert evaluation is not None
    figures = evaluation.roles["intent_classifier"]
    assert figures.items == len(answers)
    assert abs(sum(answers) - figures.correct) <= 0.02 * len(answers)  # other requests were in the batches
    if variant == "bf16":
        assert sum(answers) / len(answers) > 0.88  # 92 % on the whole split


async def test_adk_team(stack: Stack) -> None:
    tickets = read_tickets(ROOT / "deploy/assistant/data/messages.jsonl")[:12]
    results = await run_team(tickets, stack.url, "assistant", concurrency=4)
    for result in results:
        assert not result.errors
        assert result.agents["intent_classifier"].variant in QUANTIZED
        assert result.agents["summarizer"].variant in QUANTIZED
        assert {one.variant for one in result.of("specialist")} <= QUANTIZED
        assert result.agents["core"].calls == 2, "its tool, and its answer"
        assert result.agents["core"].variant == REFERENCE
    right = sum(result.agents["core"].text == result.ticket.answer for result in results)
    assert right >= 10


async def test_metrics_have_live_values(stack: Stack, http: aiohttp.ClientSession) -> None:
    """After the tests above: latency, memory and quality per role and variant."""
    for role, variants in (("core", {"bf16"}), ("summarizer", {"int8", "int4-kv8"})):
        counts = {
            v: await metric(http, stack.url, "tiercel_requests_total", role=role, variant=v, outcome="200")
            for v in variants
        }
        assert sum(counts.values()) > 0
        for name in (
            "tiercel_request_duration_seconds_count",
            "tiercel_time_to_first_token_seconds_count",
            "tiercel_inter_token_latency_seconds_count",
            "tiercel_token_nll_mean_count",
            "tiercel_token_entropy_max_count",
            "tiercel_tokens_total",
        ):
            assert await metric(http, stack.url, name, role=role) > 0, name
    assert (
        await metric(http, stack.url, "tiercel_quality_sentences_total", role="core", label="supported") > 0
    )
    for variant, card in stack.cards.items():
        if variant in stack.model.serve:
            labels = {"model": "assistant", "variant": variant}
            assert (
                await metric(http, stack.url, "tiercel_variant_weight_bytes", **labels) == card.weight_bytes
            )
            assert await metric(http, stack.url, "tiercel_engine_memory_bytes", **labels) > 1e8
            assert 0 <= await metric(http, stack.url, "tiercel_kv_cache_usage_ratio", **labels) <= 1


async def test_context_longer_than_the_engine_allows(stack: Stack, http: aiohttp.ClientSession) -> None:
    body = ask("core", "word " * 3000)
    async with http.post(stack.url + "/v1/chat/completions", json=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert "1024" in error["message"]
    assert "Traceback" not in json.dumps(error)


async def test_core_cannot_be_lowered(stack: Stack, http: aiohttp.ClientSession) -> None:
    body = {**ask("core", "hi"), "model": "assistant:int4-kv8"}
    headers = {"x-agent-role": "core"}
    async with http.post(stack.url + "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status in (400, 403)
        assert "bf16" in (await response.json())["error"]["message"]


async def test_a_dead_engine_raises_precision_until_it_is_back(
    stack: Stack, http: aiohttp.ClientSession
) -> None:
    """Runs last: it kills the engine of the cheapest variant and waits for the supervisor."""
    state = json.loads((stack.config.run_dir / "engines.json").read_text(encoding="utf-8"))
    body, headers = (
        ask("intent_classifier", "tell me a joke", max_tokens=8),
        {"x-agent-role": "intent_classifier"},
    )

    async def variant(*also: int) -> tuple[str, str]:
        async with http.post(stack.url + "/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status in (200, *also), await response.text()
            return response.headers["x-tiercel-variant"], response.headers["x-tiercel-route-reason"]

    usual, _ = await variant()
    os.kill(state["engines"][usual]["pid"], signal.SIGKILL)
    await asyncio.sleep(1.0)
    # Its own children may hold the port for a moment more: whoever is let in there is told that it broke off.
    async with asyncio.timeout(20):
        while (answer := await variant(502))[0] == usual:
            await asyncio.sleep(0.5)
    assert answer[0] != usual
    assert answer[1] == "raised_pool_down"
    deadline = time.monotonic() + 180
    while (await variant())[0] != usual:
        assert time.monotonic() < deadline
        await asyncio.sleep(1)
    log = stack.log.read_text(encoding="utf-8")
    assert f"engine {usual} ended with status -9; starting it again" in log
    assert f"engine {usual} is ready again" in log
