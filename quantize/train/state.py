"""Tensors and a JSON object in one safetensors file: what training keeps. Reading one runs no code."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.files import whole_file

if TYPE_CHECKING:
    from torch import Tensor

WORDS = "tiercel"
"""The header's entry that holds the JSON object."""


def write_state(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Write a file as a whole, one tensor in memory at a time beside those given. Raises NoRoomError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", WORDS: json.dumps(words)}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _name(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path, 8 + len(text) + at) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(_raw(tensor))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the processor, and the JSON object. Raises ValueError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            words = json.loads((file.metadata() or {})[WORDS])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, words  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def _name(tensor: Tensor) -> str:
    """A tensor's type in safetensors' words."""
    import torch

    names = {
        torch.float32: "F32",
        torch.float64: "F64",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    return names[tensor.dtype]


def _raw(tensor: Tensor) -> Any:
    """A tensor's bytes, not copied."""
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stub has no buffer
