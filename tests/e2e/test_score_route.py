"""Our route of the real engine must say exactly what vLLM's own answer says, for the whole vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.engine import EngineSpec, free_port, running
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.client import EngineClient, EngineError
from quantize.registry import Registry
from tests.deploy.test_supervisor import ROOT

PROMPTS = ([1, 5, 9, 200, 31, 77, 2000, 8], list(range(300, 500)), [1, 2])


@pytest.mark.engine
async def test_the_route_agrees_with_prompt_logprobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "tiercel.yaml")
    registry = Registry(tmp_path, config.model.name, config.reference)
    card = registry.add_reference(open_checkpoint(config.model.path))
    port = free_port("127.0.0.1")
    spec = EngineSpec(card, registry.path("bf16", card.version), "127.0.0.1", port, tmp_path / "engine.log")
    async with running(spec, config.engine, print), EngineClient(spec.url, card.model) as client:
        vocabulary = await client.vocabulary()
        assert vocabulary == 2048
        for prompt in PROMPTS:
            whole = await client.score_by_route(prompt, 1, vocabulary)
            assert whole.whole
            assert whole.values.shape == (len(prompt) - 1, vocabulary)
            assert np.exp(whole.values.astype(np.float64)).sum(axis=1) == pytest.approx(1, abs=1e-4)
            likeliest = await client.score_by_json(prompt, 1, 20)
            monkeypatch.setattr("quantize.evaluate.client.WHOLE_VOCABULARY", 1)
            monkeypatch.setattr("quantize.evaluate.client.TOP", 20)
            by_route = await client.score_by_route(prompt, 1, vocabulary)
            monkeypatch.undo()
            assert likeliest.came.tolist() == whole.came.tolist() == by_route.came.tolist()
            for index in range(len(prompt) - 1):
                row = likeliest.row(index)
                assert row == by_route.row(index)
                assert row == {token: whole.row(index)[token] for token in row}
        for tokens, start, words in (
            ([1, 2], 2, "leaves none of 2 tokens"),
            ([1, 9999], 1, "out of vocabulary"),
            ([1] * 2000, 1, "maximum context length is 1024"),
        ):
            with pytest.raises(EngineError, match=words):
                await client.score_by_route(tokens, start, vocabulary)
