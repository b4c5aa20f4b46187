"""The variants that ``tiercel quantize`` makes when none is described: names for common plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.core.methods import GPTAQ, SMOOTH
from quantize.core.modules import Group, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.core.targets import Target

BEST_RANGES = f"{SMOOTH}+imatrix+{GPTAQ}"
"""The method of weights below 8 bits."""
FOUR_BITS = ("w4a16-g32-asym", "w4a16-g64-asym", "w4a16-g64")
"""4-bit schemes, the first that a group may have is taken."""


def usual_method(scheme_name: str) -> str:
    """The method of a scheme where none is named: what lost least of those that take minutes at most."""
    how = scheme(scheme_name)
    if how.weights is None or how.weights.kind == "float" or how.needs_calibration:
        return "rtn"
    if how.weight_bits >= 8 and how.activations is None:
        return "rtn"
    return f"{SMOOTH}+rtn" if how.weight_bits >= 8 else BEST_RANGES


@dataclass(frozen=True)
class Recipe:
    """A plan by name: every group at the first of ``schemes`` that the target serves there."""

    variant: str
    schemes: tuple[str, ...]
    kv: str = "auto"
    native: bool = False
    """Made unasked only where the target computes the scheme itself, not another one in its place."""

    @property
    def method(self) -> str:
        """What lost least at its scheme."""
        return usual_method(self.schemes[0])

    def plan(self, modules: Modules, where: Target) -> Plan:
        """The plan on that target: where it computes a scheme badly, with the one that stands in for it."""
        return Plan(
            groups={group.name: where.instead(self._scheme(group, where)) for group in modules},
            method=self.method,
            kv=self.kv,
        )

    def _scheme(self, group: Group, where: Target) -> str:
        """The last one where none is served, so that the target's reason is about the plainest."""
        served = (name for name in self.schemes if where.legal(scheme(name), group))
        return next(served, self.schemes[-1])

    def unsuited(self, where: Target) -> str:
        """Why it is not made unasked on that target, or an empty string."""
        if not self.native:
            return ""
        chosen = scheme(self.schemes[0])
        if note := where.speed_note(chosen):
            return note
        computed = where.computes(chosen)
        return f"it is computed otherwise there: {computed}" if computed else ""


RECIPES: Mapping[str, Recipe] = {
    recipe.variant: recipe
    for recipe in (
        Recipe("int8", ("w8a8",)),
        Recipe("fp8", ("fp8-dynamic",), native=True),
        Recipe("int4", FOUR_BITS),
        Recipe("int4-kv8", FOUR_BITS, kv="fp8"),
    )
}
"""Variant name to recipe."""


def unasked(where: Target) -> list[str]:
    """Variants that are made on a target when none is named."""
    return [name for name, recipe in RECIPES.items() if not recipe.unsuited(where)]
