"""What each module group loses at each choice of scheme and method, from two passes over the model.

``sqnr_db``
    signal to quantization noise of the group's outputs on real inputs, 10 log10(Σ|Wx|² / Σ|Wx - Ŵx̂|²).
``fisher``
    second-order estimate of the KL divergence, nats per token: ½ E[(Σ_t g_t·e_t)²] / T, where e_t is the
    error of the group's output at token t and g_t the gradient, with respect to that output, of the
    log-likelihood of labels drawn from the model itself. The cross terms between tokens vanish in
    expectation, so this is ½ δᵀFδ with the full Fisher matrix F of the group, not its diagonal (Amari 1998;
    Kim et al., arXiv:2306.07629 take the diagonal).
``loss``
    ``fisher`` times the scheme's scale: what its uniform variant loses through the engine's kernels over
    the sum of its estimates. The planner adds these up.

Σ_t g_t·e_t of a changed weight is the inner product of its change with the gradient of the weight, so that
one backward pass per sequence serves every choice; rounded inputs add Σ_t (Wᵀg_t)·(x̂_t - x_t). The product
of the two changes is left out.

Rows are kept as each block is finished, so that an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from quantize.core.jsonl import append_kept, read_kept
from quantize.core.modules import Modules
from quantize.core.schemes import scheme
from quantize.evaluate.bench import Span
from quantize.make.parts import PartStore
from quantize.plan.backward import Backward
from quantize.plan.served import Choice, NotFiniteError, ServedKl
from quantize.plan.sums import Sums


class Row(BaseModel):
    """One module group at one choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    kind: str
    layer: int
    scheme: str
    method: str
    bytes: int
    sqnr_db: float
    fisher: float
    scale: float = 1.0

    @property
    def kl(self) -> float | None:
        """None: groups are not measured one by one, for reports that show it where it is."""
        return None

    @property
    def loss(self) -> float:
        """The best estimate there is, nats per token."""
        return self.fisher * self.scale


class Sensitivity(BaseModel):
    """All rows, and what they were measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: tuple[Row, ...]
    tokens: int
    uniform: Mapping[str, float] = {}
    """scheme@method to the KL of the uniform variant on the engine, where it was measured."""

    def row(self, group: str, choice: Choice) -> Row:
        return next(r for r in self.rows if (r.group, r.scheme, r.method) == (group, *choice))


def analyse(
    parts: PartStore,
    choices: Mapping[str, Sequence[Choice]],
    spans: Sequence[Span],
    keep: Path,
    seed: int = 0,
) -> tuple[Row, ...]:
    """Rows for every group (by name) and its ``choices``; finished rows are read from ``keep``."""
    groups = [group for group in parts.modules if choices.get(group.name)]
    known = _read_rows(keep)
    missing = {
        group.name: [c for c in choices[group.name] if (group.name, *c) not in known] for group in groups
    }
    if any(missing.values()):
        parts.make(missing, label="quantize for all choices")
        backward = Backward(parts, spans, seed)
        for sums in backward.sums(missing):
            rows = [_row(parts.modules, *at, of, backward.fisher(of)) for at, of in sums.items()]
            append_kept(keep, [row.model_dump() for row in rows])
            known |= {(row.group, row.scheme, row.method): row for row in rows}
    return tuple(known[group.name, *choice] for group in groups for choice in choices[group.name])


def _row(modules: Modules, name: str, choice: Choice, sums: Sums, fisher: float) -> Row:
    group = next(group for group in modules if group.name == name)
    return Row(
        group=name,
        kind=group.kind,
        layer=group.layer,
        scheme=choice[0],
        method=choice[1],
        bytes=group.stored_bytes(scheme(choice[0])),
        sqnr_db=sums.sqnr_db,
        fisher=fisher,
    )


def _read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    rows = []
    for entry in read_kept(path):
        with contextlib.suppress(ValueError):  # a row of another form is taken again
            rows.append(Row.model_validate(entry))
    return {(row.group, row.scheme, row.method): row for row in rows}


def calibrated(rows: Sequence[Row], served: ServedKl) -> Sensitivity:
    """Give every row the scale of its scheme: a uniform variant of each is measured on the engine.

    It is by the last of the scheme's methods. Groups that do not have the scheme stay at 16 bits in it. Of a
    scheme that the engine answers with numbers that are not finite there are no rows, nor of a group whose
    estimate is none; it is said.
    """
    for row in rows:
        if not math.isfinite(row.fisher):
            said = f"{row.scheme} is left out of plans for {row.group}: its estimated loss is not finite"
            tqdm.write(said, file=sys.stderr)
    rows = [row for row in rows if math.isfinite(row.fisher)]
    by_scheme: dict[str, list[Row]] = {}
    for row in rows:
        by_scheme.setdefault(row.scheme, []).append(row)
    uniform, scales = {}, {}
    for name, mine in tqdm(by_scheme.items(), desc="uniform variants", unit="engine", file=sys.stderr):
        method = mine[-1].method
        chosen = [row for row in mine if row.method == method]
        try:
            measured = served({row.group: (name, method) for row in chosen})
        except NotFiniteError as error:
            tqdm.write(f"{name} is left out of plans: {error}", file=sys.stderr)
            continue
        uniform[f"{name}@{method}"] = measured
        scales[name] = measured / max(sum(row.fisher for row in chosen), 1e-12)
    return Sensitivity(
        rows=tuple(
            row.model_copy(update={"scale": scales[row.scheme]}) for row in rows if row.scheme in scales
        ),
        tokens=served.tokens,
        uniform=uniform,
    )
