"""Tensors that are written from others: in another type, whole or not at all."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.core.checkpoint import CheckpointError
from quantize.core.tensors import COPY_BYTES, is_finite, read_parts, same_bytes, write_tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """More than a block of random bit patterns, NaN and infinity among them set to 1."""
    torch.manual_seed(0)
    count = COPY_BYTES // 4 + 7
    wide = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32).view(torch.float32)
    wide = torch.where(torch.isfinite(wide), wide, 1.0)
    small = torch.randn(1000)
    path = tmp_path / "source"
    path.mkdir()
    save_file(
        {"wide": wide, "small": small, "half": small.half(), "ids": torch.arange(5)},
        path / "model.safetensors",
    )
    return path


def test_types_are_rounded_as_torch_rounds_them(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write_tensors(read_parts(source), out, {"wide": "BF16", "small": "F16", "half": "BF16"})
    before, after = load_file(source / "model.safetensors"), load_file(out)
    for name, dtype in (("wide", torch.bfloat16), ("small", torch.float16), ("half", torch.bfloat16)):
        assert after[name].dtype == dtype
        torch.testing.assert_close(after[name], before[name].to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(after["ids"], before["ids"])


def test_a_value_beyond_float16_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="wide has values beyond the range of float16; set dtype"):
        write_tensors(read_parts(source), tmp_path / "out.safetensors", {"wide": "F16"})
    assert not list(tmp_path.glob("out*"))


def test_parts_are_compared_and_searched_block_by_block(tmp_path: Path) -> None:
    ones = torch.ones(COPY_BYTES // 4 + 3)
    other, damaged = ones.clone(), ones.clone()
    other[-1], damaged[-1] = 2, float("inf")
    eight = torch.full((4,), float("nan")).to(torch.float8_e4m3fn)
    save_file(
        {"a": ones, "b": ones.clone(), "c": other, "d": damaged, "e": eight}, tmp_path / "model.safetensors"
    )
    parts = read_parts(tmp_path)
    assert same_bytes(parts["a"], parts["b"])
    assert not same_bytes(parts["a"], parts["c"])
    assert [name for name in parts if not is_finite(parts[name])] == ["d", "e"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_full_disk_leaves_nothing_half_written(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            write_tensors(read_parts(source), disk / "model.safetensors")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
