"""A checkpoint as a GGUF file: written in 16 bits, then quantized by llama.cpp itself.

>>> made = export_gguf(examine(open_checkpoint(path)), "q4_k_m", Path("model-q4_k_m.gguf"))
>>> made.file.weight_bytes, made.kinds
(105447168, {'Q5_0': 120, 'Q6_K': 30, …})
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quantize.core.files import writing
from quantize.core.tensors import read_parts
from quantize.core.tokenizer import load_tokenizer
from quantize.export.gguf_file import GgufFile, read_gguf
from quantize.export.gguf_write import Source, examine, room_for, write_floats
from quantize.export.llama import LlamaModel, library
from quantize.export.types import FLOATS, ExportError, ExportType, export_type
from quantize.export.vocabulary import other_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Exported", "examine", "export_gguf", "quantize_gguf", "refuse_other_vocabulary"]

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
"""What llama.cpp says when it begins with a tensor."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: GgufFile
    type: ExportType
    importance: bool
    """Whether ranges were weighted by E[x²] of inputs."""
    build: str
    """llama.cpp's, such as ``b11739``."""

    @property
    def kinds(self) -> dict[str, int]:
        """llama.cpp's type to the matrices that have it."""
        matrices = [one.type for one in self.file.tensors.values() if len(one.shape) > 1]
        return dict(Counter(matrices).most_common())


def export_gguf(
    source: Source,
    kind: str,
    path: Path,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    threads: int | None = None,
) -> Exported:
    """Write ``source`` to ``path``. A reader sees the whole file or none.

    ``importance`` is used by types that can. Raises ExportError, also where llama.cpp reads the finished file
    otherwise than the model's own tokenizer, LlamaError where it does not load it, and NoRoomError.
    """
    how = export_type(kind)
    of = library()
    whole = sum(part.bytes for part in read_parts(source.checkpoint.path).values())
    with _partial(path, whole) as partial, _between(path) as beside:
        room_for(path, whole + round(whole * how.bits / 16 if how.name not in FLOATS else 0))
        floats = partial if how.name in FLOATS else beside
        wide = how.name if how.name in FLOATS else "bf16"
        with tqdm(total=whole, desc=f"write {wide}", unit="B", unit_scale=True, file=sys.stderr) as bar:
            write_floats(source, floats, wide, bar.update)
        used = importance if how.wants_importance else None
        if how.name not in FLOATS:
            quantize_gguf(floats, how, partial, used, threads)
        LlamaModel(partial, only_mapped=True).close()
        refuse_other_vocabulary(source, partial)
    return Exported(read_gguf(path), how, bool(used), of.build)


def refuse_other_vocabulary(source: Source, path: Path) -> None:
    """Load the file's vocabulary by llama.cpp and compare its tokens with the model's. Raises ExportError."""
    with LlamaModel(path, only_vocabulary=True) as model:
        said = other_tokens(source.checkpoint, load_tokenizer(source.checkpoint.path), model)
        template = model.chat_template()
    if said:
        raise ExportError(f"{path}: llama.cpp makes other tokens than the model's tokenizer: {said}")
    if template != source.vocabulary.template:
        raise ExportError(f"{path}: its chat template is not the model's")


def quantize_gguf(
    floats: Path,
    how: ExportType,
    out: Path,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    threads: int | None = None,
) -> None:
    """Quantize a GGUF file of 16-bit floats by llama.cpp's ``llama_model_quantize``. Raises ExportError."""
    of = library()
    ffi, lib = of.ffi, of.lib
    parameters = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    parameters.ftype = how.number
    parameters.nthread = threads or os.cpu_count() or 1
    kept = _importance(ffi, importance or {})
    if importance:
        parameters.imatrix = kept[0]
    with of.listening(_Progress(how.name)), writing(out, floats.stat().st_size):
        status = lib.llama_model_quantize(str(floats).encode(), str(out).encode(), parameters)
    if status:
        raise ExportError(f"{floats}: llama.cpp could not quantize it to {how.name}: {of.last_words()}")


def _importance(ffi: Any, importance: Mapping[str, NDArray[np.float32]]) -> list[Any]:
    """llama.cpp's list of named arrays, which ends with an empty one, and what it points to."""
    entries = ffi.new("struct llama_model_imatrix_data[]", len(importance) + 1)
    kept: list[Any] = [entries]
    for at, (name, values) in enumerate(importance.items()):
        text, numbers = ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", values)
        kept += [text, numbers, values]
        entries[at].name, entries[at].data, entries[at].size = text, numbers, len(values)
    return kept


class _Progress:
    """A bar by what llama.cpp says of the tensor that it is at."""

    def __init__(self, name: str) -> None:
        self._bar = tqdm(desc=f"quantize {name}", unit="tensor", file=sys.stderr)

    def __call__(self, line: str) -> None:
        if found := _TENSOR.search(line):
            self._bar.total = int(found[2])
            self._bar.update(int(found[1]) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def _partial(path: Path, size: int) -> Iterator[Path]:
    """Where a file is written that lies at ``path`` at the end; nothing is left of one that fails."""
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    try:
        with writing(path, size):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _between(path: Path) -> Iterator[Path]:
    """Where the 16-bit floats lie that a file at ``path`` is quantized from. What a run that was killed left
    there goes when the next one begins."""
    between = path.with_name(f".partial-{path.name}.floats")
    between.unlink(missing_ok=True)
    try:
        yield between
    finally:
        between.unlink(missing_ok=True)
