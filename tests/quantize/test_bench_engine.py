"""The engine's side of the bench, without an engine."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.evaluate import bench_engine


def test_every_sequence_shows_that_the_engine_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may take longer for all of them than an engine may be silent."""
    sequences = tmp_path / "sequences.json"
    sequences.write_text(json.dumps([[[1, 2, 3], 1], [[4, 5], 1], [[6, 7, 8, 9], 2]]))
    alarms: list[int] = []

    def figures(_llm: Any, tokens: list[int], start: int, *_: Any) -> dict[str, bytes]:
        count = len(tokens) - start
        return {"came": np.zeros(count).tobytes(), "top1": np.full(count, len(alarms), "<i4").tobytes()}

    monkeypatch.setattr(bench_engine, "load", lambda _request: None)
    monkeypatch.setattr(bench_engine, "described", lambda _llm: {"width": 1, "dtype": "float32", "head": "h"})
    monkeypatch.setattr(bench_engine, "figures", figures)
    monkeypatch.setattr(signal, "alarm", alarms.append)
    out = tmp_path / "scores.npz"
    request = {
        "sequences": str(sequences),
        "reference": None,
        "save": None,
        "out": str(out),
        "timeout_s": 600.0,
    }
    assert bench_engine.score(request)["tokens"] == 5
    assert alarms == [600, 600, 600]
    with np.load(out) as columns:
        assert columns["top1"].tolist() == [0, 0, 1, 2, 2]
