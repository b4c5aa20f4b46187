"""Figures of one sequence's scored tokens, as an engine gave them: scalars per token, nothing larger."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = {"came": "<f8", "top1": "<i4", "kl": "<f8", "kl_upper": "<f8", "reference_top1": "<i4"}


@dataclass(frozen=True)
class Scored:
    """n scored tokens; natural logarithms. What is of a pair is None where no reference was at hand."""

    came: NDArray[np.float64]
    """(n,): log-probability of the token that came."""
    top1: NDArray[np.int32]
    """(n,): id of the likeliest token."""
    vocabulary: int
    """Tokens that the KL knows by name: the whole vocabulary, or those that both engines told."""
    kl: NDArray[np.float64] | None = None
    """(n,): KL(reference || this), nats; a lower bound where ``kl_upper`` is larger."""
    kl_upper: NDArray[np.float64] | None = None
    """(n,): upper bound of the KL, ``kl`` itself where that is exact, infinite where nothing bounds it."""
    reference_top1: NDArray[np.int32] | None = None
    """(n,): the reference's likeliest token."""
    against: str = ""
    """Digest of the reference's record that the KL is to."""

    def __len__(self) -> int:
        return len(self.came)

    @property
    def exact(self) -> bool:
        """Whether the KL is known, not only bounded."""
        return self.kl is not None and self.kl is self.kl_upper

    @property
    def finite(self) -> bool:
        """Whether log-probabilities and KL are numbers; nothing need bound the KL from above."""
        import numpy as np

        known = [self.came] if self.kl is None else [self.came, self.kl]
        bounded = self.kl_upper is None or not np.isnan(self.kl_upper).any()
        return bounded and all(bool(np.isfinite(one).all()) for one in known)

    def to_json(self) -> dict[str, Any]:
        columns = {
            name: _text(values, kind)
            for name, kind in COLUMNS.items()
            if (values := getattr(self, name)) is not None and not (name == "kl_upper" and self.exact)
        }
        return {**columns, "vocabulary": self.vocabulary, "against": self.against}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scored:
        """The inverse of :meth:`to_json`. Raises KeyError or ValueError."""
        import numpy as np

        columns: dict[str, Any] = {
            name: np.frombuffer(base64.b64decode(data[name]), kind)
            for name, kind in COLUMNS.items()
            if name in data
        }
        scored = cls(**columns, vocabulary=int(data["vocabulary"]), against=str(data["against"]))
        return scored if scored.kl_upper is not None else replace(scored, kl_upper=scored.kl)


@dataclass(frozen=True)
class Likeliest:
    """Some tokens' log-probabilities at each of n places, as a server without our route tells them.

    ``ids`` and ``values`` have shape (n, kept); :data:`NOWHERE` and -inf where a row knows fewer.
    """

    ids: NDArray[np.int32]
    values: NDArray[np.float64]

    def row(self, index: int) -> dict[int, float]:
        """Token id to log-probability, of the tokens that are known at one place."""
        pairs = zip(self.ids[index].tolist(), self.values[index].tolist(), strict=True)
        return {token: value for token, value in pairs if token != NOWHERE}

    def top1(self) -> NDArray[np.int32]:
        """(n,): id of the likeliest token."""
        import numpy as np

        best = self.values.argmax(axis=1)
        return np.take_along_axis(self.ids, best[:, None], axis=1)[:, 0].astype(np.int32)

    def of(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """(n,): log-probability of one known token per place. Raises KeyError where it is not known."""
        import numpy as np

        return np.array([self.row(index)[token] for index, token in enumerate(tokens)])


NOWHERE = -1
"""Id that fills a row which knows fewer tokens than others."""


def from_rows(rows: Sequence[Mapping[int, float]]) -> Likeliest:
    """From one mapping of token id to log-probability per place."""
    import numpy as np

    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), NOWHERE, np.int32)
    values = np.full((len(rows), width), -np.inf)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = list(row)
        values[index, : len(row)] = list(row.values())
    return Likeliest(ids, values)


def _text(array: NDArray[Any], kind: str) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode("ascii")
