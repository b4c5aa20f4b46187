"""What is taken out of a model, by name.

==================== =====================================================================================
``magnitude:0.5``    half of each matrix's weights become zero, the smallest of every output
``wanda:0.5``        the same by ``|w| sqrt(E[x²])`` (Sun et al., arXiv:2306.11695), block after block, so
                     that a block sees what those before it became
``…:2:4``            two of every four neighbouring inputs instead of a share
``neurons:0.25``     a quarter of each MLP's channels go, those that add least to its output
``heads:1``          one key-value head of every layer goes, with the query heads that read it
``layers:2``         two layers go, those that turn their input least (Men et al., arXiv:2403.03853)
``svd:0.5``          each matrix at the rank at which two factors would hold half of its numbers, by the
                     singular values of W L, where E[x xᵀ] = L Lᵀ (Wang et al., arXiv:2403.07378)
``outliers:0.01:int3-g32-asym-importance``
                     every matrix by a quantizer (:mod:`quantize.numerics.quantizers`) but for the hundredth
                     of its weights with the largest weighted error, which stay in 16 bits and out of the
                     quantizer's ranges (Dettmers et al., arXiv:2306.03078); ``outliers:0:…`` without any
==================== =====================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from quantize.numerics.formats import FormatError
from quantize.numerics.quantizers import quantizer

Kind = Literal["magnitude", "wanda", "neurons", "heads", "layers", "svd", "outliers"]
KINDS = (
    "magnitude:0.5, wanda:0.5, wanda:2:4, neurons:0.25, heads:1, layers:2, svd:0.5, "
    "outliers:0.01:int3-g32-asym-importance"
)
_STEP = re.compile(
    r"(magnitude|wanda|neurons|heads|layers|svd|outliers):(2:4|\d+(?:\.\d+)?)(?::([a-z0-9-]+))?"
)


class CompactError(ValueError):
    """A model cannot be made smaller in that way. The text says why and what can be."""


@dataclass(frozen=True)
class Step:
    """One of the table above. ``amount`` is a share or a count; of ``2:4`` a half."""

    kind: Kind
    amount: float
    of_four: bool = False
    quantizer: str = ""
    """Of ``outliers``: what the other weights are stored by."""

    @property
    def name(self) -> str:
        more = f":{self.quantizer}" if self.quantizer else ""
        return f"{self.kind}:{'2:4' if self.of_four else f'{self.amount:g}'}{more}"

    @property
    def masks(self) -> bool:
        """Whether zeros are all that is made: shapes stay."""
        return self.kind in ("magnitude", "wanda")

    @property
    def needs_data(self) -> bool:
        return self.kind != "magnitude"

    @property
    def exploited(self) -> str:
        """What an engine makes of the result, in a sentence."""
        if self.kind in ("neurons", "heads", "layers"):
            return "fewer bytes and fewer operations on every engine: matrices are smaller"
        if self.kind == "svd":
            return (
                "nothing: vLLM has no linear module of two factors, so the product is stored; what stands "
                "here is the error and the ratio that factors would have"
            )
        if self.kind == "outliers":
            return (
                "nothing: no engine here adds a sparse matrix to a quantized one, so their sum is stored in "
                "16 bits; what stands here is the error, and the bytes that both would take"
            )
        if self.of_four:
            return (
                "nothing on vLLM 0.32, which has taken 2:4 kernels out and refuses a checkpoint that says it "
                "is sparse; a GPU's sparse tensor cores need an engine that has them"
            )
        return "nothing: kernels read zeros like other weights; only files compress better"


def parse_step(text: str) -> Step:
    """The step of that name. Raises CompactError."""
    found = _STEP.fullmatch(text)
    if found is None:
        raise CompactError(f"unknown step {text!r}; known, with other figures as well: {KINDS}")
    kind: Kind = found[1]  # type: ignore[assignment]
    if kind != "outliers" and (found[3] or "").isdigit():
        raise CompactError(f"{text}: {kind} takes one figure; known: {KINDS}")
    if (kind == "outliers") != (found[3] is not None):
        example = "outliers:0.01:int3-g32-asym-importance"
        raise CompactError(f"{text}: outliers, and nothing else, name a quantizer; write such as {example}")
    if found[2] == "2:4":
        if kind not in ("magnitude", "wanda"):
            raise CompactError(f"{text}: 2:4 is of masks; write magnitude:2:4 or wanda:2:4")
        return Step(kind, 0.5, of_four=True)
    amount = float(found[2])
    if kind == "outliers":
        return _outliers(text, amount, found[3])
    if kind in ("heads", "layers"):
        if not amount.is_integer() or amount < 1:
            raise CompactError(f"{text}: {kind} are counted; write {kind}:1 or more")
    elif not 0 < amount < 1:
        raise CompactError(f"{text}: a share is between 0 and 1; write {kind}:0.5")
    return Step(kind, amount)


def _outliers(text: str, share: float, name: str) -> Step:
    if not 0 <= share < 1:
        raise CompactError(f"{text}: a share is from 0 to below 1; write outliers:0.01:{name}")
    try:
        quantizer(name)
    except FormatError as error:
        raise CompactError(f"{text}: {error}") from None
    return Step("outliers", share, quantizer=name)
