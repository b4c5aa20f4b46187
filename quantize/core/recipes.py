"""The variants that ``tiercel quantize`` makes when none is described: names for common plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.core.modules import Modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import scheme
from quantize.core.targets import Target


@dataclass(frozen=True)
class Recipe:
    """A uniform plan by name."""

    variant: str
    scheme: str
    method: str = "gptq"
    kv: str = "auto"
    native: bool = False
    """Made unasked only where the target computes the scheme itself, not another one in its place."""

    def plan(self, modules: Modules, where: Target) -> Plan:
        """The plan on that target: where it computes the scheme badly, the one that stands in for it."""
        return uniform(modules, where.instead(self.scheme), kv=self.kv, method=self.method)

    def unsuited(self, where: Target) -> str:
        """Why it is not made unasked on that target, or an empty string."""
        if not self.native:
            return ""
        chosen = scheme(self.scheme)
        if note := where.speed_note(chosen):
            return note
        computed = where.computes(chosen)
        return f"it is computed otherwise there: {computed}" if computed else ""


FOUR_BITS = "w4a16-g64"
"""The 4-bit scheme of recipes."""
FOUR_BITS_METHOD = "imatrix+gptq"
RECIPES: Mapping[str, Recipe] = {
    recipe.variant: recipe
    for recipe in (
        Recipe("int8", "w8a8", "smooth+rtn"),
        Recipe("fp8", "fp8-dynamic", "rtn", native=True),
        Recipe("int4", FOUR_BITS, FOUR_BITS_METHOD),
        Recipe("int4-kv8", FOUR_BITS, FOUR_BITS_METHOD, kv="fp8"),
    )
}
"""Variant name to recipe."""


def unasked(where: Target) -> list[str]:
    """Variants that are made on a target when none is named."""
    return [name for name, recipe in RECIPES.items() if not recipe.unsuited(where)]
