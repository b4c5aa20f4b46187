"""Writes a checkpoint as GGUF of 16-bit floats, a tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.files import NoRoomError
from quantize.core.tensors import Part, read_parts, read_values, same_bytes
from quantize.export.architectures import (
    Architecture,
    add_settings,
    architecture_of,
    change_of,
    rope_factors,
)
from quantize.export.types import FLOATS, ExportError
from quantize.export.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
SUFFIXES = (".weight", ".bias")
LEFT_OUT = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that are computed anew."""
MARGIN_BYTES = 64 << 20
"""Beside tensors: vocabulary, padding."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be written: everything is looked at before any work."""

    checkpoint: Checkpoint
    architecture: Architecture
    vocabulary: Vocabulary
    names: dict[str, str]
    """llama.cpp's name of each tensor to the checkpoint's."""


def examine(checkpoint: Checkpoint) -> Source:
    """Raises ExportError for what llama.cpp does not have, or computes otherwise."""
    found = architecture_of(checkpoint)
    names = _names(checkpoint, found)
    return Source(checkpoint, found, read_vocabulary(checkpoint, found.name), names)


def _names(checkpoint: Checkpoint, found: Architecture) -> dict[str, str]:
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    known = gguf.get_tensor_name_map(kind, int(checkpoint.text_config["num_hidden_layers"]))
    parts, made = read_parts(checkpoint.path), dict[str, str]()
    for name in sorted(parts):
        if name.endswith(LEFT_OUT):
            continue
        if name == HEAD and EMBEDDINGS in parts and same_bytes(parts[HEAD], parts[EMBEDDINGS]):
            continue  # llama.cpp takes the embeddings where there is no head
        new = known.get_name(name, try_suffixes=SUFFIXES)
        lost = name.endswith(".bias") and name.split(".")[-2] not in found.biases
        if new is None or lost:
            raise ExportError(
                f"{checkpoint.path}: {name} has no place in llama.cpp's {found.name}; serve it with vLLM"
            )
        made[new] = name
    return made


def write_floats(source: Source, path: Path, kind: str, step: Callable[[int], object]) -> None:
    """Write ``source`` to ``path`` as ``f16`` or ``bf16``; vectors are 32 bits, as llama.cpp computes them.

    ``step`` is told the bytes of each tensor when it is written. Raises ExportError for a value beyond the
    range of 16-bit floats, and NoRoomError.
    """
    import gguf

    if kind not in FLOATS:
        raise ValueError(f"floats are written as {' or '.join(FLOATS)}, not as {kind}")
    checkpoint, parts = source.checkpoint, read_parts(source.checkpoint.path)
    room_for(path, sum(part.bytes for part in parts.values()))
    writer = gguf.GGUFWriter(path, source.architecture.name)
    writer.add_name(checkpoint.path.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, checkpoint, source.architecture)
    source.vocabulary.write(writer)
    factors = rope_factors(checkpoint)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, "f32")
    for new, name in source.names.items():
        shape = parts[name].shape
        _announce(writer, new, shape, kind if len(shape) > 1 else "f32")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for values in _values(source, parts, kind):
            writer.write_tensor_data(values)
            step(values.nbytes)
    finally:
        writer.close()


def room_for(path: Path, size: int) -> None:
    """Raises NoRoomError where a file of about ``size`` bytes does not fit beside what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = size + MARGIN_BYTES - shutil.disk_usage(path.parent).free
    if missing > 0:
        raise NoRoomError(path, missing)


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    import numpy as np
    from gguf.constants import GGMLQuantizationType

    size = 4 if kind == "f32" else 2
    count = int(np.prod(shape))
    dtype = np.dtype("float32" if kind == "f32" else "float16")
    writer.add_tensor_info(name, shape, dtype, count * size, GGMLQuantizationType[kind.upper()])


def _values(source: Source, parts: dict[str, Part], kind: str) -> Iterator[NDArray[Any]]:
    import numpy as np

    for name in source.names.values():
        change = change_of(name, source.checkpoint, source.architecture)
        values: NDArray[np.float32] = read_values(parts[name])
        if change is not None:
            values = np.ascontiguousarray(change(values))
        yield _stored(values, kind if values.ndim > 1 else "f32", source.checkpoint.path / name)


def _stored(values: NDArray[np.float32], kind: str, where: Path) -> NDArray[Any]:
    import numpy as np

    if kind == "f32":
        return values
    if kind == "f16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not bool(np.isfinite(half).all()):
            raise ExportError(f"{where} has values beyond the range of 16-bit floats; take --type bf16")
        return half
    bits = values.view("<u4")
    rounded: NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded
