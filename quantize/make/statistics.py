"""What calibration sequences say of a block: second moments and ranges of every linear's inputs, and the
largest keys and values. Taken in one pass, for all schemes and methods."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.core.modules import Group
from quantize.make.blocks import Batch, Blocks, States
from quantize.make.linears import observing
from quantize.make.threads import side_by_side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class InputStatistics:
    """Of the inputs of one linear, over ``tokens`` tokens, in float32.

    ``moments`` is E[x xᵀ] (K, K), or only its diagonal E[x²] (K,) where no more was asked for.
    """

    tokens: int
    moments: Tensor
    least: float
    most: float

    @property
    def importance(self) -> Tensor:
        """E[x²], (K,)."""
        return self.moments if self.moments.ndim == 1 else self.moments.diagonal()


@dataclass(frozen=True)
class BlockStatistics:
    """By the name of a linear (the first of those that share inputs), and the block's |key| and |value|."""

    inputs: dict[str, InputStatistics]
    keys: float
    values: float


class _Cache:
    """Stands in for a KV cache: it hands keys and values through and remembers the largest."""

    def __init__(self) -> None:
        self.keys = self.values = 0.0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = max(self.keys, float(keys.abs().amax()))
        self.values = max(self.values, float(values.abs().amax()))
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


def first_of(group: Group, name: str) -> str:
    """The linear whose inputs ``name`` shares: the group's first, or the one of the same expert."""
    parent = name.rpartition(".")[0]
    return next(m.name for m in group.members if m.name == name or _shares(group, m.name, name, parent))


def _shares(group: Group, other: str, name: str, parent: str) -> bool:
    if not group.kind.endswith("experts"):
        return True
    down = ("down_proj", "w2")
    return other.rpartition(".")[0] == parent and name.rpartition(".")[2] not in down


def observe(
    blocks: Blocks, layer: int, states: States, groups: Collection[Group], full: Collection[str]
) -> BlockStatistics:
    """Take ``states`` through the loaded block and return what went into the linears of ``groups``.

    ``full`` names the groups for which whole second moments are wanted.
    """
    import torch

    wanted = {first_of(group, member.name): group for group in groups for member in group.members}
    found: dict[str, InputStatistics] = {}
    lock, running = threading.Lock(), threading.local()

    def seen(name: str, x: Tensor) -> None:
        rows = x[running.real] if x.ndim == 3 else x  # an expert's rows come without their places
        _add(found, lock, name, rows.float(), whole=wanted[name].name in full)

    def work(batch: Batch) -> tuple[float, float]:
        running.real, cache = batch.real, _Cache()
        with torch.no_grad():
            batch.hidden.copy_(blocks.through(layer, batch, batch.hidden, cache))
        return cache.keys, cache.values

    with observing({name: blocks.places[name] for name in wanted}, seen):
        on_processor = blocks.device.type == "cpu"
        largest = side_by_side(work, states.batches) if on_processor else list(map(work, states.batches))
    for one in found.values():
        one.moments /= max(1, one.tokens)
    return BlockStatistics(found, max(k for k, _ in largest), max(v for _, v in largest))


def _add(found: dict[str, InputStatistics], lock: threading.Lock, name: str, x: Tensor, whole: bool) -> None:
    """Add float32 rows (tokens, K) to the sums under ``name``."""
    import torch

    added = x.T @ x if whole else x.square().sum(0)
    least, most = torch.aminmax(x)
    with lock:
        one = found.get(name)
        if one is None:
            found[name] = InputStatistics(len(x), added, float(least), float(most))
            return
        one.moments += added
        one.tokens += len(x)
        one.least, one.most = min(one.least, float(least)), max(one.most, float(most))
