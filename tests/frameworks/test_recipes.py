"""What docs/frameworks shows is true: each framework's recipes do what they say, on its own wheel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.frameworks.environments import PAGES, frameworks
from tests.frameworks.harness import Recipes, Scripted, eventually
from tests.frameworks.scripted import hello
from tests.frameworks.table import COLUMNS, prose

pytestmark = pytest.mark.asyncio(loop_scope="module")

SESSION = "trip-7"
"""The session that all recipes name."""
SUNNY = "{}: sunny, 21 degrees"
"""What the recipes' weather tool says."""


async def _told(recipes: Recipes, scripted: Scripted, section: str) -> dict[str, Any]:
    if section not in recipes.sections:
        why = prose(recipes.page.read_text(encoding="utf-8"), section)
        pytest.skip(why or f"the page has no section {section!r}")
    await recipes.prepare(section)
    scripted.begin()
    return await recipes.run(section)


async def plain(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["plain"])
    assert told["text"] == hello("bf16")
    (record,) = scripted.told()
    assert (record.status, record.role, record.session) == (200, "core", SESSION)
    assert record.usage.exact


async def streaming_with_usage(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["streaming with usage"])
    assert len([piece for piece in told["pieces"] if piece]) > 2, "it came in pieces"
    assert "".join(told["pieces"]) == hello("bf16")
    (record,) = scripted.told()
    assert record.stream
    assert told["usage"] == [record.usage.prompt, record.usage.completion], "what the engine counted"


async def tools(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["tools"])
    assert SUNNY.format("Oslo") in told["text"]
    _answers(scripted, ("Oslo",))


async def parallel_tools(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["parallel tools"])
    for city in ("Oslo", "Bonn"):
        assert SUNNY.format(city) in told["text"]
    _answers(scripted, ("Oslo", "Bonn"))


def _answers(scripted: Scripted, cities: tuple[str, ...]) -> None:
    """The engine got a tool's words for each call that it made, under the call's own id."""
    last = scripted.asked()[-1]
    assert {record.status for record in scripted.told()} == {200}
    if not last.answered:  # a framework that writes what tools have said as a user's words
        assert [city for city in cities if SUNNY.format(city) in last.results[0]] == list(cities)
        return
    assert len(last.results) == len(cities), "the calls were made in one answer, and answered together"
    for city, result, call in zip(cities, last.results, last.answered, strict=True):
        assert SUNNY.format(city) in result
        assert "weather" in last.open_calls[call]


async def strict_schema(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["strict schema"])
    assert told["found"] == {"city": "Oslo", "degrees": 21}


async def two_agents_on_two_roles(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["two roles"])
    roles = {record.role: record.variant for record in scripted.told()}
    assert roles == {"intent_classifier": "assistant:int4-kv8", "core": "assistant:bf16"}
    assert {record.session for record in scripted.told()} == {SESSION}
    assert sorted(scripted.bodies()) == ["bf16", "int4-kv8"]
    if "variants" in told:
        assert told["variants"] == ["assistant:int4-kv8", "assistant:bf16"]


async def cancel(recipes: Recipes, scripted: Scripted) -> None:
    told = await _told(recipes, scripted, COLUMNS["cancel"])
    assert "".join(told["pieces"]).startswith("one")
    await eventually(lambda: scripted.aborted() == 1 and scripted.running() == 0)
    await eventually(lambda: [record.status for record in scripted.told()] == [499])


async def further(recipes: Recipes, scripted: Scripted) -> None:
    """What else a page shows, each with what has to come of it."""
    sections = [one for one in recipes.sections if one != "Connect" and one not in COLUMNS.values()]
    if not sections:
        pytest.skip("nothing else")
    for section in sections:
        told = await _told(recipes, scripted, section)
        FURTHER[recipes.framework.name, section](told, scripted)


def _roles(*wanted: str) -> Check:
    """One request of each role, as often as it is named."""

    def check(_: Told, scripted: Scripted) -> None:
        assert sorted(record.role or "" for record in scripted.told()) == sorted(wanted)
        assert {record.session for record in scripted.told()} == {SESSION}

    return check


def _anthropics(told: Told, scripted: Scripted) -> None:
    for city in ("Oslo", "Bonn"):
        assert SUNNY.format(city) in told["text"]
    _answers(scripted, ("Oslo", "Bonn"))
    assert {record.path for record in scripted.told()} == {"/v1/messages"}
    assert {record.role for record in scripted.told()} == {"summarizer"}


def _score(told: Told, _: Scripted) -> None:
    assert told["score"] == 1.0


def _other_protocol(path: str) -> Check:
    """Tools, a schema and a stream, all at ``path``."""

    def check(told: Told, scripted: Scripted) -> None:
        for city in ("Oslo", "Bonn"):
            assert SUNNY.format(city) in told["text"]
        assert told["found"] == {"city": "Oslo", "degrees": 21}
        assert "".join(told["pieces"]) == hello("bf16")
        last = scripted.told()[-1]
        assert told["usage"] == [last.usage.prompt, last.usage.completion]
        assert {record.path for record in scripted.told()} == {path}
        assert {record.status for record in scripted.told()} == {200}

    return check


def _went_on(told: Told, scripted: Scripted) -> None:
    """The second turn has the first one's question, which the client did not send again."""
    assert told["text"] == hello("bf16")
    last = scripted.bodies()["bf16"][-1]
    assert [item["role"] for item in last["input"]] == ["user", "assistant", "user"]


Told = dict[str, Any]
Check = Callable[[Told, Scripted], None]
FURTHER: dict[tuple[str, str], Check] = {
    ("openai", "Responses"): _other_protocol("/v1/responses"),
    ("openai", "A conversation that goes on"): _went_on,
    ("openai-agents", "Chat"): _other_protocol("/v1/chat/completions"),
    ("langgraph", "Responses"): _other_protocol("/v1/responses"),
    ("pydantic-ai", "Responses"): _other_protocol("/v1/responses"),
    ("agent-framework", "Responses"): _other_protocol("/v1/responses"),
    ("google-adk", "Parallel agents"): _roles("summarizer", "core"),
    ("google-adk", "Loop"): _roles("core", "summarizer", "core", "summarizer"),
    ("google-adk", "Workflow"): _roles("intent_classifier", "summarizer", "core"),
    ("google-adk", "Native model"): _anthropics,
    ("google-adk", "Evaluation"): _score,
}
SCENARIOS = {
    "plain": plain,
    "streaming with usage": streaming_with_usage,
    "tools": tools,
    "parallel tools": parallel_tools,
    "strict schema": strict_schema,
    "two roles": two_agents_on_two_roles,
    "cancel": cancel,
    "further": further,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_recipe(recipes: Recipes, scripted: Scripted, scenario: str) -> None:
    await SCENARIOS[scenario](recipes, scripted)


async def test_the_table_has_a_line_for_every_framework() -> None:
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    known = [one for one in frameworks().values() if not one.npm]
    assert [line.split("](")[0] for line in lines] == [f"| [{one.title}" for one in known]
    for line, one in zip(lines, known, strict=True):
        assert all(f"`{version}`" in line for version in one.install if "==" in version), one.title
    assert "fails" not in text.split("<!-- seen -->")[1]
