"""A plan computed in torch, whatever transformers makes of the model's matrices."""

import random
from pathlib import Path

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.core.loading import load_model
from quantize.core.modules import read_modules
from quantize.core.schemes import scheme
from quantize.core.targets import TARGETS
from quantize.make.blocks import Blocks
from quantize.make.parts import PartStore
from quantize.plan.simulated import SimulatedModel
from quantize.plan.tune import untunable
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
    assert model.divergence(reference) == 0


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


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gemma3", "phi3"])
def test_block_by_block_is_the_whole_model(tmp_path: Path, architecture: str) -> None:
    """The hidden states after all blocks, one in memory at a time, are those that transformers computes."""
    import torch

    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", architecture))
    blocks = Blocks(checkpoint, read_modules(checkpoint), device="cpu", dtype=torch.float32)
    tokens = [random.Random(0).randrange(8, VOCABULARY) for _ in range(40)]
    states = blocks.start([tokens])
    for layer in range(len(blocks)):
        with blocks.loaded(layer, torch.float32):
            blocks.forward(layer, states)
    with torch.inference_mode():
        decoder = load_model(checkpoint, torch.float32).get_decoder()
        expected = decoder(torch.tensor([tokens]), use_cache=False).last_hidden_state
        torch.testing.assert_close(blocks.decoder.norm(states.batches[0].hidden), expected)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("llama", ""), ("mixtral", "with experts"), ("qwen3_moe", "with experts"), ("gemma3", "with images")],
)
def test_what_cannot_be_tuned_is_said_before_work(tmp_path: Path, architecture: str, said: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", architecture))
    found = untunable(checkpoint, read_modules(checkpoint))
    assert said in found
    assert bool(said) == bool(found)
