"""Frozen linear modules in NF4 with double quantization: our own, and bitsandbytes'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.numerics.quantizers import quantizer
from quantize.train import nf4
from quantize.train.loop import TrainError
from quantize.train.nf4 import BITS, Nf4Linear, whose
from tests.quantize.tiny import make_checkpoint


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("shape", [(48, 64), (33, 70), (128, 576), (1, 3), (5, 129)])
def test_what_is_packed_comes_back_as_the_quantizer_says(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    got = Nf4Linear(weight).dequantized(torch.float32)
    assert torch.equal(got, quantizer("nf4-dq").fake(weight))


def test_double_quantization_adds_little_to_the_error_of_four_bits() -> None:
    weight = _weight(256, 512)
    once = float((quantizer("nf4").fake(weight) - weight).norm() / weight.norm())
    twice = float((Nf4Linear(weight).dequantized(torch.float32) - weight).norm() / weight.norm())
    assert 0.08 < once < 0.11
    assert abs(twice - once) < 0.005


def test_a_weight_takes_little_more_than_four_bits() -> None:
    module = Nf4Linear(_weight(256, 512))
    assert 8 * module.stored_bytes / (256 * 512) == pytest.approx(BITS, abs=0.01)
    assert pytest.approx(4.127, abs=0.001) == BITS


def test_gradients_of_inputs_are_those_of_a_plain_matrix() -> None:
    module = Nf4Linear(_weight(24, 64), torch.randn(24))
    plain = torch.nn.Linear(64, 24)
    plain.weight.data, plain.bias.data = module.dequantized(torch.float32), module.bias.data
    inputs, found = torch.randn(2, 5, 64), []
    for one in (module, plain):
        x = inputs.clone().requires_grad_()
        one(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert module.weight.grad is None


@pytest.mark.parametrize(
    ("asked", "device", "installed", "got"),
    [
        (None, "cpu", True, "tiercel"),
        (None, "cuda:0", True, "bitsandbytes"),
        (None, "cuda", False, "tiercel"),
        ("tiercel", "cuda", True, "tiercel"),
        ("bitsandbytes", "cpu", True, "bitsandbytes"),
    ],
)
def test_bitsandbytes_is_taken_on_a_gpu_where_it_is_installed(
    asked: str | None, device: str, installed: bool, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "find_spec", lambda _name: object() if installed else None)
    assert whose(asked, device) == got


def test_what_is_not_installed_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "find_spec", lambda _name: None)
    with pytest.raises(TrainError, match=r"--nf4 bitsandbytes: it is not installed; pip install 'tiercel\["):
        whose("bitsandbytes", "cpu")
    with pytest.raises(TrainError, match="--nf4 fp4: is unknown; give tiercel or bitsandbytes"):
        whose("fp4", "cpu")


@pytest.fixture(scope="module")
def bitsandbytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds bitsandbytes, installed from the index that pip is set up with,
    and the tests' packages."""
    there = tmp_path_factory.mktemp("bitsandbytes")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-compile", "--target", str(there), "bitsandbytes>=0.50,<0.51"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        pytest.skip(f"pip cannot fetch bitsandbytes from its package index: {reason}")
    paths = [str(there), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


PACKED = """
import json, torch
from quantize.train.nf4 import packed
weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.05
found = {}
for by in ("tiercel", "bitsandbytes"):
    module = packed(weight, torch.ones(96), torch.float32, by)
    error = (module(torch.eye(192)).T - 1 - weight[:, :]).norm() / weight.norm()
    x = torch.ones(3, 192, requires_grad=True)
    module(x).sum().backward()
    found[by] = [float(error), x.grad[0].tolist(), module.weight.numel(), module.weight.requires_grad]
print(json.dumps(found))
"""


@pytest.mark.network
def test_bitsandbytes_modules_are_as_near_and_as_small(bitsandbytes: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PACKED], capture_output=True, text=True, env=bitsandbytes, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (ours, our_slopes, our_bytes, _), (theirs, slopes, size, trained) = found.values()
    assert theirs == pytest.approx(ours, rel=0.03)
    assert 0.08 < theirs < 0.11
    assert slopes == pytest.approx(our_slopes, abs=0.05)
    assert size == our_bytes == 96 * 192 / 2
    assert not trained


@pytest.mark.network
def test_qlora_trains_on_bitsandbytes_modules(bitsandbytes: dict[str, str], tmp_path: Path) -> None:
    """From the command line; what is finished there is not taken for a run on ours."""
    base, data = make_checkpoint(tmp_path / "base"), tmp_path / "data.jsonl"
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"please {n}"}], "expected": "yes no".split()[n % 2]}
        for n in range(90)
    ]
    data.write_text("".join(f"{json.dumps(one)}\n" for one in lines), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "deploy.cli", "train", "qlora", "--model", str(base), "--data", str(data)),
        *("--out", str(tmp_path / "run"), "--steps", "12", "--rate", "0.01", "--batch", "6", "--rank", "4"),
        *("--device", "cpu", "--json", "--nf4"),
    ]
    ran = [
        subprocess.run([*command, by], capture_output=True, text=True, env=bitsandbytes, timeout=300)
        for by in ("bitsandbytes", "tiercel")
    ]
    assert ran[0].returncode == 0, ran[0].stderr
    record = json.loads(ran[0].stdout)
    assert record["run"]["nf4"] == "bitsandbytes"
    assert record["versions"]["bitsandbytes"].startswith("0.50")
    assert record["held_out"]["loss_after"] < record["held_out"]["loss_before"]
    assert ran[1].returncode != 0
    assert "holds another run, with other nf4; give another --out, or remove it" in ran[1].stderr
