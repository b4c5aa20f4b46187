"""Tensors of a quantized linear module as they are stored, in compressed-tensors' formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.core.schemes import Scheme
from quantize.make.ranges import Grid
from quantize.numerics.formats import E4M3

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stored_tensors(
    q: Tensor, grid: Grid, how: Scheme, largest: float | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """By name within the module: ``q`` (N, K) on its ``grid``, scales in ``dtype``, on the processor.

    Integer weights with 16-bit inputs are packed into 32-bit words (``weight_packed``), others stand as they
    are (``weight``). ``largest`` |x| of the inputs is needed where their scale is fixed.
    """
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    w = how.weights
    assert w is not None
    scale = grid.scale
    if w.strategy == "tensor":
        scale = scale[:1, 0]
    elif w.strategy == "block":
        scale = scale[::128]
    found = {"weight_scale": scale.to(dtype)}
    if w.kind == "int" and how.activations is None:
        found["weight_packed"] = pack_to_int32(q.cpu(), w.bits)
        found["weight_shape"] = torch.tensor(q.shape)
        if grid.zero is not None:
            found["weight_zero_point"] = pack_to_int32(grid.zero.to(torch.int8).cpu(), w.bits, packed_dim=0)
    else:
        found["weight"] = q
        if grid.zero is not None:
            found["weight_zero_point"] = grid.zero.to(torch.int8)
    if how.activations is not None and how.activations.dynamic is not True:
        if largest is None:
            raise ValueError(f"{how.name} has a fixed scale of inputs, which needs calibration data")
        top = E4M3.top if how.activations.kind == "float" else (2**how.activations.bits - 1) / 2
        found["input_scale"] = torch.tensor([max(largest / top, 1e-9)]).to(dtype)
    return {name: tensor.contiguous().cpu() for name, tensor in found.items()}
