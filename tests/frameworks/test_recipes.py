"""What docs/frameworks shows is true: each framework's recipes do what they say, on its own wheel."""

from __future__ import annotations

import re

import pytest

from tests.frameworks.harness import Recipes, Scripted, eventually
from tests.frameworks.scripted import hello

pytestmark = pytest.mark.asyncio(loop_scope="module")

SESSION = "trip-7"
"""The session that all recipes name."""
SUNNY = "{}: sunny, 21 degrees"
"""What the recipes' weather tool says."""


async def _told(recipes: Recipes, scripted: Scripted, section: str) -> dict:
    if section not in recipes.sections:
        page = recipes.page.read_text(encoding="utf-8")
        why = re.search(rf"^## {section}\n+(.+?)(?=\n\n|\n*\Z)", page, re.DOTALL | re.MULTILINE)
        pytest.skip(" ".join(why[1].split()) if why else f"the page has no section {section!r}")
    scripted.begin()
    return await recipes.run(section)


async def plain(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Plain")
    assert told["text"] == hello("bf16")
    (record,) = scripted.told()
    assert (record.status, record.role, record.session) == (200, "core", SESSION)
    assert record.usage.exact


async def streaming_with_usage(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Streaming with usage")
    assert len([piece for piece in told["pieces"] if piece]) > 2, "it came in pieces"
    assert "".join(told["pieces"]) == hello("bf16")
    (record,) = scripted.told()
    assert record.stream
    assert told["usage"] == [record.usage.prompt, record.usage.completion], "what the engine counted"


async def tools(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Tools")
    assert SUNNY.format("Oslo") in told["text"]
    _answers(scripted, ("Oslo",))


async def parallel_tools(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Parallel tools")
    for city in ("Oslo", "Bonn"):
        assert SUNNY.format(city) in told["text"]
    _answers(scripted, ("Oslo", "Bonn"))


def _answers(scripted: Scripted, cities: tuple[str, ...]) -> None:
    """The engine got a tool's words for each call that it made, under the call's own id."""
    last = scripted.asked()[-1]
    assert len(last.open_calls) >= len(cities)
    assert len(last.results) == len(cities), "the calls were made in one answer, and answered together"
    for city, result, call in zip(cities, last.results, last.answered, strict=True):
        assert SUNNY.format(city) in result
        assert "weather" in last.open_calls[call]
    assert {record.status for record in scripted.told()} == {200}


async def strict_schema(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Strict schema")
    assert told["found"] == {"city": "Oslo", "degrees": 21}


async def two_agents_on_two_roles(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Two agents, two roles")
    roles = {record.role: record.variant for record in scripted.told()}
    assert roles == {"intent_classifier": "assistant:int4-kv8", "core": "assistant:bf16"}
    assert {record.session for record in scripted.told()} == {SESSION}
    assert sorted(scripted.bodies()) == ["bf16", "int4-kv8"]
    if "variants" in told:
        assert told["variants"] == ["assistant:int4-kv8", "assistant:bf16"]


async def cancel(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, "Cancel")
    assert "".join(told["pieces"]).startswith("one")
    await eventually(lambda: scripted.aborted() == 1 and scripted.running() == 0)
    await eventually(lambda: [record.status for record in scripted.told()] == [499])


SCENARIOS = {
    "plain": plain,
    "streaming with usage": streaming_with_usage,
    "tools": tools,
    "parallel tools": parallel_tools,
    "strict schema": strict_schema,
    "two roles": two_agents_on_two_roles,
    "cancel": cancel,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_recipe(recipes: Recipes, scripted: Scripted, scenario: str) -> None:
    await SCENARIOS[scenario](recipes, scripted)
