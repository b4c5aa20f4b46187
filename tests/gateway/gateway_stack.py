"""What the gateway's tests stand on: cards without weights, fake engines, a gateway on a real socket."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
import yaml
from prometheus_client import CollectorRegistry

import deploy.engine
from gateway.app import Gateway
from gateway.config import Config
from gateway.upstream.fake import FakeEngine, Script
from quantize.card import Card, Evaluation, RoleEvaluation, TextEvaluation, write_card
from quantize.core.files import point

CHAT = "/v1/chat/completions"
RECORD = "Order C2390\ncustomer: Greta Vidal\ntotal: $277\n\nhow much does order C2390 cost"


def full(variant: str) -> str:
    """The id of a variant; one without a model is of ``assistant``, the only one where nothing else is
    said."""
    return variant if ":" in variant else f"assistant:{variant}"


def make_card(variant: str, *, passes: tuple[str, ...] = (), **changes: Any) -> Card:
    """A card of ``variant``; its gate passes for the roles in ``passes`` and for no other."""
    text = TextEvaluation(
        tokens=1000,
        perplexity=6.0,
        reference_perplexity=6.0,
        delta_log_perplexity=0.0,
        delta_log_perplexity_se=0.001,
        kl_mean=0.001,
        kl_p99=0.01,
        kl_se=0.0001,
        kl_vocabulary=2048,
        kl_exact=True,
        sequences=80,
        top1_agreement=0.99,
    )
    good = RoleEvaluation(
        text=text,
        items=1000,
        correct=950,
        reference_correct=950,
        flips_to_wrong=0,
        flips_to_right=0,
        same_answer=1000,
        mcnemar_p=1.0,
    )
    evaluation = Evaluation(roles=dict.fromkeys(passes, good), text=text, tasks_sha256="0", engine={})
    fields: dict[str, Any] = {
        "model": "assistant",
        "variant": variant,
        "reference": "bf16",
        "scheme": "test",
        "method": "test",
        "weight_bits": 16,
        "module_bits": {},
        "weight_bytes": 8_000_000,
        "kv_bytes_per_token": 1024,
        "max_model_len": 1024,
        "versions": {},
        "created": "2026-11-20",
        "files": {},
        "evaluation": evaluation if passes else None,
    }
    return Card(**fields | changes)


def make_cards() -> dict[str, Card]:
    """bf16 for everybody, int8 for the auxiliary roles, int4-kv8 for the intent classifier only."""
    return by_id(
        make_card("bf16"),
        make_card("int8", passes=("intent_classifier", "summarizer"), weight_bits=8, weight_bytes=5_000_000),
        make_card(
            "int4-kv8",
            passes=("intent_classifier",),
            weight_bits=4,
            weight_bytes=3_000_000,
            kv="fp8",
        ),
    )


def by_id(*cards: Card) -> dict[str, Card]:
    """As the gateway has them."""
    return {card.id: card for card in cards}


def make_config(**changes: Any) -> Config:
    """``serve``, ``reference`` and ``calibration`` are the model's, where it is the only one."""
    own = {name: changes.pop(name) for name in ("serve", "reference", "calibration") if name in changes}
    assistant = {"path": Path("model"), "serve": ("bf16", "int8", "int4-kv8")} | own
    gateway = {"scrape_interval_s": 0.05, "health_interval_s": 0.05} | changes.pop("gateway", {})
    fields = {
        "models": {"assistant": assistant},
        "variants_dir": Path("variants"),
        "roles": {
            "intent_classifier": {"agents": ("IntentAgent",)},
            "summarizer": {},
            "core": {"grounded": True, "budget": {"min_weight_bits": 16}},
        },
        "default_role": "core",
        "gateway": gateway,
        "quality": {"sample_rate": 1.0} | changes.pop("quality", {}),
        "watch": {"store": "sqlite://"} | changes.pop("watch", {}),
    }
    return Config.model_validate(fields | changes)


def write_variants(directory: Path) -> None:
    """The cards on disk, as variants without weights."""
    for card in make_cards().values():
        place = directory / card.model / card.variant / card.version
        place.mkdir(parents=True, exist_ok=True)
        write_card(card, place)
        point(place.parent / "current", card.version)


