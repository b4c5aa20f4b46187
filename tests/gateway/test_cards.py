"""Cards on disk: which version is served, and that what changes there is taken over without a new start."""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_stack import EngineByVariant, Stack, eventually, make_card, serving, settings
from prometheus_client import CollectorRegistry

import gateway.cards
from gateway.app import Gateway
from gateway.cards import CardWatch, load_cards, marks_of
from gateway.config import Config, ConfigError, parse_config
from gateway.upstream.fake import FakeEngine, Script
from quantize.card import Card, CardError, Verdict, write_card
from quantize.core.files import point

PASSED = {"core": Verdict(outcome="passed", reasons=("it was measured",))}


def put(directory: Path, card: Card, *, use: bool = True) -> Path:
    """A version of a variant, in use or not; gives its directory."""
    place = directory / card.model / card.variant / card.version
    place.mkdir(parents=True, exist_ok=True)
    write_card(card, place)
    if use:
        point(place.parent / "current", card.version)
    return place


def version_of(number: int, **changes: Any) -> Card:
    """A version of int8 with files of its own."""
    card = make_card("int8", weight_bits=8, weight_bytes=5_000_000, **changes)
    return card.model_copy(update={"files": {"model.safetensors": f"{number:064x}"}})


def configuration(directory: Path, urls: dict[str, list[str]] | None = None, **changes: Any) -> Config:
    changes = {"serve": ["bf16", "int8"], "roles": {"core": {}}} | changes
    return parse_config(settings(directory, urls or {}, **changes), "text", directory)


def test_cards_are_by_id_and_lie_in_their_models_directories(tmp_path: Path) -> None:
    models = {name: {"path": "model", "serve": ["bf16"]} for name in ("org/big", "small")}
    for model in models:
        card = make_card("bf16", model=model)
        place = tmp_path / model.replace("/", "--") / "bf16" / card.version
        place.mkdir(parents=True)
        write_card(card, place)
        point(place.parent / "current", card.version)
    config = configuration(tmp_path, models=models)
    found = load_cards(config)
    assert {name: card.model for name, card in found.items()} == {
        "org/big:bf16": "org/big",
        "small:bf16": "small",
    }


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (make_card("int4"), "is the card of 'int4', not 'int8'"),
        (make_card("int8", model="other"), "is of the model 'other', not 'assistant'"),
        (make_card("int8", reference="fp16"), "the reference of assistant is 'bf16'"),
    ],
)
def test_a_card_that_is_another_ones_is_refused(tmp_path: Path, card: Card, says: str) -> None:
    put(tmp_path, make_card("bf16"))
    place = tmp_path / "assistant" / "int8" / card.version
    place.mkdir(parents=True)
    write_card(card, place)
    point(place.parent / "current", card.version)
    with pytest.raises(CardError, match=says):
        load_cards(configuration(tmp_path))


def test_a_version_that_does_not_load_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, make_card("bf16"))
    good = version_of(1).model_copy(update={"gate": PASSED})
    put(tmp_path, good, use=False)
    put(tmp_path, version_of(2, state="broken", engine_words="no kernel"))
    assert load_cards(configuration(tmp_path))["assistant:int8"].version == good.version
    assert "is used instead of" in caplog.text
    broken = put(tmp_path, version_of(3))
    (broken / "card.json").write_text("{")
    assert load_cards(configuration(tmp_path))["assistant:int8"].version == good.version


def test_marks_change_with_cards_and_links(tmp_path: Path) -> None:
    put(tmp_path, make_card("bf16"))
    first = put(tmp_path, version_of(1))
    config = configuration(tmp_path)
    seen = [marks_of(config)]
    changes: list[Callable[[], object]] = [
        lambda: put(tmp_path, version_of(2), use=False),
        lambda: point(first.parent / "current", version_of(2).version),
        lambda: write_card(version_of(1).model_copy(update={"notes": ("measured",)}), first),
        lambda: shutil.rmtree(first),
    ]
    for change in changes:
        assert marks_of(config) == seen[-1]
        change()
        seen.append(marks_of(config))
        assert seen[-1] != seen[-2]
    assert marks_of(configuration(tmp_path / "nothing")) == {
        "assistant:bf16": (None,),
        "assistant:int8": (None,),
    }


