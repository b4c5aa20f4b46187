"""Log-probabilities of one sequence's scored tokens, as an engine gave them: whole rows or the likeliest."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOWHERE = -1
"""Id that fills a row which knows fewer tokens than others."""


@dataclass(frozen=True)
class Scored:
    """n scored tokens. Natural logarithms, float32."""

    came: NDArray[np.float32]
    """(n,): log-probability of the token that came."""
    values: NDArray[np.float32]
    """(n, vocabulary) by token id; or (n, kept) of the tokens in ``ids``."""
    ids: NDArray[np.int32] | None = None
    """(n, kept) token ids, :data:`NOWHERE` where there is none; None for the whole vocabulary."""

    def __len__(self) -> int:
        return len(self.came)

    @property
    def whole(self) -> bool:
        return self.ids is None

    def row(self, index: int) -> dict[int, float]:
        """Token id to log-probability, of the tokens that are known at one place."""
        if self.ids is None:
            return dict(enumerate(self.values[index].tolist()))
        pairs = zip(self.ids[index].tolist(), self.values[index].tolist(), strict=True)
        return {token: value for token, value in pairs if token != NOWHERE}

    def top1(self) -> NDArray[np.int64]:
        """(n,): id of the likeliest token."""
        import numpy as np

        best: NDArray[np.int64] = self.values.argmax(axis=1)
        if self.ids is None:
            return best
        return np.take_along_axis(self.ids, best[:, None], axis=1)[:, 0].astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        whole = {"came": _text(self.came), "values": _text(self.values), "rows": len(self)}
        return whole if self.ids is None else {**whole, "ids": _text(self.ids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scored:
        """The inverse of :meth:`to_json`. Raises KeyError or ValueError."""
        import numpy as np

        rows = int(data["rows"])

        def table(name: str, kind: str) -> NDArray[Any]:
            return np.frombuffer(base64.b64decode(data[name]), kind).reshape(rows, -1)

        ids = table("ids", "<i4") if "ids" in data else None
        return cls(table("came", "<f4")[:, 0], table("values", "<f4"), ids)


def from_rows(rows: Sequence[Mapping[int, float]], tokens: Sequence[int]) -> Scored:
    """From one mapping of token id to log-probability per token, each with the token that came."""
    import numpy as np

    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), NOWHERE, np.int32)
    values = np.full((len(rows), width), -math.inf, np.float32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = list(row)
        values[index, : len(row)] = list(row.values())
    came = np.array([row[token] for row, token in zip(rows, tokens, strict=True)], np.float32)
    return Scored(came, values, ids)


def from_table(values: NDArray[np.float32], tokens: Sequence[int]) -> Scored:
    """From (n, vocabulary) log-probabilities and the n tokens that came."""
    import numpy as np

    return Scored(values[np.arange(len(tokens)), np.asarray(tokens)], values)


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")
