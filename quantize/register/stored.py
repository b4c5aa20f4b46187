"""The tensors of a quantized checkpoint: do they fit the base model, are they whole, whole.

The layouts are those of :mod:`quantize.core.dequantize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from quantize.core.checkpoint import Checkpoint
from quantize.core.modules import Linear, Modules
from quantize.core.schemes import BLOCK, Numbers, Scheme, scheme
from quantize.core.tensors import read_parts, refuse_not_finite, same_bytes
from quantize.core.weights import CheckpointError, Tensor, read_tensors
from quantize.register.formats import Prequantized

FLOATS = {"F32", "F16", "BF16"}
HEAD = "lm_head.weight"
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


def check_stored(
    directory: Path, base: Checkpoint, modules: Modules, found: Prequantized, tied: bool | None = None
) -> tuple[str, ...]:
    """Compare the tensors in ``directory`` with the base checkpoint's and with ``found``.

    ``tied`` is what the configuration in ``directory`` says of head and embeddings, if it says anything.
    Returns what a person should know. Raises CheckpointError, naming the tensor, when one is missing, has
    another shape, or holds NaN or infinity.
    """
    stored, theirs = read_tensors(directory), base.tensors
    for linear in modules.linears:
        _check_linear(directory, linear, scheme(found.schemes[linear.name]), found.layout, stored)
    linears = {f"{linear.name}.weight" for linear in modules.linears}
    for name, tensor in theirs.items():
        if name in linears:
            continue
        if name == HEAD and name not in stored and tied is not False and _is_embedding(base):
            continue
        if name not in stored:
            raise CheckpointError(f"{directory}: {name} is missing; the base model has it")
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {stored[name].shape}, the base model's has {tensor.shape}; "
                "register it with the model that it was made from"
            )
    if tied is False and HEAD not in stored and not any(name.startswith("lm_head.") for name in stored):
        raise CheckpointError(
            f"{directory}: config.json does not tie the output head to the embeddings, and no {HEAD} is "
            "stored; save the checkpoint again with its head"
        )
    refuse_not_finite(directory)
    return tuple(_notes(stored, found, modules, theirs))


def _is_embedding(base: Checkpoint) -> bool:
    """Whether the base model's head is its embedding, stored a second time."""
    parts = read_parts(base.path)
    return any(
        name.endswith("embed_tokens.weight") and same_bytes(parts[HEAD], parts[name]) for name in parts
    )


def _notes(
    stored: Mapping[str, Tensor], found: Prequantized, modules: Modules, theirs: Mapping[str, Tensor]
) -> Iterator[str]:
    yield from found.notes
    quantized = {linear.name for linear in modules.linears}
    more = [name for name in stored if name not in theirs and name.rpartition(".")[0] not in quantized]
    if more := [name for name in more if not name.endswith(("_scale", "_zero_point"))]:
        yield f"{len(more)} tensors are not the base model's: {', '.join(more[:3])}"
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
