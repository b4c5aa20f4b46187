"""What every test stands on."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.slots import Slots, engines_of, group_of

# How long an example takes says what else the machine does.
settings.register_profile("tiercel", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tiercel")

# LiteLLM fetches its price list from the net when it is imported, unless it is told not to.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def _logging() -> tuple[int, list[str]]:
    """The root logger's level and handlers, pytest's own left out."""
    handlers = [repr(one) for one in logging.root.handlers if not type(one).__module__.startswith("_pytest")]
    return logging.root.level, handlers


_slots: list[Slots] = []
"""Of this process, where it is one of several that run tests."""
_needed: dict[str, int] = {}
"""Engines at once, by group of tests."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        _slots.append(Slots(Path(config.option.basetemp).parent / "engine-slots"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a group stay together (``--dist loadgroup``)."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        group = group_of(item)
        _needed[group] = max(_needed.get(group, 0), engines_of(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    """Before a group's first test its engines are waited for, and after its last they are given back."""
    group = group_of(item)
    for slots in _slots:
        if not slots.held:
            slots.take(_needed[group])
    done = yield
    if nextitem is None or group_of(nextitem) != group:
        for slots in _slots:
            slots.give_back()
    return done


@pytest.fixture(autouse=True)
def _logging_is_left_alone() -> Iterator[None]:
    """A test that leaves the process's log changed makes others fail, and which ones is chance."""
    before = _logging()
    yield
    after, logging.root.level = _logging(), before[0]
    assert after == before, "the root logger is not as it was before the test"