async def test_only_cards_that_are_others_are_taken_over(tmp_path: Path) -> None:
    put(tmp_path, make_card("bf16"))
    put(tmp_path, version_of(1))
    config, read = configuration(tmp_path), 0
    cards = load_cards(config)

    async def apply(load: gateway.cards.Read) -> None:
        nonlocal cards, read
        _, found = load()
        cards, read = dict(found), read + 1

    watch = CardWatch(lambda: (config, cards), apply)
    await watch.look()
    put(tmp_path, version_of(1))  # written once more, with the same words
    await watch.look()
    assert read == 0
    put(tmp_path, version_of(2))
    await watch.look()
    await watch.look()
    assert (read, cards["assistant:int8"].version) == (1, version_of(2).version)


async def test_cards_that_cannot_be_used_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, make_card("bf16"))
    put(tmp_path, version_of(1))
    config = configuration(tmp_path)
    cards = load_cards(config)

    async def refuse(load: gateway.cards.Read) -> None:
        load()
        raise ConfigError("roles.core: nobody is good enough")

    watch = CardWatch(lambda: (config, cards), refuse)
    await watch.look()
    put(tmp_path, version_of(2))
    for _ in range(3):
        await watch.look()
    assert caplog.text.count("nobody is good enough") == 1
    assert caplog.text.count("cannot be used; those before stay") == 1


@asynccontextmanager
async def running(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    """A gateway over the cards in ``directory``, which it looks at often."""
    monkeypatch.setattr("gateway.app.LOOK_EVERY_S", 0.05)
    engines = EngineByVariant({name: FakeEngine(Script()) for name in ("assistant:bf16", "assistant:int8")})
    async with engines["bf16"].serving() as one, engines["int8"].serving() as other:
        urls = {"bf16": [one], "int8": [other]}
        config = configuration(directory, urls, run_dir=str(directory / "run"))
        registry = CollectorRegistry()
        made = Gateway(config, load_cards(config), registry, load=lambda: (config, load_cards(config)))
        async with serving(made.app, http=made.protocol) as url, aiohttp.ClientSession() as http:
            stack = Stack(url, http, registry, made)
            stack.engines = engines
            yield stack


async def variant(stack: Stack) -> str:
    async with stack.post({"model": "core"}) as response:
        assert response.status == 200
        await response.read()
        return response.headers["x-tiercel-variant"]


async def test_a_variant_that_has_been_measured_serves_without_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First its figures come, then a new version of it that has none yet, then one that is no card at all."""
    caplog.set_level(logging.INFO)
    put(tmp_path, make_card("bf16"))
    put(tmp_path, version_of(1))
    async with running(tmp_path, monkeypatch) as stack:
        assert await variant(stack) == "assistant:bf16"
        put(tmp_path, version_of(1, passes=("core",)))
        await eventually(lambda: serves(stack, "assistant:int8"))
        assert f"the cards were read anew: assistant:int8 {version_of(1).version}" in caplog.text

        def weights() -> float:
            return stack.sample("tiercel_variant_weight_bytes", variant="int8")

        put(tmp_path, version_of(2).model_copy(update={"weight_bytes": 4_000_000}))
        await eventually(lambda: weights() == 4_000_000)
        assert await variant(stack) == "assistant:bf16", "what has no figures serves nobody"
        key = stack.gateway.watch.key("assistant:int8", "core") if stack.gateway.watch else None
        assert key is not None
        assert key.version == version_of(2).version, "the watch begins anew with a new version"
        before = stack.gateway.plane.snapshot
        (tmp_path / "assistant" / "bf16" / "current").unlink()
        await eventually(lambda: "those before stay" in caplog.text)
        assert stack.gateway.plane.snapshot is before
        assert await variant(stack) == "assistant:bf16"
        put(tmp_path, make_card("bf16"))
        put(tmp_path, version_of(3, passes=("core",)))
        await eventually(lambda: serves(stack, "assistant:int8"))


async def serves(stack: Stack, wanted: str) -> bool:
    return await variant(stack) == wanted


async def test_a_configuration_that_was_sent_stays_when_cards_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards are read for what is in use, and not for what the file says."""
    put(tmp_path, make_card("bf16"))
    put(tmp_path, version_of(1))
    async with running(tmp_path, monkeypatch) as stack:
        config = stack.gateway.plane.snapshot.config
        urls = {name: list(config.replicas(name)) for name in config.served}
        sent = settings(
            tmp_path,
            urls,
            serve=["bf16", "int8"],
            roles={"core": {}, "another": {}},
            run_dir=str(tmp_path / "run"),
        )
        headers = {"content-type": "application/yaml"}
        async with stack.http.put(stack.url + "/admin/config", data=sent, headers=headers) as response:
            assert response.status == 200, await response.text()
        put(tmp_path, version_of(1, passes=("core",)))
        await eventually(lambda: serves(stack, "assistant:int8"))
        assert "another" in stack.gateway.plane.snapshot.config.roles
