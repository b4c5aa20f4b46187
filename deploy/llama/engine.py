"""The thread that decodes: several answers at once, prompts in pieces beside them.

An answer has a slot, one sequence of the KV cache. A slot keeps its tokens when it is free; a prompt that
begins with them, of the same salt, goes on from there, so that no tenant's cache serves another's. What is
asked waits in a bounded line; a request is admitted when the cache has room for its longest answer. Scoring
(:class:`Task`) waits for the answers that run, and those behind it wait for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deploy.engine_server import FullError
from deploy.llama.sampling import Drawn, Sampler, Sampling
from quantize.export.llama import LlamaContext, LlamaError, LlamaModel, Place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WAITING = 256
"""Requests that may wait."""
PIECE = 256
"""Tokens of prompts in one step, so that answers beside them go on."""

ROWS = 64
"""Rows of logits that are scored together: each is the whole vocabulary."""


@dataclass(eq=False)
class Answering:
    """One answer that is asked for. ``deliver`` is called from the thread: with every token, at last with
    why it ended (``stop`` or ``length``), or with an exception."""

    tokens: list[int]
    max_tokens: int
    how: Sampling
    deliver: Callable[[Drawn | str | Exception], None]
    grammar: str | None = None
    salt: str = ""
    cancelled: bool = False

    @property
    def room(self) -> int:
        """Tokens of the cache that it may come to."""
        return len(self.tokens) + self.max_tokens


@dataclass(eq=False)
class Task:
    """Logits of ``tokens[start:]``, each after those before it, handed to ``take`` some rows at a time with
    the number of the first; then ``deliver`` is called with None, or with an exception."""

    tokens: list[int]
    start: int
    take: Callable[[int, NDArray[np.float32]], None]
    deliver: Callable[[Exception | None], None]
    cancelled: bool = False


@dataclass(eq=False)
class Slot:
    """One sequence: the tokens that its cache holds, and the answer that runs in it."""

    number: int
    held: list[int] = field(default_factory=list)
    salt: str = ""
    work: Answering | None = None
    pending: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    written: int = 0


@dataclass
class Counts:
    """For ``/metrics``."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Engine:
    """``model`` in ``slots`` sequences that share ``cache_tokens``. ``start`` it; ``stop`` lets nothing
    finish. ``on_end`` is called in its thread where that ends by a defect; nothing is answered after it."""

    def __init__(
        self,
        model: LlamaModel,
        cache_tokens: int,
        slots: int,
        threads: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises LlamaError."""
        self._on_end = on_end
        self.model, self.cache_tokens = model, cache_tokens
        self._context = LlamaContext(model, cache_tokens, slots, threads)
        self._slots = [Slot(number) for number in range(slots)]
        self._line: deque[Answering | Task] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._ends = [token for token in range(model.vocabulary) if model.ends(token)]
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self.counts = Counts()
        self.broken: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and give the cache's memory back."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._context.close()

    def submit(self, work: Answering | Task) -> None:
        """Raises FullError, and LlamaError where nothing is decoded any more."""
        with self._changed:
            if self.broken is not None or self._stopping:
                raise LlamaError(f"the engine has ended: {self.broken or 'it was stopped'}")
            if len(self._line) >= WAITING:
                raise FullError(f"{WAITING} requests wait already")
            self._line.append(work)
            self._changed.notify()

    @property
    def running(self) -> int:
        return sum(slot.work is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def cache_usage(self) -> float:
        """Share of the cache that running answers hold."""
        held = sum(len(slot.held) for slot in self._slots if slot.work is not None)
        return min(1.0, held / self.cache_tokens)

    def _run(self) -> None:
        try:
            while self._wait():
                self._admit()
                self._step()
        except Exception as error:  # nothing goes on after it; whoever waits is told
            with self._changed:
                self.broken = error
            for slot in self._slots:
                if slot.work is not None:
                    slot.work.deliver(error)
            while self._line:
                self._line.popleft().deliver(error)
            self._on_end()

    def _wait(self) -> bool:
        """Until there is something to do; whether there is."""
        with self._changed:
            while not self._stopping and not self._line and not self.running:
                self._changed.wait()
            return not self._stopping

    def _admit(self) -> None:
        """Put what waits to work, the first first, as far as there is room."""
        for left in [work for work in self._line if work.cancelled]:
            self._line.remove(left)  # wherever it stands: others are refused when the line is full
        while self._line:
            work = self._line[0]
            if isinstance(work, Task):
                if self.running:
                    return
                self._line.popleft()
                self._score(work)
            elif not self._begin(work):
                return
            else:
                self._line.popleft()

    def _begin(self, work: Answering) -> bool:
        """Give an answer a slot; False while there is none, or no room in the cache."""
        free = [slot for slot in self._slots if slot.work is None]
        reserved = sum(slot.work.room for slot in self._slots if slot.work is not None)
        if not free or reserved + work.room > self.cache_tokens:
            return False
        slot = max(free, key=lambda one: (_common(one, work), -len(one.held)))
        for other in free:  # what they keep gives way, the longest first
            idle = sum(len(one.held) for one in free if one is not slot)
            if other is not slot and reserved + work.room + idle > self.cache_tokens:
                self._forget(other)
        common = min(_common(slot, work), len(work.tokens) - 1)  # of the last token logits are wanted
        common = self._forget(slot, common)
        try:
            grammar = self.model.grammar(work.grammar) if work.grammar else None
        except LlamaError as error:
            work.deliver(error)
            return True
        slot.work, slot.salt, slot.written = work, work.salt, 0
        slot.pending = work.tokens[common:]
        slot.sampler = Sampler(work.how, work.tokens, self._ends, grammar)
        self.counts.prefix_queries += len(work.tokens)
        self.counts.prefix_hits += common
        self.counts.prompt_tokens += len(work.tokens)
        return True

    def _forget(self, slot: Slot, keep: int = 0) -> int:
        """Tokens that the slot still has: ``keep``, or none where the model cannot go back to them."""
        if not self._context.forget(slot.number, keep):
            self._context.forget(slot.number)
            keep = 0
        del slot.held[keep:]
        return keep

    def _step(self) -> None:
        """Decode what is pending of every slot, as far as one batch holds it, and draw the next tokens."""
        for slot in self._slots:
            if slot.work is not None and slot.work.cancelled:
                self._free(slot)
        busy = sorted((slot for slot in self._slots if slot.work), key=lambda slot: len(slot.pending))
        places: list[Place] = []
        drawing: list[Slot] = []
        room = PIECE if len(busy) > 1 else self._context.batch
        for slot in busy:
            part = slot.pending[: max(0, room - len(places))]
            del slot.pending[: len(part)]
            at = len(slot.held)
            whole = not slot.pending and bool(part)
            for index, token in enumerate(part):
                last = whole and index == len(part) - 1
                places.append(Place(token, at + index, slot.number, last))
            slot.held += part
            if whole:
                drawing.append(slot)
        if not places:
            return
        for slot, logits in zip(drawing, self._context.decode(places), strict=True):
            self._draw(slot, logits)

    def _draw(self, slot: Slot, logits: NDArray[np.float32]) -> None:
        work, sampler = slot.work, slot.sampler
        assert work is not None
        assert sampler is not None
        try:
            drawn = sampler.draw(logits)
        except Exception as error:  # of this answer alone: of what it was asked to keep to
            self._free(slot)
            work.deliver(error)
            return
        slot.written += 1
        self.counts.generated_tokens += 1
        work.deliver(drawn)
        ends = self.model.ends(drawn.token) and not work.how.ignore_eos
        if ends or slot.written >= work.max_tokens:
            self._free(slot)  # first: who has the answer must not find it running
            work.deliver("stop" if ends else "length")
        else:
            slot.pending = [drawn.token]

    def _free(self, slot: Slot) -> None:
        slot.work, slot.sampler, slot.pending = None, None, []

    def _score(self, task: Task) -> None:
        for slot in self._slots:
            self._forget(slot)
        try:
            tokens, at = task.tokens, 0
            while at < len(tokens) - 1 and not task.cancelled:
                end = min(len(tokens) - 1, at + (ROWS if at >= task.start - 1 else PIECE))
                end = min(end, task.start - 1) if at < task.start - 1 else end
                places = [Place(tokens[one], one, 0, one >= task.start - 1) for one in range(at, end)]
                rows = self._context.decode(places)
                if len(rows):
                    task.take(at - (task.start - 1), rows)
                at = end
        except Exception as error:
            task.deliver(error)
        else:
            task.deliver(None)
        finally:
            self._context.forget(0)


def _common(slot: Slot, work: Answering) -> int:
    """Tokens at the beginning that a slot's cache has of a request's."""
    if slot.salt != work.salt:
        return 0
    pairs = zip(slot.held, work.tokens, strict=False)
    return next(
        (at for at, (mine, theirs) in enumerate(pairs) if mine != theirs),
        min(len(slot.held), len(work.tokens)),
    )
