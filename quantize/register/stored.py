"""The tensors of a quantized checkpoint: do they fit the base model, are they whole, what do they stand for.

Layouts of one (N outputs, K inputs) matrix at b bits, with 32 / b values to a word:

compressed-tensors  ``weight_packed`` (N, words of K), ``weight_scale`` (N, groups); or ``weight`` (N, K);
                    4-bit floats stand two to a byte, with a ``weight_global_scale`` for NVFP4
gptq                ``qweight`` (words of K, N), ``scales`` (groups, N), ``qzeros`` (groups, words of N)
awq                 ``qweight`` (K, words of N), the rest as gptq; within a word the columns stand in the
                    order 0 2 4 6 1 3 5 7
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.core.checkpoint import CheckpointError, Tensor, read_tensors
from quantize.core.modules import Linear, Modules
from quantize.core.schemes import BLOCK, Numbers, Scheme, scheme
from quantize.core.tensors import Part, read_parts
from quantize.register.formats import Prequantized

if TYPE_CHECKING:
    pass

FLOATS = {"F32", "F16", "BF16"}
CHUNK_BYTES = 1 << 26
SAME_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "head_dim",
)

Shape = tuple[int, ...]


def check_stored(directory: Path, base: Path, modules: Modules, found: Prequantized) -> tuple[str, ...]:
    """Compare the tensors in ``directory`` with the base checkpoint's and with ``found``.

    Returns what a person should know. Raises CheckpointError, naming the tensor, when one is missing, has
    another shape, or holds NaN or infinity.
    """
    stored, theirs = read_tensors(directory), read_tensors(base)
    for linear in modules.linears:
        _check_linear(directory, linear, scheme(found.schemes[linear.name]), found.layout, stored)
    linears = {f"{linear.name}.weight" for linear in modules.linears}
    for name, tensor in theirs.items():
        if name in linears or (name == "lm_head.weight" and name not in stored):
            continue  # a head that is not stored is the embedding
        if name not in stored:
            raise CheckpointError(f"{directory}: {name} is missing; the base model has it")
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {stored[name].shape}, the base model's has {tensor.shape}; "
                "register it with the model that it was made from"
            )
    refuse_not_finite(directory)
    return tuple(_notes(stored, found, modules))


def _notes(stored: Mapping[str, Tensor], found: Prequantized, modules: Modules) -> Iterator[str]:
    yield from found.notes
    wide = [name for name, tensor in stored.items() if tensor.dtype == "F32" and name.endswith(".weight")]
    if wide:
        yield f"{len(wide)} unquantized tensors are stored in 32 bits; an engine loads them in 16"
    if found.kv != "auto":
        scales = sum(name.endswith("k_scale") for name in stored)
        if scales < modules.layers:
            yield f"only {scales} of {modules.layers} layers have KV scales; engines take 1.0 for the others"


def _check_linear(
    directory: Path, linear: Linear, how: Scheme, layout: str, stored: Mapping[str, Tensor]
) -> None:
    prefix, n, k = linear.name + ".", linear.out_features, linear.in_features
    mine = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    wanted: dict[str, Shape] = {"weight": (n, k)}
    if how.weights is None:
        if mine.get("weight", Tensor("", (), 0)).dtype not in FLOATS:
            raise CheckpointError(f"{directory}: {linear.name} should be stored in 16 bits and is not")
    elif layout == "compressed-tensors":
        wanted = _compressed_shapes(how.weights, n, k, "weight_packed" in mine)
        if "weight_packed" not in mine and mine.get("weight", Tensor("F32", (), 0)).dtype in FLOATS:
            raise CheckpointError(
                f"{directory}: {linear.name} should be stored as {how.name} and is not quantized; "
                "save the checkpoint compressed"
            )
    else:
        wanted = _integer_shapes(how.weights, n, k, layout)
    for suffix, shape in wanted.items():
        if suffix not in mine:
            raise CheckpointError(f"{directory}: {prefix}{suffix} is missing; {how.name} needs it")
        if _plain(mine[suffix].shape) != _plain(shape):
            raise CheckpointError(
                f"{directory}: {prefix}{suffix} has shape {mine[suffix].shape}, a {how.name} matrix of "
                f"{n} x {k} has {shape}; register it with the model that it was made from"
            )


def _plain(shape: Shape) -> Shape:
    """Without dimensions of size 1, which writers add and leave out."""
    return tuple(size for size in shape if size != 1)


def _groups(w: Numbers, k: int) -> int:
    return -(-k // w.group_size) if w.group_size else 1


def _compressed_shapes(w: Numbers, n: int, k: int, packed: bool) -> dict[str, Shape]:
    scales: dict[str, Shape] = {
        "tensor": (1,),
        "channel": (n, 1),
        "block": (-(-n // BLOCK), -(-k // BLOCK)),
        "group": (n, _groups(w, k)),
        "tensor_group": (n, _groups(w, k)),
    }
    made: dict[str, Shape] = {"weight_scale": scales[w.strategy]}
    if not packed:
        return made | {"weight": (n, k)}
    return made | {"weight_packed": (n, k // 2 if w.kind == "float" else -(-k // (32 // w.bits)))}


def _integer_shapes(w: Numbers, n: int, k: int, layout: str) -> dict[str, Shape]:
    groups = _groups(w, k)
    packed = (k, n * w.bits // 32) if layout == "awq" else (k * w.bits // 32, n)
    return {"qweight": packed, "scales": (groups, n), "qzeros": (groups, n * w.bits // 32)}


def refuse_not_finite(directory: Path) -> None:
    """Raise CheckpointError when a scale, or any other 8-, 16- or 32-bit float, is NaN or infinite."""
    for name, part in read_parts(directory).items():
        if not _finite(part):
            raise CheckpointError(f"{directory}: {name} holds NaN or infinity; the checkpoint is damaged")


def _finite(part: Part) -> bool:
    """By the bits of the exponent, so that bfloat16 and FP8 need no conversion."""
    import numpy as np

    kinds = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
    if part.dtype == "F8_E4M3":  # has no infinity; NaN is all ones
        kind, mask = "u1", 0x7F
    elif part.dtype in kinds:
        kind, mask = kinds[part.dtype]
    else:
        return True
    with part.file.open("rb") as file:
        file.seek(part.offset)
        left = part.bytes
        while left:
            block = np.frombuffer(file.read(min(left, CHUNK_BYTES)), dtype=kind)
            if bool(((block & mask) == mask).any()):
                return False
            left -= block.nbytes
    return True
