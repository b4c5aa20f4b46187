"""Weights read from files agree with what compressed-tensors itself makes of them."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from quantize.core.dequantize import linear_weight
from quantize.core.schemes import scheme
from quantize.core.tensors import read_parts

N, K = 48, 128
FORMATS = {
    "w4a16-g32": "pack-quantized",
    "w8a16": "pack-quantized",
    "w8a8": "int-quantized",
    "fp8": "float-quantized",
    "fp8-dynamic": "float-quantized",
    "nvfp4a16": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


def scales(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ranges by the largest weight, as round-to-nearest takes them."""
    w = scheme(name).weights
    assert w is not None
    top = {"int": 2 ** (w.bits - 1) - 0.5, "float": 6.0 if w.bits == 4 else 448.0}[w.kind]
    if w.strategy == "tensor":
        return {"weight_scale": (weight.abs().max() / top).reshape(1)}
    groups = weight.reshape(N, -1, w.group_size or K).abs().amax(-1)
    if name == "mxfp4":
        return {"weight_scale": torch.exp2(torch.ceil(torch.log2(groups / top)))}
    if w.strategy == "tensor_group":
        whole = (6.0 * 448.0 / weight.abs().max()).reshape(1)
        return {
            "weight_global_scale": whole,
            "weight_scale": (groups / top * whole).to(torch.float8_e4m3fn).float(),
        }
    return {"weight_scale": groups / top}


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_comes_back_as_compressed_tensors_reads_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    how = scheme(name)
    assert how.weights is not None
    theirs = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**how.weights.arguments()))
    compressor = BaseCompressor.get_value_from_registry(FORMATS[name])
    stored = compressor.compress({"weight": weight, **scales(name, weight)}, theirs)
    tensors = {f"layer.{key}": value.detach().contiguous() for key, value in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = compressor.decompress(stored, theirs)["weight"].float()
    found = linear_weight(read_parts(tmp_path), "layer", how)
    assert found.shape == (N, K)
    exact = 0.005 if name == "nvfp4a16" else 1e-5  # compressed-tensors multiplies these in 16 bits
    torch.testing.assert_close(found, wanted, rtol=exact, atol=1e-6)
    error = float((found - weight).norm() / weight.norm())
    assert 0 < error < (0.2 if how.weights.bits == 4 else 0.05)
