"""How the numbers of a variant are found: each method is one word, and words can be joined by ``+``.

A method ends in a *solver*, which chooses the stored integers, after any *transforms*, which rewrite the
model into an equal one that quantizes better:

=============== ============ ==============================================================================
``rtn``         solver       round to nearest, ranges from minimum and maximum; needs no data
``mse``         solver       round to nearest, ranges of least squared error; needs no data
``imatrix``     solver       ranges of least squared error weighted by E[x²] of each input
``gptq``        solver       error of each column passed on to the next ones (arXiv:2210.17323)
``gptaq``       solver       the same, on the inputs that the groups quantized before it give
                             (arXiv:2504.02692, :mod:`quantize.make.asymmetric`)
``autoround``   solver       rounding and clipping learned block by block (arXiv:2309.05516)
``qat``         last word    trained from what the words before it gave (:mod:`quantize.train.qat`)
``smooth``      transform    scales per input channel of least expected error of 8-bit inputs and weights
                             (:mod:`quantize.make.smooth`); alone: ``smooth+rtn``
``awq``         transform    scales salient input channels up (arXiv:2306.00978); alone: ``awq+rtn``
``smoothquant`` transform    moves outliers from inputs to weights (arXiv:2211.10438); alone: ``…+gptq``
``rotation``    transform    Hadamard rotations folded into the weights (arXiv:2405.16406, R1 and R2);
                             alone: ``rotation+gptq``
=============== ============ ==============================================================================

Ranges, GPTQ and ``smooth`` are made block by block (:mod:`quantize.make.streaming`), ranges and GPTQ with
llm-compressor's numbers. The other transforms and AutoRound are llm-compressor's, and what follows them.
``imatrix+gptq`` is GPTQ with importance-weighted ranges. What ``gptaq`` makes of a group depends on all
groups before it, so it is of one plan and no part of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.core.plan import Plan
from quantize.core.schemes import kv_scheme, scheme

GPTQ, GPTAQ = "gptq", "gptaq"
SOLVERS: Mapping[str, str] = {
    "rtn": "memoryless_minmax",
    "mse": "memoryless_mse",
    "imatrix": "imatrix_mse",
    GPTQ: "memoryless_minmax",
    GPTAQ: "memoryless_minmax",
    "autoround": "memoryless_minmax",
}
"""Solver to llm-compressor's observer of weight ranges."""
QAT = "qat"
"""The last word of a variant that was trained; what comes before it says from what."""
SMOOTH = "smooth"
"""The transform that is made block by block; parts of plans that mix schemes can have it."""
ALONE: Mapping[str, str] = {SMOOTH: "rtn", "awq": "rtn", "smoothquant": "gptq", "rotation": "gptq"}
"""Transform to the solver that it is followed by when none is named."""
AUTOROUND_ITERATIONS = 200


class MethodError(ValueError):
    """A method's name is not understood, or does not fit the plan."""


@dataclass(frozen=True)
class Method:
    """Transforms in order, the solver, and the observer of weight ranges."""

    name: str
    transforms: tuple[str, ...]
    solver: str
    observer: str
    trained: bool = False

    @property
    def by_columns(self) -> bool:
        """Whether integers are found column by column, from whole second moments of inputs."""
        return self.solver in (GPTQ, GPTAQ)

    @property
    def asymmetric(self) -> bool:
        """Whether the integers depend on what the groups before became."""
        return self.solver == GPTAQ

    def needs_data(self, plan: Plan) -> bool:
        """Whether calibration data are used at all."""
        return (
            self.trained
            or bool(self.transforms)
            or self.solver not in ("rtn", "mse")
            or kv_scheme(plan.kv).calibrated
            or any(scheme(name).needs_calibration for name in plan.groups.values())
        )


def parse_method(name: str) -> Method:
    """Read a method's name such as ``gptq``, ``awq`` or ``smoothquant+imatrix+gptq``. Raises MethodError."""
    words = name.split("+")
    if trained := words[-1] == QAT:
        words = words[:-1]
        if not words:
            raise MethodError(
                f"method {name!r}: say what it was trained from, for example imatrix+gptq+{QAT}"
            )
    transforms = [word for word in words if word in ALONE]
    solvers = [word for word in words if word in SOLVERS]
    unknown = [word for word in words if word not in ALONE and word not in SOLVERS]
    if unknown:
        raise MethodError(
            f"unknown method {unknown[0]!r} in {name!r}; transforms: {', '.join(ALONE)}; "
            f"solvers: {', '.join(SOLVERS)}; join them by +, for example awq+gptq; {QAT} comes last, of what "
            "was trained"
        )
    if words != transforms + solvers or len(set(words)) != len(words):
        raise MethodError(f"method {name!r}: transforms come first, each word once, for example awq+gptq")
    if not solvers:
        solvers = [ALONE[transforms[-1]]]
    if SMOOTH in transforms and (len(transforms) > 1 or "autoround" in solvers):
        raise MethodError(
            f"method {name!r}: smooth goes before rtn, mse, imatrix, gptq and gptaq, and with no other"
        )
    *ranges, solver = solvers
    by_columns = solver in (GPTQ, GPTAQ)
    if len(ranges) > 1 or (ranges and (not by_columns or ranges[0] not in ("imatrix", "mse"))):
        raise MethodError(
            f"method {name!r}: of two solvers, the first must be imatrix or mse, the last gptq or gptaq"
        )
    if solver == GPTAQ and transforms not in ([], [SMOOTH]):
        raise MethodError(f"method {name!r}: gptaq goes after smooth or no transform; take gptq")
    return Method(name, tuple(transforms), solver, SOLVERS[ranges[0] if ranges else solver], trained)


def independent(name: str) -> str:
    """The method whose parts do not depend on each other, in place of one by ``gptaq``."""
    return "+".join(GPTQ if word == GPTAQ else word for word in name.split("+"))


def in_order(name: str) -> str:
    """The method by which a plan's groups are made one behind the other, in place of one by ``gptq``; others
    as they are."""
    after = "+".join(GPTAQ if word == GPTQ else word for word in name.split("+"))
    transforms = parse_method(name).transforms
    return after if transforms in ((), (SMOOTH,)) else name


def refuse_trained(name: str) -> None:
    """Raise MethodError for a method that ends in training, or is not understood."""
    if parse_method(name).trained:
        raise MethodError(f"method {name!r} is trained, not made: `tiercel train {QAT}` does that")


def as_trained(name: str) -> str:
    """The method of a variant that was trained from one by ``name``. Raises MethodError where that was,
    too."""
    if parse_method(name).trained:
        raise MethodError(f"method {name!r} was trained already; give the variant that it was trained from")
    return f"{name}+{QAT}"
