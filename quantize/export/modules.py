"""llama.cpp's matrices by the names that they have in a checkpoint, and what each is stored in."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantize.export.gguf_file import GgufFile, GgufTensor
from quantize.export.types import bits_of

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def linears_of(file: GgufFile) -> Mapping[str, GgufTensor]:
    """Linear modules of the blocks, such as ``model.layers.0.mlp.up_proj``, to their tensors."""
    found = {}
    for name, tensor in file.tensors.items():
        block = _BLOCK.fullmatch(name)
        if block and block[2] in LINEARS:
            found[f"model.layers.{block[1]}.{LINEARS[block[2]]}"] = tensor
    return found


def module_bits(file: GgufFile) -> dict[str, int]:
    """Linear module to the bits of its weights."""
    return {name: bits_of(tensor.type) for name, tensor in linears_of(file).items()}


def bits_per_weight(file: GgufFile) -> float:
    """Of the blocks' matrices, scales included."""
    tensors = linears_of(file).values()
    return 8 * sum(one.bytes for one in tensors) / max(1, sum(one.weights for one in tensors))
