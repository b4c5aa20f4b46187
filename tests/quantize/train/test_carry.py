"""A variant of a base takes an adapter on itself, or says why it does not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deploy.engine import WITHOUT_ADAPTER, EngineSpec, command
from gateway.config import Engine
from quantize.card import Card, CardError
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.make.calibration import read_calibration
from quantize.make.smooth import folded
from quantize.make.variant import part_store
from quantize.register.carried import Carrying, refuse_carrier
from quantize.registry import Registry
from quantize.train.adapters import changes
from quantize.train.data import encode
from quantize.train.loop import Settings, TrainError
from quantize.train.merge import merge
from quantize.train.run import Job, run
from quantize.train.state import write_state
from tests.quantize.tiny import make_checkpoint
from tests.quantize.train.test_run import _items, _say

DATA = Path(__file__).resolve().parents[3] / "deploy/assistant/data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path, Checkpoint]:
    """A base, an adapter, and the base with that merged into it."""
    out = tmp_path_factory.mktemp("trained")
    base = open_checkpoint(make_checkpoint(out / "base", max_position_embeddings=512))
    return base, *_adapter(base, out, 2)


def _adapter(base: Checkpoint, out: Path, steps: int) -> tuple[Path, Checkpoint]:
    examples = encode(_items(0, 8), base, 64)
    place = out / f"run-{steps}"
    run(Job("lora", base, examples, examples, Settings(steps, 0.01), place, device="cpu"), _say)
    merge(base, place / "adapter", out / f"merged-{steps}")
    return place / "adapter", open_checkpoint(out / f"merged-{steps}")


def test_a_carried_adapter_is_in_the_variant_and_in_its_engines_command(
    trained: tuple[Checkpoint, Path, Checkpoint], tmp_path: Path
) -> None:
    base, adapter, merged = trained
    of_base, registry = Registry(tmp_path / "b", "base", "bf16"), Registry(tmp_path / "m", "intents", "bf16")
    carrier = of_base.add_reference(base)
    asked = Carrying(adapter, carrier, of_base.path("bf16", carrier.version), base, merged)
    registry.add_reference(merged)
    card = registry.carry("carried", asked)
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
        registry.carry("bf16", asked)
    with pytest.raises(TrainError, match="carries an adapter already"):
        registry.carry("twice", dataclasses.replace(asked, carrier=card, directory=place))
    other = of_base.add_reference(open_checkpoint(make_checkpoint(tmp_path / "other", seed=3)))
    directory = of_base.path("bf16", other.version)
    with pytest.raises(TrainError, match="was trained on another base"):
        registry.carry("other", dataclasses.replace(asked, carrier=other, directory=directory))
    with pytest.raises(TrainError, match="holds no adapter"):
        registry.carry("none", dataclasses.replace(asked, adapter=tmp_path / "nothing"))


def test_an_adapter_that_is_not_the_merged_one_or_not_of_the_base_is_refused(
    trained: tuple[Checkpoint, Path, Checkpoint], tmp_path: Path
) -> None:
    base, adapter, merged = trained
    of_base, registry = Registry(tmp_path / "b", "base", "bf16"), Registry(tmp_path / "m", "intents", "bf16")
    carrier = of_base.add_reference(base)
    asked = Carrying(adapter, carrier, of_base.path("bf16", carrier.version), base, merged)
    longer, _ = _adapter(base, tmp_path, 4)
    with pytest.raises(TrainError, match=r"is not .* merged into it: model\.layers\.0\..* differs"):
        registry.carry("longer", dataclasses.replace(asked, adapter=longer))
    foreign = tmp_path / "foreign"
    shutil.copytree(adapter, foreign)  # without its record
    wide = open_checkpoint(make_checkpoint(tmp_path / "wide", intermediate_size=384))
    with pytest.raises(TrainError, match="it is an adapter of another model"):
        registry.carry("wide", dataclasses.replace(asked, adapter=foreign, base=wide))
    damaged = shutil.copytree(adapter, tmp_path / "damaged") / "adapter_model.safetensors"
    write_state(damaged, {**load_file(damaged), "base_model.model.lm_head.lora_B.bias": torch.ones(4)}, {})
    with pytest.raises(TrainError, match=r"base_model\.model\.lm_head\.lora_B\.bias is not served or merged"):
        registry.carry("damaged", dataclasses.replace(asked, adapter=damaged.parent))
    assert not registry.variants()


def test_what_a_smoothed_variant_carries_is_scaled_as_its_channels(
    trained: tuple[Checkpoint, Path, Checkpoint], tmp_path: Path
) -> None:
    base, adapter, merged = trained
    of_base, registry = Registry(tmp_path / "b", "base", "bf16"), Registry(tmp_path / "m", "intents", "bf16")
    lines = (DATA / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "calibration.jsonl").write_text("".join(lines[:36]), encoding="utf-8")
    calibration, modules = read_calibration(tmp_path / "calibration.jsonl", base), read_modules(base)
    of_base.add_reference(base)
    carrier = of_base.add(base, "int8", uniform(modules, "w8a8", method="smooth+rtn"), calibration)
    store = part_store(of_base.directory, base, modules, calibration).smoothing
    scales = store.everything(modules.layers)
    asked = Carrying(adapter, carrier, of_base.path("int8", carrier.version), base, merged, scales)
    card = registry.carry("carried", asked)
    assert "is scaled as the channels" in card.notes[-1]
    place = registry.path("carried", card.version)
    before = {change.module: change.added() for change in changes(adapter)}
    changed = 0
    for change in changes(place / "adapter"):
        wanted = folded(f"{change.module}.weight", before[change.module], scales)
        assert torch.allclose(change.added(), wanted, rtol=1e-4, atol=1e-7)
        changed += not torch.allclose(change.added(), before[change.module], rtol=1e-2)
    assert changed == len(before), "a channel of every matrix is scaled"

    with pytest.raises(TrainError, match="its scales are no longer beside it"):
        registry.carry("gone", dataclasses.replace(asked, scales=None))
    with pytest.raises(TrainError, match="smoothed by other scales"):
        registry.carry("other", dataclasses.replace(asked, scales=_other(scales)))


def _other(scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: scale if name.endswith(("columns", "rows")) else scale * 3 for name, scale in scales.items()
    }


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"state": "broken"}, "is broken, the engine cannot load it"),
        ({"target": "llama.cpp"}, "is served by llama.cpp, to which no adapter is given"),
        ({"target": "onnxruntime"}, "is served by onnxruntime"),
        ({"method": "awq+rtn"}, r"by how much is not kept \(awq\)"),
        ({"method": "rotation+gptq"}, r"by how much is not kept \(rotation\)"),
        ({"methods": {"group": "smoothquant+gptq"}}, r"by how much is not kept \(smoothquant\)"),
        ({"method": "smooth+imatrix+gptq+qat"}, "its norms were trained after that"),
        ({"method": "unknown", "origin": "registered"}, r"by how much is not kept \(unknown\)"),
        ({"method": "awq", "origin": "registered"}, r"by how much is not kept \(awq\)"),
    ],
)
def test_a_variants_card_says_whether_it_takes_an_adapter(
    trained: tuple[Checkpoint, Path, Checkpoint], tmp_path: Path, what: dict[str, Any], said: str
) -> None:
    card = Registry(tmp_path / "b", "base", "bf16").add_reference(trained[0])
    refuse_carrier(card)
    takes = ("smooth+rtn", "smooth+imatrix+gptq", "imatrix+gptq+qat", "rtn")
    for method in takes:
        refuse_carrier(_changed(card, {"method": method}))
    refuse_carrier(_changed(card, {"method": "gptq", "origin": "registered"}))
    with pytest.raises(TrainError, match=said):
        refuse_carrier(_changed(card, what))


def _changed(card: Card, what: Mapping[str, Any]) -> Card:
    return card.model_copy(update=dict(what))
