"""Forward passes of a loaded block, all batches', that halt where a linear is given its inputs.

What the linear will be is decided while they halt, from the inputs of all of them; then they go on with what
it has become. A pass that halts keeps all that it has computed so far, in a thread of its own: of as many
batches as ``HELD_BYTES`` hold. The others go through the block from its beginning to every halt.

    with Halting(blocks, layer, states, names) as passes:
        passes.each(lambda number: look_at(passes.inputs(number, name)))
        ...                                    # the linear's weight is exchanged
        passes.finish()                        # hidden states are the block's outputs
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from quantize.core.modules import Linear
from quantize.core.schemes import BF16_BYTES
from quantize.make.blocks import Batch, Blocks, States
from quantize.make.linears import observing

if TYPE_CHECKING:
    from torch import Tensor

HELD_BYTES = 128 << 20
"""What the halting passes of one state may keep on a processor."""
GPU_HELD_BYTES = 4 << 30
HELD_PASSES = 256
"""Each has a thread."""
GPU_HELD_PASSES = 16
"""Each thread that lives has a workspace of cuBLAS' of its own there, 32 MB on Hopper."""
ANEW = 3.0
"""Times that a block is passed where nothing is kept: up to each of four groups, and to its end."""

_running = threading.local()
"""``one``: the pass that this thread is in."""


class _ReachedError(Exception):
    """A pass that is not kept has come to where it halts."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class _EndedError(Exception):
    """Nobody waits any longer for a pass that halts."""


class _Pass:
    """One batch's. ``work`` takes it through the block and keeps what comes out; linears' hook calls
    :meth:`reached` in between."""

    def __init__(self, work: Callable[[], None], held: bool) -> None:
        self._work, self._held = work, held
        self._halts_at: str | None = None
        self._thread: threading.Thread | None = None
        self._asked: SimpleQueue[str | _EndedError | None] = SimpleQueue()
        self._given: SimpleQueue[Tensor | BaseException | None] = SimpleQueue()

    def inputs(self, name: str) -> Tensor:
        """Go on to the linear of that name, and halt there."""
        found = self._held_until(name) if self._held else self._anew_until(name)
        if found is None:
            raise RuntimeError(f"the block does not come to {name}, or not after where it halted before")
        return found

    def finish(self) -> None:
        """Go on to the end."""
        if self._thread is None:
            self._run(None)
        else:
            self._held_until(None)

    def end(self) -> None:
        """Give up a pass that halts."""
        if self._thread is not None and self._thread.is_alive():
            self._asked.put(_EndedError())
            self._thread.join()

    def reached(self, name: str, inputs: Tensor) -> None:
        if name != self._halts_at:
            return
        if not self._held:
            raise _ReachedError(inputs)
        self._given.put(inputs)
        asked = self._asked.get()
        if isinstance(asked, _EndedError):
            raise asked
        self._halts_at = asked

    def _run(self, halts_at: str | None) -> None:
        self._halts_at, _running.one = halts_at, self
        try:
            self._work()
        finally:
            _running.one = None

    def _anew_until(self, name: str) -> Tensor | None:
        try:
            self._run(name)
        except _ReachedError as reached:
            return reached.inputs
        return None

    def _held_until(self, name: str | None) -> Tensor | None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._in_thread, args=(name,), daemon=True)
            self._thread.start()
        else:
            self._asked.put(name)
        found = self._given.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _in_thread(self, halts_at: str | None) -> None:
        try:
            self._run(halts_at)
            self._given.put(None)
        except _EndedError:
            pass
        except BaseException as error:  # whoever waits is told
            self._given.put(error)


class Halting:
    """The passes of one loaded block, from the hidden states before it to those after it.

    ``names`` are the linears at which they may halt: of linears that are exchanged together, the one that the
    block computes first, since what a pass has computed stays as it is.
    """

    def __init__(self, blocks: Blocks, layer: int, states: States, names: Collection[str]) -> None:
        self._blocks, self._layer = blocks, layer
        self._passes = []
        on_accelerator = blocks.device.type != "cpu"
        left, most = held_bytes(on_accelerator), GPU_HELD_PASSES if on_accelerator else HELD_PASSES
        for number, batch in enumerate(states.batches):
            sequences, tokens, hidden = batch.hidden.shape
            left -= sequences * tokens * kept_bytes(hidden, blocks.linears)
            self._passes.append(_Pass(self._work(batch), held=left >= 0 and number < most))
        self._hook = observing({name: blocks.places[name] for name in names}, _reached)

    def __enter__(self) -> Halting:
        self._hook.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._passes:
            one.end()
        self._hook.__exit__(kind, error, trace)

    def inputs(self, number: int, name: str) -> Tensor:
        """What goes into a linear of ``names``, (sequences, tokens, K), of the batch of that number; its pass
        halts there. Linears are asked for in the order in which the block computes them."""
        return self._passes[number].inputs(name)

    def each(self, work: Callable[[int], object]) -> None:
        """``work`` of the numbers of all batches, as the device suits."""
        self._blocks.each(work, range(len(self._passes)))

    def finish(self) -> None:
        """All hidden states become the block's outputs."""
        self.each(lambda number: self._passes[number].finish())

    def _work(self, batch: Batch) -> Callable[[], None]:
        def work() -> None:
            import torch

            with torch.no_grad():  # threads have a mode of their own
                batch.hidden.copy_(self._blocks.through(self._layer, batch, batch.hidden))

        return work


def _reached(name: str, inputs: Tensor) -> None:
    one: _Pass | None = getattr(_running, "one", None)
    if one is not None:
        one.reached(name, inputs)


def held_bytes(accelerator: bool) -> int:
    """What the halting passes of one state may keep."""
    return GPU_HELD_BYTES if accelerator else HELD_BYTES


def kept_bytes(hidden: int, linears: Iterable[Linear]) -> int:
    """Bytes that a halting pass keeps of a token, about: two hidden states, and what goes into the widest
    linear."""
    return BF16_BYTES * (2 * hidden + max(linear.in_features for linear in linears))
