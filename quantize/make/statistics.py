"""What calibration sequences say of a block: second moments and ranges of every linear's inputs, and the
largest keys and values. Taken in one pass, for all schemes and methods."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.core.modules import Group
from quantize.make.blocks import Batch, Blocks, States
from quantize.make.linears import observing
from quantize.make.threads import InOrder

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

    def add(self, other: InputStatistics) -> None:
        """Take in sums over other tokens; both are not yet divided by their count."""
        self.moments += other.moments
        self.tokens += other.tokens
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    def divided(self, scale: Tensor) -> InputStatistics:
        """Of the same inputs, each channel divided by its ``scale`` (K,); the range is not known of those."""
        moments = self.moments / scale / (scale if self.moments.ndim == 1 else scale.unsqueeze(1))
        return InputStatistics(self.tokens, moments, -math.inf, math.inf)


@dataclass(frozen=True)
class BlockStatistics:
    """By the name of a linear (the first of those that share inputs), and the block's |key| and |value|.

    ``rows`` are sampled inputs (tokens, K), float32, and ``energy`` E[x²] (K,) over all tokens but the first
    of the sequences that they are of. ``values`` are the largest of each channel, (heads of values, size of a
    head).
    """

    inputs: dict[str, InputStatistics]
    keys: float
    values: Tensor
    rows: dict[str, Tensor]
    energy: dict[str, Tensor]


class _Cache:
    """Stands in for a KV cache: it hands keys and values through and remembers the largest."""

    def __init__(self) -> None:
        self.keys = 0.0
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = max(self.keys, float(keys.abs().amax()))
        self.values = values.abs().amax((0, 2)).float()
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
    blocks: Blocks,
    layer: int,
    states: States,
    groups: Collection[Group],
    full: Collection[str],
    sampled: Collection[Group] = (),
    places: Mapping[int, Sequence[int]] | None = None,
) -> BlockStatistics:
    """Take ``states`` through the loaded block and return what went into the linears of ``groups``.

    ``full`` names the groups for which whole second moments are wanted. Of those ``sampled`` (no experts) the
    rows at ``places``, by a sequence's number, are kept.
    """
    import torch

    wanted = {first_of(group, member.name): group for group in groups for member in group.members}
    kept: dict[str, dict[int, Tensor]] = {group.members[0].name: {} for group in sampled}
    energies: dict[str, dict[int, tuple[Tensor, int]]] = {name: {} for name in kept}
    found: dict[str, InputStatistics] = {}
    order, running = InOrder(), threading.local()

    def seen(name: str, x: Tensor) -> None:
        if name in kept and len(running.lines):
            kept[name][running.number] = x[running.lines, running.places].float()
            # Of the sampled sequences alone, so that scales do not depend on what else the pass is for.
            sampled = torch.zeros_like(running.real)
            sampled[running.lines, 1:] = running.real[running.lines, 1:]
            energies[name][running.number] = x[sampled].float().square().sum(0), int(sampled.sum())
        if name in wanted:
            rows = x[running.real] if x.ndim == 3 else x  # an expert's rows come without their places
            added = _sums(rows.float(), whole=wanted[name].name in full)
            with order.turn(name, running.number):
                if name in found:
                    found[name].add(added)
                else:
                    found[name] = added

    def work(number: int) -> tuple[float, Tensor | None]:
        batch = states.batches[number]
        running.real, running.number, cache = batch.real, number, _Cache()
        running.lines, running.places = _chosen(batch, places or {})
        with torch.no_grad(), order.piece(number):
            batch.hidden.copy_(blocks.through(layer, batch, batch.hidden, cache))
        return cache.keys, cache.values

    with observing({name: blocks.places[name] for name in (*wanted, *kept)}, seen):
        largest = blocks.each(work, range(len(states.batches)))
    for one in found.values():
        one.moments /= max(1, one.tokens)
    return BlockStatistics(
        found,
        max(keys for keys, _ in largest),
        torch.stack([values for _, values in largest if values is not None]).amax(0),
        {name: torch.cat([mine[number] for number in sorted(mine)]) for name, mine in kept.items() if mine},
        {name: _mean(mine) for name, mine in energies.items() if mine},
    )


def _mean(sums: Mapping[int, tuple[Tensor, int]]) -> Tensor:
    """Of all tokens alike, whichever batch they were in."""
    import torch

    ordered = [sums[number] for number in sorted(sums)]
    return torch.stack([found for found, _ in ordered]).sum(0) / sum(count for _, count in ordered)


def _chosen(batch: Batch, places: Mapping[int, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Lines of a batch and places in them, of the rows that are sampled."""
    pairs = [(line, at) for line, number in enumerate(batch.numbers) for at in places.get(number, ())]
    return [line for line, _ in pairs], [at for _, at in pairs]


def _sums(x: Tensor, whole: bool) -> InputStatistics:
    """Of float32 rows (tokens, K), not yet divided by their count."""
    import torch

    least, most = torch.aminmax(x)
    return InputStatistics(len(x), x.T @ x if whole else x.square().sum(0), float(least), float(most))
