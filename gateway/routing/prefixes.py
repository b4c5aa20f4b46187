"""What replicas' prefix caches probably hold, over blocks of the request's own text.

A prompt becomes a chain of hashes, one for each prefix that ends at a block's end. Blocks grow with depth,
to a quarter of what lies before them, so that 4 MB are some forty blocks; where a prompt ends within a
block, the index remembers how far. The beginning is hashed whole, of later blocks three windows are: what a
chain costs grows with the logarithm of the prompt's size. Two prompts that differ only between the windows,
by bytes of the same number, are taken for one; that may cost a request some time at an engine, and nothing
else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Buffer = bytes | memoryview
BLOCK_BYTES = 512
"""The smallest block; also the unit that work is counted in."""
GROWTH = 4
"""A block is at most the ``GROWTH``-th part of what lies before it, or ``BLOCK_BYTES``."""
HEAD_BYTES = 32 << 10
"""Of each part of a prompt that much is hashed whole, the rest by windows."""
WINDOW_BYTES = 512
FORKS = 3
"""A block that so many different ones follow ends what prompts share."""
MOST_BLOCKS = 1 << 15
"""Blocks that are remembered of a replica at most, and of the beginnings that prompts share."""
MOST_BYTES = 100 << 20
"""Text that a cache holds when its engine does not say how large it is."""
_START = 0


class Chain:
    """A prompt by its prefixes. ``ends``: where each block ends, bytes from the prompt's beginning."""

    __slots__ = ("ends", "hashes", "size")

    def __init__(self, hashes: list[int], ends: list[int], size: int) -> None:
        self.hashes = hashes
        self.ends = ends
        self.size = size
        """Bytes of the whole prompt."""


def block_chain(parts: Sequence[Buffer], salt: str = "") -> Chain:
    """The chain of a prompt that is made of ``parts``, in their order. The unfinished block at the end of the
    last one is left out, since it may be continued, unless it is all there is. Hashes differ from process to
    process."""
    seed = hash(salt)
    hashes: list[int] = []
    ends: list[int] = []
    depth = 0
    last = len(parts) - 1
    for number, part in enumerate(parts):
        view = memoryview(part)
        head = bytes(view[:HEAD_BYTES])  # slices of bytes are cheaper than those of a view
        size, at = len(view), 0
        while at < size:
            end = at + max(BLOCK_BYTES, (depth + at) // GROWTH)
            if end > size:
                if number == last and hashes:
                    break
                end = size
            seed = hash((seed, head[at:end] if end <= HEAD_BYTES else _windows(view, at, end)))
            hashes.append(seed)
            ends.append(depth + end)
            at = end
        depth += size
    if not hashes:
        hashes.append(hash((seed, b"")))
        ends.append(0)
    return Chain(hashes, ends, depth)


def _windows(view: memoryview, at: int, end: int) -> tuple[int, bytes, bytes, bytes]:
    """A block that is not hashed whole: its length, beginning, middle and end."""
    middle = (at + end) // 2
    return (
        end - at,
        bytes(view[at : at + WINDOW_BYTES]),
        bytes(view[middle : middle + WINDOW_BYTES]),
        bytes(view[max(at, end - WINDOW_BYTES) : end]),
    )


class CacheIndex:
    """What one replica's prefix cache probably holds; the least recently used blocks leave."""

    __slots__ = ("_blocks", "_bytes", "_tails")

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, int] = OrderedDict()
        """Their bytes."""
        self._bytes = 0
        self._tails: dict[int, int] = {}
        """Where the prompt ended whose last block this is."""

    def __len__(self) -> int:
        return len(self._blocks)

    def cached(self, chain: Chain) -> int:
        """Bytes of the prompt, from its beginning, that are in the cache."""
        blocks, hashes = self._blocks, chain.hashes
        # A chain is cached up to some block: look for it by halves.
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        if not low:
            return 0
        end = chain.ends[low - 1]
        after = chain.ends[low] if low < len(hashes) else chain.size
        # A prompt that ended within the next block is most probably continued by this one.
        ended = self._tails.get(hashes[low - 1], 0)
        return ended if end < ended <= after else end

    def add(self, chain: Chain, capacity_bytes: int) -> None:
        """The replica has been given the prompt. Later blocks leave before earlier ones, as in vLLM."""
        blocks, ends, hashes = self._blocks, chain.ends, chain.hashes
        for number in range(len(hashes) - 1, -1, -1):
            block = hashes[number]
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = length = ends[number] - (ends[number - 1] if number else 0)
                self._bytes += length
        self._tails[hashes[-1]] = chain.size
        while blocks and (self._bytes > capacity_bytes or len(blocks) > MOST_BLOCKS):
            block, length = blocks.popitem(last=False)
            self._bytes -= length
            self._tails.pop(block, None)


class SharedBeginnings:
    """Which blocks are the beginning of many prompts: those up to the last that is followed by different
    ones. A system prompt is, a conversation is not, however long it grows."""

    __slots__ = ("_followers",)

    def __init__(self) -> None:
        self._followers: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._followers)

    def shared(self, chain: Chain) -> int:
        """Bytes of the prompt that are, after it has been taken in."""
        followers = self._followers
        before, forks = _START, 0
        depth = 0
        for index, block in enumerate(chain.hashes):
            known = followers.get(block)
            if known is None:
                known = followers[block] = 0
                forks += 1
                followers[before] = followers.get(before, 0) + 1
            else:
                followers.move_to_end(block)
            if index and forks >= FORKS:
                depth = index
            before, forks = block, known
        while len(followers) > MOST_BLOCKS:
            followers.popitem(last=False)
        return chain.ends[depth - 1] if depth else 0
