"""Exact figures of a prompt's tokens, and their KL to a reference, from llama.cpp's own logits.

The route and its bytes are those of ``engine_site/score_route.py``. The reference's final hidden states come
with the request; its head is read from its checkpoint (``TIERCEL_REFERENCE``) and turns them into logits
here, rounded to 16 bits as vLLM's head rounds them, so that the KL is to the reference as it is served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.llama.sampling import log_softmax
from quantize.core.tensors import Part, read_parts, read_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROBES = 64
"""Inputs of a head whose weights make its fingerprint, as in ``score_worker.py``."""
HEADS = ("lm_head.weight", "embed_tokens.weight")
"""Ends of names; embeddings are the head where there is none."""
COLUMNS = ("came", "top1", "kl", "reference_top1")


class ScoreError(ValueError):
    """A request that cannot be scored."""


class ReferenceHead:
    """What turns the reference's hidden states into logits, read from its checkpoint."""

    def __init__(self, directory: Path) -> None:
        """Raises ScoreError where there is not exactly one."""
        parts = read_parts(directory)
        named = next(
            (found for end in HEADS if (found := [name for name in parts if name.endswith(end)])), []
        )
        if len(named) != 1:
            raise ScoreError(f"{directory} has {len(named)} tensors that could be the head")
        self._part: Part = parts[named[0]]
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        self._cap = float(config.get("final_logit_softcapping") or 0.0)
        self._bits = "F16" if str(config.get("dtype") or config.get("torch_dtype")) == "float16" else "BF16"
        self._weight = read_values(self._part)

    @property
    def width(self) -> int:
        return int(self._part.shape[1])

    @property
    def dtype(self) -> str:
        return "float16" if self._bits == "F16" else "bfloat16"

    def fingerprint(self) -> str:
        """Of the logits of unit vectors, which are columns of the weights."""
        digest = hashlib.sha256()
        for column in np.unique(np.linspace(0, self.width - 1, PROBES).astype(int)).tolist():
            digest.update((self._finished(self._weight[:, column][None]) + np.float32(0)).tobytes())
        return digest.hexdigest()[:32]

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, vocabulary) of (n, width)."""
        return self._finished(hidden @ self._weight.T)

    def _finished(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        found = rounded(logits, self._bits)
        if self._cap:
            found = rounded(np.tanh(rounded(found / self._cap, self._bits)), self._bits)
            found = rounded(found * np.float32(self._cap), self._bits)
        return found


def rounded(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """To 16 bits and back."""
    if kind == "F16":
        return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


class Scoring:
    """The figures of one request, filled by :meth:`take`."""

    def __init__(self, tokens: list[int], start: int, head: ReferenceHead | None, hidden: bytes) -> None:
        count = len(tokens) - start
        self._targets = np.array(tokens[start:], np.int64)
        self._head = head
        self._hidden: NDArray[np.float32] | None = None
        if head is not None:
            self._hidden = _floats(hidden, head.dtype).reshape(count, head.width)
        self._came, self._top1 = np.zeros(count), np.zeros(count, np.int32)
        self._kl, self._reference_top1 = np.zeros(count), np.zeros(count, np.int32)

    def take(self, at: int, logits: NDArray[np.float32]) -> None:
        """Rows ``at`` … of the scored tokens."""
        end = at + len(logits)
        log_q = log_softmax(logits)
        self._came[at:end] = np.take_along_axis(log_q, self._targets[at:end, None], 1)[:, 0]
        self._top1[at:end] = log_q.argmax(-1)
        if self._head is not None and self._hidden is not None:
            log_p = log_softmax(self._head.logits(self._hidden[at:end]))
            # Rows that pad the vocabulary are in one of them alone.
            log_p, log_q = log_p[:, : log_q.shape[1]], log_q[:, : log_p.shape[1]]
            self._reference_top1[at:end] = log_p.argmax(-1)
            self._kl[at:end] = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)

    def columns(self) -> dict[str, bytes]:
        """The answer's, little-endian."""
        found = {"came": self._came.astype("<f8").tobytes(), "top1": self._top1.astype("<i4").tobytes()}
        if self._head is not None:
            found["kl"] = self._kl.astype("<f8").tobytes()
            found["reference_top1"] = self._reference_top1.astype("<i4").tobytes()
        return found


def _floats(raw: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "float16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


def unfit(asked: Mapping[str, Any], size: int, vocabulary: int, head: ReferenceHead | None) -> str:
    """Why a request cannot be scored, before any work; an empty string where it can."""
    tokens, start = asked.get("tokens"), asked.get("start")
    if not isinstance(tokens, list) or not all(isinstance(one, int) for one in tokens) or len(tokens) < 2:
        return "tokens: at least two token ids"
    if not isinstance(start, int) or not 1 <= start < len(tokens):
        return f"start: {start} leaves none of {len(tokens)} tokens to score, or none before them"
    if wrong := next((token for token in tokens if not 0 <= token < vocabulary), None):
        return f"tokens: {wrong} is out of vocabulary, which has {vocabulary} tokens"
    if asked.get("keep"):
        return "keep: llama.cpp's hidden states are not kept; measure the reference on vLLM"
    if not size:
        return ""
    if head is None:
        return "the reference's head is not known here; set TIERCEL_REFERENCE to its checkpoint"
    for name, ours in (("width", head.width), ("dtype", head.dtype), ("head", head.fingerprint())):
        if asked.get(name) != ours:
            said = f"{name} {asked.get(name)}, here {ours}"
            return f"the reference's hidden states are of another model or head ({said})"
    if size != (expected := (len(tokens) - start) * head.width * 2):
        return f"{size} bytes of hidden states; {expected} expected"
    return ""
