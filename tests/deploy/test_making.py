"""What `tiercel quantize` decides before it starts engines."""

import os

import pytest

from deploy.making import answering_at_once
from gateway.config import load_config
from tests.deploy.test_supervisor import ROOT


@pytest.mark.parametrize(
    ("threads", "cores", "at_once"),
    [("1", 2, 2), ("1", 16, 2), ("2", 2, 1), ("8", 4, 1), (None, 8, 1), ("many", 8, 1), ("0", 8, 1)],
)
def test_engines_answer_side_by_side_only_with_threads_of_their_own(
    monkeypatch: pytest.MonkeyPatch, threads: str | None, cores: int, at_once: int
) -> None:
    config = load_config(ROOT / "tiercel.yaml")
    env = {} if threads is None else {"OMP_NUM_THREADS": threads}
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"env": env})})
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert answering_at_once(config) == at_once
