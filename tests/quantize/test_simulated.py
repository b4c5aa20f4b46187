"""A plan computed in torch, whatever transformers makes of the model's matrices."""

import random
from pathlib import Path

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.schemes import scheme
from quantize.core.targets import TARGETS
from quantize.make.parts import PartStore
from quantize.plan.simulated import SimulatedModel, mean_kl
from tests.quantize.tiny import VOCABULARY, make_checkpoint


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_moe", "gemma3", "phi3"])
def test_every_group_can_be_swapped_and_put_back(tmp_path: Path, architecture: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", architecture, initializer_range=0.1))
    modules, rng = read_modules(checkpoint), random.Random(0)
    spans = [([rng.randrange(8, VOCABULARY) for _ in range(40)], 1) for _ in range(2)]
    model = SimulatedModel(PartStore(tmp_path / "parts", checkpoint, modules, None), spans)
    reference = model.log_probabilities()
    losses = {}
    for name in ("w4a16-g32", "w8a8"):
        for group in modules:
            losses[group.name, name] = model.kl({group.name: (name, "rtn")}, reference)
        assert model.kl({group.name: (name, "rtn") for group in modules}, reference) > 0
    assert all(loss > 0 for loss in losses.values())
    assert mean_kl(reference, model.log_probabilities()) == 0


def test_every_candidate_on_every_target_can_be_computed(tmp_path: Path) -> None:
    """A plan is made of candidates, and each is turned back into numbers."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "mixtral"))
    modules = read_modules(checkpoint)
    model = SimulatedModel(PartStore(tmp_path / "parts", checkpoint, modules, None), [(range(8, 40), 1)])
    for target in TARGETS.values():
        for group in modules.groups[:3]:
            for name in target.candidates(group):
                if scheme(name).weights and not scheme(name).needs_calibration:
                    for member, weight in zip(group.members, model.weights(group, name, "rtn"), strict=True):
                        assert weight.shape == (member.out_features, member.in_features), (target.name, name)
