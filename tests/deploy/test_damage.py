"""Harm on purpose: a copy is harmed, and the original is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.damage import damaged


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    directory = tmp_path / "variant"
    directory.mkdir()
    words = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)
    save_file(
        {
            "model.layers.0.mlp.up_proj.weight_packed": words,
            "model.layers.1.mlp.up_proj.weight_packed": words.clone(),
            "model.layers.0.self_attn.k_scale": torch.tensor([0.5]),
        },
        directory / "model.safetensors",
    )
    (directory / "chat_template.jinja").write_text("{{ bos_token }}")
    for path in directory.iterdir():
        path.chmod(0o444)
    return directory


def nibbles(word: int) -> list[int]:
    return [word >> 4 * place & 0xF for place in range(8)]


def test_four_values_are_left_of_sixteen(variant: Path, tmp_path: Path) -> None:
    harmed = load_file(damaged(variant, tmp_path / "out", "two-bits") / "model.safetensors")
    before = load_file(variant / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    for old, new in zip(before[name].flatten().tolist(), harmed[name].flatten().tolist(), strict=True):
        assert set(nibbles(new)) <= {2, 6, 10, 14}
        assert all(abs(a - b) <= 2 for a, b in zip(nibbles(old), nibbles(new), strict=True))
    assert torch.equal(harmed["model.layers.0.self_attn.k_scale"], before["model.layers.0.self_attn.k_scale"])


def test_one_layer_alone(variant: Path, tmp_path: Path) -> None:
    harmed = load_file(damaged(variant, tmp_path / "out", "two-bits-in-one-layer") / "model.safetensors")
    before = load_file(variant / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], harmed[name])}
    assert set(before) - same == {"model.layers.0.mlp.up_proj.weight_packed"}


def test_scales_and_template(variant: Path, tmp_path: Path) -> None:
    harmed = load_file(damaged(variant, tmp_path / "out", "kv-scales") / "model.safetensors")
    assert harmed["model.layers.0.self_attn.k_scale"].item() < 0.01
    out = damaged(variant, tmp_path / "out", "chat-template")
    assert "assistant: " in (out / "chat_template.jinja").read_text()
    assert (variant / "chat_template.jinja").read_text() == "{{ bos_token }}"


def test_harm_without_effect_is_refused(variant: Path, tmp_path: Path) -> None:
    (variant / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="nothing was harmed"):
        damaged(variant, tmp_path / "out", "two-bits")
