"""Texts to labels: requests that come together are computed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.engine_server import BadRequestError, FullError
from quantize.export.encoder import MODEL_FILE, Encoder, Session, Tokens, open_encoder_variant

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Asked = tuple[list[int], asyncio.Future[NDArray[np.float64]]]
    """Ids of a text, and who waits for its row."""

TOGETHER = 32
"""Texts of one pass."""
TOKENS = 2048
"""Tokens of one pass, where its texts are all as long as the longest. 32 texts of 512 tokens took 1.1 GiB
that were never given back, no less time than fours of them, and a short text among them waited for all."""
WAITING = 1024
"""Texts that may wait."""

INTEGERS = (b"MatMulInteger", b"DequantizeLinear")
"""Operations of a file whose weights are integers."""


@dataclass
class Counts:
    """For ``/metrics``."""

    running: int = 0
    prompt_tokens: int = 0
    labels: int = 0


class Classifier:
    """An exported classifier. ``start`` it in a loop; ``stop`` it there."""

    def __init__(self, directory: Path, threads: int) -> None:
        """Raises ExportError."""
        self.encoder: Encoder = open_encoder_variant(directory)
        self.tokens = Tokens(self.encoder)
        self.labels = self.encoder.labels
        self.vocabulary = int(self.encoder.config["vocab_size"])
        """Ids of words; those of labels come after them."""
        raw = (directory / MODEL_FILE).read_bytes()
        self.bytes, self.quantized = len(raw), any(one in raw for one in INTEGERS)
        self.counts = Counts()
        self._session = Session(directory / MODEL_FILE, threads)
        self._line: deque[Asked] = deque()
        self._came = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._working = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        if self._working is not None:
            self._working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._working

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def works(self) -> bool:
        """Whether what waits is computed."""
        return self._working is not None and not self._working.done()

    async def of_texts(self, texts: Sequence[str]) -> list[NDArray[np.float64]]:
        """(labels,) natural-log probabilities of every text. Raises BadRequestError and FullError."""
        return await self._of([self.tokens.whole(text) for text in texts])

    async def of_ids(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """The same of a text's token ids, without the special tokens around them."""
        if wrong := next((token for token in ids if not 0 <= token < self.vocabulary), None):
            text = f"tokens: {wrong} is out of vocabulary, which has {self.vocabulary} tokens"
            raise BadRequestError(text, "tokens")
        return (await self._of([self.tokens.around(ids)]))[0]

    async def _of(self, rows: Sequence[list[int]]) -> list[NDArray[np.float64]]:
        if not all(rows):
            raise BadRequestError("input: a text has no tokens; give one that has", "input")
        if self.waiting + len(rows) > WAITING:
            raise FullError(f"{self.waiting} texts wait already")
        loop = asyncio.get_running_loop()
        found: list[asyncio.Future[NDArray[np.float64]]] = [loop.create_future() for _ in rows]
        for ids, one in zip(rows, found, strict=True):
            self._line.append((ids, one))
            self.counts.prompt_tokens += len(ids)
        self._came.set()
        return await asyncio.gather(*found)

    async def _work(self) -> None:
        while True:
            if not (batch := self._next()):
                self._came.clear()
                await self._came.wait()
                continue
            self.counts.running = len(batch)
            try:
                rows = log_softmax(await asyncio.to_thread(self._session.run, [ids for ids, _ in batch]))
                self.counts.labels += len(batch)
                for (_, found), row in zip(batch, rows, strict=True):
                    if not found.done():
                        found.set_result(row)
            except Exception as error:
                for _, found in batch:
                    if not found.done():
                        found.set_exception(error)
            finally:
                self.counts.running = 0

    def _next(self) -> list[Asked]:
        """What is computed together: of those who wait and have not left the first ones."""
        batch: list[Asked] = []
        longest = 0
        while self._line and len(batch) < TOGETHER:
            ids, found = self._line[0]
            if not found.done():
                longest = max(longest, len(ids))
                if batch and longest * (len(batch) + 1) > TOKENS:
                    break
                batch.append((ids, found))
            self._line.popleft()
        return batch


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    values = rows.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    found: NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return found


def likeliest(row: NDArray[np.float64], most: int) -> Sequence[int]:
    """Numbers of the likeliest labels."""
    return [int(at) for at in np.argsort(-row, kind="stable")[:most]]
