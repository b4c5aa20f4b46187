"""What every test stands on."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says what else the machine does.
settings.register_profile("tiercel", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tiercel")

# Where a shell says so, each of hundreds of processes would compile whatever it imports, torch and all.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# LiteLLM fetches its price list from the net when it is imported, unless it is told not to.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def _logging() -> tuple[int, list[str]]:
    """The root logger's level and handlers, pytest's own left out."""
    handlers = [repr(one) for one in logging.root.handlers if not type(one).__module__.startswith("_pytest")]
    return logging.root.level, handlers


@pytest.fixture(autouse=True)
def _logging_is_left_alone() -> Iterator[None]:
    """A test that leaves the process's log changed makes others fail, and which ones is chance."""
    before = _logging()
    yield
    after, logging.root.level = _logging(), before[0]
    assert after == before, "the root logger is not as it was before the test"
