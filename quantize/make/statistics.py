"""What calibration sequences say of a block: second moments and ranges of every linear's inputs, and the
largest keys and values. Taken in one pass, for all schemes and methods."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.core.legality import is_experts
from quantize.core.modules import Group
from quantize.make.blocks import Batch, Blocks, States
from quantize.make.linears import observing
from quantize.make.smooth import Sampled
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

    @property
    def largest(self) -> float:
        """The largest |x|."""
        return max(abs(self.least), abs(self.most))

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
    """By the name of a linear (the first of those that share inputs), and the block's |key| and |value|:
    NaN where any is.

    ``rows`` are sampled inputs (tokens, K), float32, and ``energy`` E[x²] (K,) over all tokens that they are
    sampled from. ``values`` are the largest of each channel, (heads of values, size of a
    head).
    """

    inputs: dict[str, InputStatistics]
    keys: float
    values: Tensor
    rows: dict[str, Tensor]
    energy: dict[str, Tensor]

    def largest(self, group: Group, first: str) -> float | None:
        """The largest |x| of the inputs of ``first``. Of an expert that no token came to, that of all experts
        of its layer, as which an engine takes fixed scales anyway; None where nothing is known."""
        if first in self.inputs or not is_experts(group):
            return self.inputs[first].largest if first in self.inputs else None
        members = {member.name for member in group.members if _is_down(member.name) == _is_down(first)}
        return max((found.largest for name, found in self.inputs.items() if name in members), default=None)


class _Cache:
    """Stands in for a KV cache: it hands keys and values (sequences, heads, tokens, head) through and
    remembers the largest, of the ``real`` (sequences, tokens) alone."""

    def __init__(self, real: Tensor) -> None:
        self._padding = ~real[:, None, :, None]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = keys.abs().masked_fill_(self._padding, 0).amax().float()
        self.values = values.abs().masked_fill_(self._padding, 0).amax((0, 2)).float()
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


def first_of(group: Group, name: str) -> str:
    """The linear whose inputs ``name`` shares: the group's first, or the one of the same expert."""
    parent = name.rpartition(".")[0]
    return next(m.name for m in group.members if m.name == name or _shares(group, m.name, name, parent))


def _shares(group: Group, other: str, name: str, parent: str) -> bool:
    if not is_experts(group):
        return True
    # Whichever comes first: headers are in the order of the alphabet, so that often it is down.
    return other.rpartition(".")[0] == parent and not (_is_down(other) or _is_down(name))


def _is_down(name: str) -> bool:
    """Whether a linear of an expert has inputs of its own."""
    return name.rpartition(".")[2] in ("down_proj", "w2")


def observe(
    blocks: Blocks,
    layer: int,
    states: States,
    groups: Collection[Group],
    full: Collection[str],
    sampled: Collection[Group] = (),
    places: Mapping[int, Sampled] | None = None,
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
            for line, begin in running.begins.items():
                sampled[line, begin:] = running.real[line, begin:]
            energies[name][running.number] = x[sampled].float().square().sum(0), int(sampled.sum())
        if name in wanted:
            rows = x[running.real] if x.ndim == 3 else x  # an expert's rows come without their places
            added = _sums(rows.float(), whole=wanted[name].name in full)
            with order.turn(name, running.number):
                if name in found:
                    found[name].add(added)
                else:
                    found[name] = added

    def work(number: int) -> tuple[Tensor | None, Tensor | None]:
        batch = states.batches[number]
        running.real, running.number = batch.real, number
        cache = _Cache(running.real)
        running.begins, running.lines, running.places = _chosen(batch, places or {})
        with torch.no_grad(), order.piece(number):
            batch.hidden.copy_(blocks.through(layer, batch, batch.hidden, cache))
        return cache.keys, cache.values

    with observing({name: blocks.places[name] for name in (*wanted, *kept)}, seen):
        largest = blocks.each(work, range(len(states.batches)))
    for one in found.values():
        one.moments /= max(1, one.tokens)
    return BlockStatistics(
        found,
        float(torch.stack([keys for keys, _ in largest if keys is not None]).amax()),
        torch.stack([values for _, values in largest if values is not None]).amax(0),
        {name: torch.cat([mine[number] for number in sorted(mine)]) for name, mine in kept.items() if mine},
        {name: _mean(mine) for name, mine in energies.items() if mine},
    )


def _mean(sums: Mapping[int, tuple[Tensor, int]]) -> Tensor:
    """Of all tokens alike, whichever batch they were in."""
    import torch

    ordered = [sums[number] for number in sorted(sums)]
    return torch.stack([found for found, _ in ordered]).sum(0) / sum(count for _, count in ordered)


def _chosen(batch: Batch, places: Mapping[int, Sampled]) -> tuple[dict[int, int], list[int], list[int]]:
    """Of a batch, where its sampled lines begin, and the lines and places of the rows that are kept."""
    mine = {line: places[number] for line, number in enumerate(batch.numbers) if number in places}
    pairs = [(line, at) for line, sampled in mine.items() for at in sampled.rows]
    begins = {line: sampled.begin for line, sampled in mine.items()}
    return begins, [line for line, _ in pairs], [at for _, at in pairs]


def _sums(x: Tensor, whole: bool) -> InputStatistics:
    """Of float32 rows (tokens, K), not yet divided by their count."""
    import torch

    least, most = torch.aminmax(x)
    return InputStatistics(len(x), x.T @ x if whole else x.square().sum(0), float(least), float(most))