OTHERS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""Further addresses of this machine alone, for a server that stands for the engines of several variants."""


def addresses(url: str, variants: Sequence[str] = ("bf16", "int8", "int4-kv8")) -> dict[str, list[str]]:
    """Of a server that listens on ``OTHERS`` too, one for each variant, since an engine serves one."""
    port = url.rpartition(":")[2]
    return {variant: [f"http://127.0.0.{n}:{port}"] for n, variant in enumerate(variants, 1)}


def settings(directory: Path, urls: dict[str, list[str]], **changes: Any) -> str:
    """A file; ``serve`` and ``reference`` are the model's."""
    own = {name: changes.pop(name) for name in ("serve", "reference") if name in changes}
    return yaml.safe_dump(
        {
            "models": {"assistant": {"path": "model", "serve": ["bf16", "int8", "int4-kv8"]} | own},
            "variants_dir": str(directory),
            "roles": {"intent_classifier": {}, "summarizer": {}, "core": {}},
            "default_role": "core",
            "pools": urls,
            "quality": {"sample_rate": 1.0},
            "watch": {"store": "sqlite://"},
        }
        | changes
    )


def free_port() -> int:
    return deploy.engine.free_port("127.0.0.1")


def free_socket() -> socket.socket:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    return listening


class EngineByVariant(dict[str, FakeEngine]):
    """By ``model:variant``; a variant alone is one of ``assistant``."""

    def __missing__(self, variant: str) -> FakeEngine:
        if ":" in variant:
            raise KeyError(variant)
        return self[full(variant)]


class Stack:
    """A running gateway with a fake engine per variant."""

    def __init__(
        self, url: str, http: aiohttp.ClientSession, registry: CollectorRegistry, gateway: Gateway
    ) -> None:
        self.gateway = gateway
        self.url = url
        self.http = http
        self.registry = registry
        self.engines = EngineByVariant()

    def post(self, body: Any = None, path: str = CHAT, **options: Any) -> Any:
        """A request; ``body`` has what differs from a plain question to the model."""
        question = {"model": "assistant", "messages": [{"role": "user", "content": RECORD}]}
        return self.http.post(self.url + path, json=question | (body or {}), **options)

    async def events(self, response: aiohttp.ClientResponse) -> list[Any]:
        """The data of every event of a stream; ``[DONE]`` as that string."""
        text = await response.text()
        values = [line.removeprefix("data: ") for line in text.splitlines() if line]
        return [value if value == "[DONE]" else json.loads(value) for value in values]

    def sample(self, name: str, **labels: str) -> float:
        """A variant without its model is one of ``assistant``."""
        if "variant" in labels:
            labels.setdefault("model", "assistant")
        return self.registry.get_sample_value(name, labels) or 0.0

    def asked(self, variant: str) -> list[dict[str, Any]]:
        """What clients asked a variant's engine, in order."""
        return from_clients(self.engines[variant])

    def settled(self) -> bool:
        """Whether all answers so far have been looked at, and engines asked about them."""
        return self.gateway.checks.idle and self.gateway._inquiry.idle

    def requests(self, outcome: str) -> float:
        """Requests that ended so, whatever their other labels."""
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "tiercel_requests_total" and sample.labels["outcome"] == outcome
        )


def from_clients(engine: FakeEngine) -> list[dict[str, Any]]:
    """What clients asked an engine, in order: only their requests have an id, the watch's have none."""
    heads = zip(engine.requests, engine.headers, strict=True)
    return [body for body, headers in heads if "x-request-id" in headers]


async def eventually(true: Callable[[], Any], within_s: float = 25.0) -> None:
    """Wait until ``true()``, which may be a coroutine; fail after ``within_s``. The usual time is long for a
    machine whose cores are busy, and shorter than what engines that are to be left take over an answer."""
    async with asyncio.timeout(within_s):
        while True:
            result = true()
            if await result if inspect.isawaitable(result) else result:
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_gateway(**changes: Any) -> AsyncIterator[Stack]:
    """A gateway on uvicorn over a fake engine per variant. ``changes`` are to its configuration;
    ``cards`` replaces the cards, ``pools`` what they point to."""
    cards = changes.pop("cards", None) or make_cards()
    discovery = changes.pop("discovery", None)
    async with AsyncExitStack() as exits:
        engines = EngineByVariant({variant: FakeEngine(Script()) for variant in cards})
        urls = {v: (await exits.enter_async_context(engine.serving()),) for v, engine in engines.items()}
        config = make_config(**{"pools": urls} | changes)
        registry = CollectorRegistry()
        gateway = Gateway(config, cards, registry, discovery=discovery)
        url = await exits.enter_async_context(serving(gateway.app, http=gateway.protocol))
        http = await exits.enter_async_context(aiohttp.ClientSession())
        stack = Stack(url, http, registry, gateway)
        stack.engines = engines
        yield stack


@asynccontextmanager
async def serving(app: Any, http: Any = "auto") -> AsyncIterator[str]:
    """An ASGI application on uvicorn, on a free port; gives its base URL. ``http``: the protocol."""
    listening = free_socket()
    server = uvicorn.Server(
        uvicorn.Config(app, http=http, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    task = asyncio.create_task(server.serve(sockets=[listening]))
    await eventually(lambda: server.started, within_s=120)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
