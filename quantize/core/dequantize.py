"""What the stored numbers of a module stand for, in any of the layouts that are read here.

Layouts of one (N outputs, K inputs) matrix at b bits, in words of 32 bits:

compressed-tensors  ``weight_packed`` (N, words of K), ``weight_scale`` (N, groups); or ``weight`` (N, K);
                    4-bit floats stand two to a byte, with a ``weight_global_scale`` for NVFP4
gptq                ``qweight`` (words of K, N), ``scales`` (groups, N), ``qzeros`` (groups, words of N)
awq                 ``qweight`` (K, words of N), the rest as gptq; within a word the columns stand in the
                    order 0 2 4 6 1 3 5 7
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantize.core.checkpoint import CheckpointError
from quantize.core.schemes import BLOCK, Numbers, Scheme
from quantize.core.tensors import Part

if TYPE_CHECKING:
    from torch import Tensor

PACKED_BITS = 32


def read_tensor(part: Part) -> Tensor:
    """One tensor from disk, as stored."""
    import numpy as np
    import torch

    kinds = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "I32": torch.int32,
        "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn,
    }
    with part.file.open("rb") as file:
        file.seek(part.offset)
        raw = np.frombuffer(bytearray(file.read(part.bytes)), dtype=np.uint8)
    tensor: Tensor = torch.from_numpy(raw).view(kinds[part.dtype]).reshape(part.shape)
    return tensor


def dequantized(tensors: Mapping[str, Part], module: str, how: Scheme) -> Tensor:
    """The float32 (N, K) weight that a module of a compressed-tensors checkpoint stands for."""
    import torch

    if how.weights is None:
        return read_tensor(tensors[f"{module}.weight"]).float()
    part = {
        name: read_tensor(tensors[f"{module}.{name}"])
        for name in ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        if f"{module}.{name}" in tensors
    }
    w, scale = how.weights, part["weight_scale"].float()
    if "weight_packed" in part:
        if w.kind != "int":
            raise NotImplementedError(f"{how.name}: packed floats are not read here")
        n, k = (int(size) for size in part["weight_shape"])
        values = unpack(part["weight_packed"], w.bits, k)
    else:
        values = part["weight"].float()
        n, k = values.shape
    zero = part.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack(zero.T, w.bits, n).T
    if w.strategy == "block":
        scale = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    elif scale.ndim == 2 and scale.shape[1] > 1:
        repeats = -(-k // scale.shape[1])
        scale = scale.repeat_interleave(repeats, 1)[:, :k]
        zero = zero.repeat_interleave(repeats, 1)[:, :k] if zero is not None else None
    if zero is not None and not w.symmetric:
        values = values - zero.float()
    weight: Tensor = values * scale
    return weight


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """compressed-tensors' packing undone: int32 (rows, words) to signed values (rows, columns), float32.

    Values stand one after another, lowest bits first, across the ends of words as well (3, 5, 6 and 7 bits),
    stored with an offset of 2^(bits - 1).
    """
    import torch

    if PACKED_BITS % bits == 0:
        shifts = torch.arange(0, PACKED_BITS, bits, dtype=torch.int32)
        values = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    else:
        words = torch.nn.functional.pad(packed.long() & 0xFFFFFFFF, (0, 1))
        start = torch.arange(columns) * bits
        word, shift = start // PACKED_BITS, start % PACKED_BITS
        both = words[:, word] | (words[:, word + 1] << PACKED_BITS)
        values = (both >> shift) & (2**bits - 1)
    signed: Tensor = values.reshape(packed.shape[0], -1)[:, :columns] - 2 ** (bits - 1)
    return signed.float()


AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a 4-bit float stand for; the highest bit is the sign."""


def linear_weight(tensors: Mapping[str, Part], module: str, how: Scheme) -> Tensor:
    """The float32 (N, K) weight that a module stands for, in any of the layouts above."""
    if f"{module}.qweight" not in tensors:
        four_bit_float = how.weights is not None and how.weights.kind == "float" and how.weights.bits == 4
        return _float_weight(tensors, module) if four_bit_float else dequantized(tensors, module, how)
    if how.weights is None:
        raise CheckpointError(f"{module} is packed, but its scheme is {how.name}")
    part = {
        name: read_tensor(tensors[f"{module}.{name}"])
        for name in ("qweight", "qzeros", "scales", "g_idx")
        if f"{module}.{name}" in tensors
    }
    awq = part["qweight"].shape[1] < part["scales"].shape[1]
    return _integer_weight(part, how.weights, awq)


def _float_weight(tensors: Mapping[str, Part], module: str) -> Tensor:
    """4-bit floats (E2M1), two to a byte, the first in the lower half.

    A block's scale is E4M3 over one scale of the whole tensor (NVFP4), or a power of two stored as its
    exponent plus 127 (OCP Microscaling Formats 1.0, MXFP4).
    """
    import torch

    packed = read_tensor(tensors[f"{module}.weight_packed"])
    halves = torch.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1).long()
    values = torch.tensor(E2M1)[halves & 7] * (1 - 2 * (halves >> 3))
    scale = read_tensor(tensors[f"{module}.weight_scale"])
    if scale.dtype == torch.uint8:
        scales = torch.exp2(scale.float() - 127)
    else:
        scales = scale.float() / read_tensor(tensors[f"{module}.weight_global_scale"]).float()
    weight: Tensor = values * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)
    return weight


def _integer_weight(part: Mapping[str, Tensor], w: Numbers, awq: bool) -> Tensor:
    """(q - zero) x scale. GPTQ's files hold the zero point less one."""
    import torch

    bits, scales = w.bits, part["scales"].float()
    groups = scales.shape[0]
    zeros = _words(part["qzeros"], bits, awq)
    zeros = zeros if awq else (zeros + 1) & (2**bits - 1)
    if w.symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    values = _words(part["qweight"], bits, True) if awq else _words(part["qweight"].T, bits, False).T
    k = values.shape[0]
    index = part["g_idx"].long() if "g_idx" in part else torch.arange(k) // -(-k // groups)
    weight: Tensor = ((values - zeros[index]).float() * scales[index]).T
    return weight


def _words(packed: Tensor, bits: int, awq: bool) -> Tensor:
    """int32 (rows, words) to unsigned values (rows, words x 32 / bits)."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    if awq:
        place = torch.tensor(AWQ_COLUMNS)
        values = values[..., torch.argsort(place)]
    rows: Tensor = values.reshape(packed.shape[0], -1)
    return rows
