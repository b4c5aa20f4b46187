"""What replicas' prefix caches probably hold, over blocks of the request's own text.

A prompt becomes a chain of hashes, one for each prefix that ends at a block's end. Blocks grow with depth, to
a sixteenth of what lies before them, so that 4 MB are some 110. The beginning is hashed whole, of later
blocks two windows are: what a chain costs grows with the logarithm of the prompt's size. Two prompts that
differ only between the windows, by bytes of the same number, are taken for one; that may cost a request some
time at an engine, and nothing else.

The loops over blocks are those of ``map``, ``zip`` and ``accumulate``: this runs for every request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, compress

Buffer = bytes | memoryview
BLOCK_BYTES = 512
"""The smallest block; also the unit that work is counted in."""
GROWTH = 16
"""A block is at most the ``GROWTH``-th part of what lies before it, or ``BLOCK_BYTES``."""
HEAD_BYTES = 32 << 10
"""Of each part of a prompt that much is hashed whole, the rest by windows."""
WINDOW_BYTES = 512
LARGEST_BYTES = 64 << 20
"""Of a part of a prompt; what lies behind belongs to no block."""
FORKS = 3
"""A block that so many different ones follow ends what prompts share."""
MOST_BLOCKS = 1 << 15
"""Blocks that are remembered of a replica at most, and of the beginnings that prompts share."""
MOST_BYTES = 100 << 20
"""Text that a cache holds when its engine does not say how large it is."""


def _grid() -> tuple[int, ...]:
    """Where blocks end."""
    ends = [BLOCK_BYTES]
    while ends[-1] < LARGEST_BYTES:
        ends.append(ends[-1] + max(BLOCK_BYTES, ends[-1] // GROWTH))
    return tuple(ends)


_ENDS = _grid()
_IN_HEAD = bisect_right(_ENDS, HEAD_BYTES)
_BLOCKS = [slice(at, end) for at, end in zip((0, *_ENDS), _ENDS[:_IN_HEAD], strict=False)]
_LATER = list(zip(_ENDS[_IN_HEAD - 1 :], _ENDS[_IN_HEAD:], strict=False))
_MIDDLES = [slice((at + end) // 2, (at + end) // 2 + WINDOW_BYTES) for at, end in _LATER]
_TAILS = [slice(end - WINDOW_BYTES, end) for _, end in _LATER]


class Chain:
    """A prompt by its prefixes. ``ends``: where each block ends, bytes from the prompt's beginning."""

    __slots__ = ("ends", "hashes", "size")

    def __init__(self, hashes: list[int], ends: Sequence[int]) -> None:
        self.hashes = hashes
        self.ends = ends
        self.size = ends[-1]
        """Bytes of all blocks."""


def block_chain(parts: Sequence[Buffer], salt: str = "") -> Chain:
    """The chain of a prompt that is made of ``parts``, in their order. The unfinished block at the end of the
    last one is left out, since it may be continued, unless it is all there is. Hashes differ from process to
    process."""
    prefixes = [hash(salt)]
    ends: list[int] = []
    depth = 0
    for part in parts:
        view = memoryview(part)
        size = len(view)
        whole = bisect_right(_ENDS, size)
        found = _hashes(view, whole)
        prefixes[-1:] = accumulate(found, initial=prefixes[-1])
        ends += [depth + end for end in _ENDS[:whole]] if depth else _ENDS[:whole]
        depth += size
        rest = size - (_ENDS[whole - 1] if whole else 0)
        if rest and (part is not parts[-1] or not ends):
            prefixes.append(prefixes[-1] + hash((rest, bytes(view[-min(rest, WINDOW_BYTES) :]))))
            ends.append(depth)
    if not ends:
        return Chain(prefixes, [0])
    return Chain(prefixes[1:], ends)


def _hashes(view: memoryview, whole: int) -> Iterable[int]:
    """Of the first so many blocks. Prefixes are sums of them: of the same blocks in another order too, which
    does not happen."""
    head = bytes(view[:HEAD_BYTES])  # slices of bytes are cheaper than those of a view
    first = map(hash, map(head.__getitem__, _BLOCKS[:whole]))
    if whole <= _IN_HEAD:
        return first
    middles = map(bytes, map(view.__getitem__, _MIDDLES[: whole - _IN_HEAD]))
    tails = map(bytes, map(view.__getitem__, _TAILS))
    return chain(first, map(hash, zip(middles, tails, strict=False)))


class CacheIndex:
    """What one replica's prefix cache probably holds; the least recently used blocks leave. Of a chain it has
    the blocks up to one, and none after that."""

    __slots__ = ("_blocks", "_bytes")

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, int] = OrderedDict()
        """Their bytes."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def cached(self, chain: Chain) -> int:
        """Bytes of the prompt, from its beginning, that are in the cache."""
        known = _known(self._blocks, chain.hashes)
        return chain.ends[known - 1] if known else 0

    def add(self, chain: Chain, capacity_bytes: int) -> None:
        """The replica has been given the prompt. Later blocks leave before earlier ones, as in vLLM."""
        blocks, hashes, ends = self._blocks, chain.hashes, chain.ends
        known = _known(blocks, hashes)
        for number in range(len(hashes) - 1, known - 1, -1):
            blocks[hashes[number]] = length = ends[number] - (ends[number - 1] if number else 0)
            self._bytes += length
        deque(map(blocks.move_to_end, reversed(hashes[:known])), maxlen=0)
        while blocks and (self._bytes > capacity_bytes or len(blocks) > MOST_BLOCKS):
            self._bytes -= blocks.popitem(last=False)[1]


class SharedBeginnings:
    """Which blocks are the beginning of many prompts: those up to the last that is followed by different
    ones. A system prompt is, a conversation is not, however long it grows."""

    __slots__ = ("_followers", "_forks")

    def __init__(self) -> None:
        self._followers: OrderedDict[int, int] = OrderedDict()
        """Of each block, how many different ones have followed it."""
        self._forks: OrderedDict[int, None] = OrderedDict()
        """Those with ``FORKS`` and more; the ones that were met last stay."""

    def __len__(self) -> int:
        return max(len(self._followers), len(self._forks))

    def shared(self, chain: Chain) -> int:
        """Bytes of the prompt that are, after it has been taken in."""
        followers, forks, hashes = self._followers, self._forks, chain.hashes
        known = _known(followers, hashes)
        if known < len(hashes):
            if known:
                before = hashes[known - 1]
                followers[before] = count = followers[before] + 1
                if count >= FORKS:
                    forks[before] = None
            followers.update(dict.fromkeys(hashes[known:-1], 1))
            followers[hashes[-1]] = 0
        met = list(compress(range(len(hashes) - 1), map(forks.__contains__, hashes)))
        for index in met:
            forks.move_to_end(hashes[index])
        while len(followers) > MOST_BLOCKS:
            followers.popitem(last=False)
        while len(forks) > MOST_BLOCKS:
            forks.popitem(last=False)
        return chain.ends[met[-1]] if met else 0


def _known(blocks: OrderedDict[int, int], hashes: Sequence[int]) -> int:
    """How many of a chain are known: all up to some block, which is looked for by halves."""
    low, high = 0, len(hashes)
    if hashes[-1] in blocks:
        return high
    while low < high:
        middle = (low + high) // 2
        if hashes[middle] in blocks:
            low = middle + 1
        else:
            high = middle
    return low
