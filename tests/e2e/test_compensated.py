"""A variant with an adapter that makes up for what quantization took from it, on the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from deploy.cli import main
from deploy.engine import WITHOUT_ADAPTER, EngineSpec, free_port, running
from deploy.engine_account import refuse_otherwise
from deploy.models import one_model, registry_of
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.client import EngineClient
from quantize.make.calibration import read_calibration
from tests.deploy.test_supervisor import ROOT
from tests.e2e.test_carried import _by_torch

pytestmark = pytest.mark.engine

DATA = ROOT / "deploy/assistant/data"


async def _said(client: EngineClient, name: str, tokens: list[int]) -> NDArray[np.float64]:
    """Log-probabilities of tokens, from the second one on."""
    body = {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    rows = (await client._post("/v1/completions", body))["choices"][0]["prompt_logprobs"]
    pairs = zip(rows[1:], tokens[1:], strict=True)
    return np.array([row[str(token)]["logprob"] for row, token in pairs])


async def test_an_adapter_brings_a_rough_variant_nearer_to_its_reference(tmp_path: Path) -> None:
    whole, calibration = ROOT / "deploy/assistant/model", DATA / "calibration.jsonl"
    model = {"path": str(whole), "serve": ["bf16"], "calibration": str(calibration)}
    written = {
        "models": {"whole": model},
        "variants_dir": "variants",
        "roles": {"specialist": {"tasks": str(DATA / "core.jsonl")}},
        "default_role": "specialist",
    }
    (tmp_path / "tiercel.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    given = ["--no-evaluate", "--config", str(tmp_path / "tiercel.yaml")]
    main(["quantize", "make", "--scheme", "w4a16", "--method", "rtn", "--name", "rough", *given])
    main(["train", "compensate", "rough", "--rank", "32", *given])
    registry = registry_of(load_config(tmp_path / "tiercel.yaml").of("whole"))
    card = registry.card("rough-r32")
    tokens = read_calibration(calibration, open_checkpoint(whole)).sequences[0]
    wanted = _by_torch(open_checkpoint(whole), tokens)
    settings = one_model(load_config(ROOT / "tiercel.yaml")).engine
    spec = EngineSpec(
        card, registry.path(card.variant, card.version), settings, free_port("127.0.0.1"), tmp_path / "log"
    )
    async with running(spec, print) as engine, EngineClient(spec.url, card.model) as client:
        assert await refuse_otherwise(engine) is not None
        names = (card.model, f"{card.model}{WITHOUT_ADAPTER}")
        said = [await _said(client, name, tokens) for name in names]
    with_adapter, without = (float(np.abs(one - wanted).mean()) for one in said)
    assert with_adapter < 0.8 * without
