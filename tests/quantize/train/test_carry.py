"""A variant of a base takes an adapter on itself, or says why it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.engine import WITHOUT_ADAPTER, EngineSpec, command
from gateway.config import Engine
from quantize.card import CardError
from quantize.core.checkpoint import open_checkpoint
from quantize.registry import Registry
from quantize.train.data import encode
from quantize.train.loop import Settings, TrainError
from quantize.train.merge import merge
from quantize.train.run import Job, run
from tests.quantize.tiny import make_checkpoint
from tests.quantize.train.test_run import _items, _say


def test_a_carried_adapter_is_in_the_variant_and_in_its_engines_command(tmp_path: Path) -> None:
    base = open_checkpoint(make_checkpoint(tmp_path / "base"))
    examples = encode(_items(0, 8), base, 64)
    run(Job("lora", base, examples, examples, Settings(2, 0.01), tmp_path / "run", device="cpu"), _say)
    adapter = tmp_path / "run" / "adapter"
    merge(base, adapter, tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    of_base, registry = Registry(tmp_path / "b", "base", "bf16"), Registry(tmp_path / "m", "intents", "bf16")
    carrier = of_base.add_reference(base)
    directory = of_base.path("bf16", carrier.version)
    registry.add_reference(merged)
    card = registry.carry(merged, "carried", carrier, directory, adapter)
    assert card.adapter is not None
    assert (card.adapter.rank, card.adapter.carrier) == (16, f"base:bf16@{carrier.version}")
    assert card.weight_bytes == carrier.weight_bytes + card.adapter.bytes
    place = registry.path("carried", card.version)
    assert registry.card("carried").files.keys() == {
        *carrier.files,
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    given = command(EngineSpec(card, place, Engine(python=Path("python")), 1, tmp_path / "log"))
    assert given[given.index("--served-model-name") + 1] == f"intents{WITHOUT_ADAPTER}"
    assert given[given.index("--lora-modules") + 1] == f"intents={place / 'adapter'}"

    with pytest.raises(CardError, match="'bf16' is the reference's name"):
        registry.carry(merged, "bf16", carrier, directory, adapter)
    with pytest.raises(TrainError, match="carries an adapter already"):
        registry.carry(merged, "twice", card, place, adapter)
    other = of_base.add_reference(open_checkpoint(make_checkpoint(tmp_path / "other", seed=3)))
    with pytest.raises(TrainError, match="was trained on another base"):
        registry.carry(merged, "other", other, of_base.path("bf16", other.version), adapter)
    shutil.rmtree(adapter)
    with pytest.raises(TrainError, match="holds no adapter"):
        registry.carry(merged, "none", carrier, directory, adapter)
