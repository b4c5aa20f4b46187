"""Frameworks, each in its own environment, against one stack of scripted engines."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
import uvloop

from tests.frameworks.environments import Framework, frameworks
from tests.frameworks.harness import Recipes, Scripted, scripted_stack
from tests.frameworks.table import SEEN

QUICK = ("openai", "anthropic", "google-adk", "openai-agents")
"""Those that every run of the tests has; `make frameworks` has all."""


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted() -> AsyncIterator[Scripted]:
    async with scripted_stack() as stack:
        yield stack


@pytest.fixture(scope="module", params=sorted(name for name, one in frameworks().items() if not one.npm))
def framework(request: pytest.FixtureRequest) -> Framework:
    found = frameworks()[request.param]
    if request.param not in QUICK and os.environ.get("TIERCEL_FRAMEWORKS") != "all":
        pytest.skip(f"{found.title} is run by `make frameworks`")
    if found.python is None:
        pytest.skip(f"{found.title} has no environment here; `make frameworks` makes it")
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recipes(
    framework: Framework, scripted: Scripted, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Recipes]:
    """The framework's page."""
    one = Recipes(framework, scripted.url, tmp_path_factory.mktemp(framework.name))
    async with one.running():
        yield one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Note what became of a scenario, for the table in docs/frameworks."""
    report = yield
    given = getattr(getattr(item, "callspec", None), "params", {})
    if "scenario" not in given or "framework" not in given or not (report.when == "call" or report.skipped):
        return report
    seen = json.loads(SEEN.read_text(encoding="utf-8")) if SEEN.is_file() else {}
    why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    of = seen.setdefault(given["framework"], {})
    of[given["scenario"]] = {"outcome": report.outcome, "why": why, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    SEEN.parent.mkdir(parents=True, exist_ok=True)
    SEEN.write_text(json.dumps(seen, indent=1), encoding="utf-8")
    return report
