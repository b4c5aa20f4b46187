"""The linear modules of a checkpoint, in the units that an engine fuses, read from headers alone.

vLLM computes query, key and value as one matrix, and gate and up as one; so the members of such a
group must share one scheme: anything else fails at load, or silently takes the first one's. Experts of
a layer are one group too. A plan assigns schemes to these groups.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from quantize.core.architectures import EMBEDDINGS, FUSED, ROUTERS, Architecture, architecture
from quantize.core.checkpoint import Checkpoint, CheckpointError, read_tensors
from quantize.core.schemes import BF16_BYTES, Scheme

__all__ = ["FUSED", "HEAD", "Group", "Linear", "Modules", "read_modules"]

_FUSED_NAME = {member: fused for fused, members in FUSED.items() for member in members}
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")
HEAD = "lm_head"
NO_LAYER = -1
"""The layer of the head's group, which lies outside of all."""


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
    """What of a checkpoint can be quantized, and the bytes of all else at 16 bits.

    ``other_bytes`` are embeddings, head, norms, biases, routers and vision towers. What of them are
    ``embedding_bytes``, ``head_bytes`` (0 where it is the embeddings) and ``tower_bytes`` is said apart.
    ``head`` is the group of a head that has a matrix of its own: :meth:`with_head` puts it among the groups.
    """

    groups: tuple[Group, ...]
    other_bytes: int
    head: Group | None = None
    embedding_bytes: int = 0
    tower_bytes: int = 0

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(member for group in self.groups for member in group.members)

    @property
    def layers(self) -> int:
        return 1 + max(group.layer for group in self.groups)

    @property
    def head_bytes(self) -> int:
        return BF16_BYTES * self.head.weights if self.head else 0

    def with_head(self) -> Modules:
        """The same with the head as one of the groups. Raises KeyError where the embeddings serve as head."""
        if self.head is None:
            raise KeyError(f"{HEAD}: the model has none of its own; its embeddings serve as head")
        left = self.other_bytes - self.head_bytes
        return replace(self, groups=(*self.groups, self.head), other_bytes=left, head=None)

    def holding(self, groups: Container[str]) -> Modules:
        """The same, with the head as one of the groups if it is named among ``groups``, as in a plan."""
        return self.with_head() if self.head is not None and self.head.name in groups else self

    def group_of(self, module: str) -> Group:
        for group in self.groups:
            if any(member.name == module for member in group.members):
                return group
        raise KeyError(module)


def read_modules(checkpoint: Checkpoint) -> Modules:
    """Find the linear modules of an unquantized checkpoint. Raises CheckpointError if there are none."""
    tensors, known = read_tensors(checkpoint.path), architecture(checkpoint.config)
    tied = known.tied(checkpoint.config, checkpoint.text_config)
    members: dict[tuple[int, str, str], list[Linear]] = {}
    head, other, embeddings, towers = None, 0, 0, 0
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        matrix = kind == "weight" and len(tensor.shape) == 2
        if matrix and (key := _group_key(known, module)) is not None:
            members.setdefault(key, []).append(Linear(module, *tensor.shape))
            continue
        leaf = module.rpartition(".")[2]
        if leaf == HEAD and tied:
            continue  # a copy of the embeddings, which engines do not load
        size = checkpoint.kept(name, tensor).bytes
        other += size
        if leaf == HEAD and matrix:
            head = Group(module, HEAD, NO_LAYER, (Linear(module, *tensor.shape),))
        elif leaf == "embed_tokens":
            embeddings += size
        elif known.wrapper and not name.startswith(known.prefixes):
            towers += size
    if not members:
        raise CheckpointError(
            f"{checkpoint.path} has no linear modules named …layers.<n>.<module>.weight; "
            "only decoder language models in that layout can be quantized"
        )
    groups = tuple(
        Group(f"{prefix}{within}", within, layer, tuple(linears))
        for (layer, prefix, within), linears in sorted(members.items(), key=lambda entry: entry[0][0])
    )
    return Modules(groups, other, head, embeddings, towers)


def _group_key(known: Architecture, module: str) -> tuple[int, str, str] | None:
    """(layer, what stands before, name within the layer) of the group that a matrix is in, if in any."""
    if (place := known.locate(module)) is None:
        return None
    prefix, layer, within = place
    if within in ROUTERS or within.rpartition(".")[2] in EMBEDDINGS:
        return None
    if expert := _EXPERT.fullmatch(within):
        return layer, prefix, expert[1]
    parent, dot, leaf = within.rpartition(".")
    return layer, prefix, parent + dot + _FUSED_NAME.get(leaf, leaf)
