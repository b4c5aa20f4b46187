"""A plan: which scheme every module group gets, and the KV cache's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from quantize.core.modules import HEAD, Modules
from quantize.core.schemes import BF16_BYTES, kv_scheme, scheme


class Plan(BaseModel):
    """The assignment of a scheme to every module group (by group name), and the KV cache's scheme."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: Mapping[str, str] = Field(description="group name to scheme name")
    kv: str = "auto"
    method: str = Field(default="gptq", description="how the numbers are found: see quantize.core.methods")
    methods: Mapping[str, str] = Field(
        default_factory=dict, description="group name to method, where it is another one"
    )

    tuned: bool = Field(
        default=False, description="scales and norms are trained afterwards (quantize.plan.tune)"
    )

    def method_of(self, group: str) -> str:
        return self.methods.get(group, self.method)

    def describe(self) -> str:
        """The scheme's name if there is one alone, else how many groups have which."""
        counts = Counter(self.groups.values())
        if len(counts) == 1:
            return next(iter(counts))
        return "mixed(" + ", ".join(f"{name} x {count}" for name, count in sorted(counts.items())) + ")"

    def weight_bytes(self, modules: Modules) -> int:
        """Bytes of the whole checkpoint: quantized groups, scales, embeddings, head, norms."""
        kv_scales = 2 * BF16_BYTES * modules.layers if kv_scheme(self.kv).calibrated else 0
        return (
            modules.other_bytes
            + kv_scales
            + sum(group.stored_bytes(scheme(self.groups[group.name])) for group in modules)
        )

    def bits_per_weight(self, modules: Modules) -> float:
        """Of the matrices in blocks alone, scales included: a head is not counted, whatever it has."""
        blocks = [group for group in modules if group.kind != HEAD]
        stored = sum(group.stored_bytes(scheme(self.groups[group.name])) for group in blocks)
        return 8 * stored / sum(group.weights for group in blocks)


def uniform(modules: Modules, scheme_name: str, kv: str = "auto", method: str = "gptq") -> Plan:
    """The plan that gives every group the same scheme."""
    return Plan(groups={group.name: scheme_name for group in modules}, kv=kv, method=method)
