"""The linear modules of a checkpoint, in the units that an engine fuses, read from headers alone.

vLLM computes query, key and value as one matrix, and gate and up as one; so the members of such a
group must share one scheme: anything else fails at load, or silently takes the first one's. Experts of
a layer are one group too. A plan assigns schemes to these groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from quantize.core.checkpoint import Checkpoint, CheckpointError, read_tensors
from quantize.core.schemes import Scheme

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""Fused name to the members' names, as vLLM's ``packed_modules_mapping`` has them."""

_FUSED_NAME = {member: fused for fused, members in FUSED.items() for member in members}
_LAYER = re.compile(r"(.*\blayers\.(\d+)\.)(.*)")
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")
_KEPT = ("lm_head", "embed_tokens", "embed_positions", "wte", "wpe")
_ROUTERS = (
    "mlp.gate",
    "block_sparse_moe.gate",
    "feed_forward.router",
    "mlp.shared_expert_gate",
    "mlp.router",
)


@dataclass(frozen=True)
class Linear:
    """One matrix: ``out_features`` N by ``in_features`` K."""

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Group:
    """Modules that must share one scheme. ``kind`` is the name within a layer: ``mlp.down_proj``."""

    name: str
    kind: str
    layer: int
    members: tuple[Linear, ...]

    @property
    def weights(self) -> int:
        return sum(member.weights for member in self.members)

    def stored_bytes(self, scheme: Scheme) -> int:
        """Bytes of all members at ``scheme``, scales and zero points included."""
        return sum(scheme.stored_bytes(m.out_features, m.in_features) for m in self.members)


@dataclass(frozen=True)
class Modules:
    """What of a checkpoint can be quantized, and the bytes of all else (embeddings, head, norms, biases)."""

    groups: tuple[Group, ...]
    other_bytes: int

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(member for group in self.groups for member in group.members)

    @property
    def layers(self) -> int:
        return 1 + max(group.layer for group in self.groups)

    def group_of(self, module: str) -> Group:
        for group in self.groups:
            if any(member.name == module for member in group.members):
                return group
        raise KeyError(module)


def read_modules(checkpoint: Checkpoint) -> Modules:
    """Find the linear modules of an unquantized checkpoint. Raises CheckpointError if there are none."""
    tensors = read_tensors(checkpoint.path)
    members: dict[tuple[int, str, str], list[Linear]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(tensor.shape) != 2 or (place := _LAYER.fullmatch(module)) is None:
            continue
        prefix, layer, within = place[1], int(place[2]), place[3]
        if within in _ROUTERS or within.rpartition(".")[2] in _KEPT:
            continue
        if expert := _EXPERT.fullmatch(within):
            within = expert[1]
        else:
            parent, dot, leaf = within.rpartition(".")
            within = parent + dot + _FUSED_NAME.get(leaf, leaf)
        n, k = tensor.shape
        members.setdefault((layer, prefix, within), []).append(Linear(module, n, k))
    if not members:
        raise CheckpointError(
            f"{checkpoint.path} has no linear modules named …layers.<n>.<module>.weight; "
            "only decoder language models in that layout can be quantized"
        )
    groups = tuple(
        Group(f"{prefix}{within}", within, layer, tuple(linears))
        for (layer, prefix, within), linears in sorted(members.items(), key=lambda entry: entry[0][0])
    )
    quantizable = {f"{member.name}.weight" for group in groups for member in group.members}
    other = sum(
        checkpoint.kept(name, tensor).bytes for name, tensor in tensors.items() if name not in quantizable
    )
    return Modules(groups, other)
