"""How legality is decided: rules of kernels, the matrices they meet, and what is said when they do not fit.

The rules themselves, per target, are data in :mod:`quantize.core.targets`. Shapes are those of the fused
matrix that one tensor-parallel shard holds (q, k and v together; N outputs, K inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from quantize.core.modules import HEAD, Group, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import BLOCK, KV_SCHEMES, LADDER, PLANNED, Scheme, SchemeError, kv_scheme, scheme

__all__ = ["ENGINE", "LADDER", "Kind", "KvRule", "Matrix", "Problem", "Rule", "Target", "is_experts"]

ENGINE = "vLLM 0.32"
STATIC_IGNORED = "calibrated input scales are ignored: inputs are scaled per token at run time"


class Kind(StrEnum):
    """Schemes that the engine gives to the same kernels."""

    FULL = "16-bit weights"
    INT_WEIGHTS = "integer weights, 16-bit inputs"
    INT8 = "int8 weights per channel, symmetric int8 inputs"
    INT8_REDUCED = "int8 weights within 7 bits per channel, symmetric int8 inputs"
    INT8_ASYMMETRIC = "int8 weights per channel, int8 inputs with a zero point"
    INT4_INT8 = "int4 weights, int8 inputs"
    FP8_TENSOR = "FP8 weights and inputs, one scale per tensor"
    FP8_TOKEN = "FP8 weights per channel, inputs per token"
    FP8_BLOCK = "FP8 weights per 128 x 128 block"
    FP8_WEIGHTS = "FP8 weights, 16-bit inputs"
    NVFP4 = "NVFP4 weights and inputs"
    NVFP4_WEIGHTS = "NVFP4 weights, 16-bit inputs"
    MXFP4 = "MXFP4 weights and inputs"
    OTHER = "other"


def kind_of(chosen: Scheme) -> Kind:
    """The kind of a scheme; OTHER is what no target's engine has a kernel for."""
    weights, inputs = chosen.weights, chosen.activations
    if weights is None:
        return Kind.FULL
    if weights.kind == "int":
        if inputs is None:
            return Kind.INT_WEIGHTS
        if weights.bits == 8 and weights.strategy == "channel" and weights.symmetric:
            if chosen.range_bits:
                return Kind.INT8_REDUCED
            return Kind.INT8 if inputs.symmetric else Kind.INT8_ASYMMETRIC
        return Kind.INT4_INT8 if weights.bits == 4 and weights.symmetric else Kind.OTHER
    match weights.strategy, weights.bits:
        case "tensor", 8:
            return Kind.FP8_TENSOR if inputs else Kind.FP8_WEIGHTS
        case "channel", 8:
            return Kind.FP8_TOKEN if inputs else Kind.FP8_WEIGHTS
        case "block", 8:
            return Kind.FP8_BLOCK
        case "tensor_group", 4:
            return Kind.NVFP4 if inputs else Kind.NVFP4_WEIGHTS
        case "group", 4:
            return Kind.MXFP4
    return Kind.OTHER


@dataclass(frozen=True)
class Rule:
    """What one kernel takes. Sizes are multiples that a shard's fused matrix must have."""

    kernel: str
    bits: tuple[int, ...] = ()
    """Weight bits; empty where the kind fixes them."""
    groups: tuple[int, ...] | None = None
    """Group sizes; None is any even one."""
    per_channel: bool = True
    zero_points: tuple[int, ...] = ()
    """Weight bits at which zero points load."""
    n: int = 1
    k: int = 1
    wide: int = 0
    """Of K and of the group size, where a group is above 128 (then beside ``groups``) or a whole channel."""
    blocks: bool = False
    """Every member of a fused matrix, and K, must be whole 128 x 128 blocks."""
    dynamic_only: bool = False
    computes: str | None = None
    """What is computed where that is not what the scheme's name says."""
    ignores_static: bool = False
    """Calibrated input scales are not used."""
    unless: tuple[str, str] | None = None
    """Environment variable and value with which ``computes`` does not hold."""
    same_as: str | None = None
    """Another scheme that is computed in the same way here, and is planned in its place."""
    note: str | None = None
    """Why the scheme, though it loads, is not planned with."""


@dataclass(frozen=True)
class KvRule:
    """Head sizes with which a KV-cache type works: those listed, or by ``multiple`` and range."""

    heads: tuple[int, ...] = ()
    multiple: int = 1
    least: int = 1
    most: int | None = None
    computes: str | None = None

    def takes(self, head_dim: int) -> bool:
        if self.heads:
            return head_dim in self.heads
        return self.least <= head_dim <= (self.most or head_dim) and head_dim % self.multiple == 0

    def __str__(self) -> str:
        if self.heads:
            return f"in {', '.join(map(str, self.heads))}"
        multiple = f" and a multiple of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.least} or more{f', at most {self.most}' if self.most else ''}{multiple}"


@dataclass(frozen=True)
class Problem:
    """Why something cannot be loaded. ``str()`` is one sentence."""

    module: str
    rule: str
    value: str
    fix: str

    def __str__(self) -> str:
        return f"{self.module}: {self.value}, but {self.rule}; {self.fix}"


@dataclass(frozen=True)
class Matrix:
    """What one shard of the engine holds of a group: members below each other, N rows in all, K columns."""

    module: str
    parts: tuple[int, ...]
    k: int

    @property
    def n(self) -> int:
        return sum(self.parts)


ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "w2", "fc2", "c_proj", "wo")
"""Modules whose inputs, not outputs, are split over tensor-parallel ranks."""
_REPLICATED = ("k_proj", "v_proj")
"""Modules that are repeated where there are more ranks than KV heads."""

HEAD_BITS = 8
"""Weight bits that the output head is planned with at least: what it loses no later layer makes up for."""
VOCABULARY_PADDING = 64
"""Rows of a head are padded to a multiple of it before a kernel sees them."""


@dataclass(frozen=True)
class Target:
    """vLLM on one kind of processor. ``rules`` of a kind are alternatives; none means refused."""

    name: str
    processor: str
    rules: Mapping[Kind, tuple[Rule, ...]]
    expert_rules: Mapping[Kind, tuple[Rule, ...]]
    kv: Mapping[str, KvRule]
    refused: Mapping[str, str]
    """Kind or KV-cache type to the reason why it is refused, where there is more to say than no kernel."""
    planned: tuple[str, ...] = PLANNED
    engine: str = ENGINE
    measured: frozenset[str] = frozenset()
    """Schemes and KV-cache types whose rules were tried on such a machine; of the others they were read."""
    act_order: tuple[str | None, ...] = field(default=(None, "static", "weight"))
    """compressed-tensors' ``actorder`` values that load."""

    def problems(
        self, chosen: Scheme, group: Group, tensor_parallel: int = 1, head_dim: int | None = None
    ) -> tuple[Problem, ...]:
        """Why ``group`` cannot be served in this scheme; nothing if it can.

        ``head_dim`` tells how k and v are repeated where there are more ranks than KV heads.
        """
        found = tuple(self._findings(chosen, group, tensor_parallel, head_dim))
        if not found:
            return ()
        others = self.candidates(group, tensor_parallel, head_dim)
        shown = ", ".join(others[:6]) + (", …" if len(others) > 6 else "")
        fix = f"give it {shown}" if others else f"use fewer ranks than {tensor_parallel}"
        return tuple(Problem(module, rule, value, fix) for module, value, rule in found)

    def legal(
        self, chosen: Scheme, group: Group, tensor_parallel: int = 1, head_dim: int | None = None
    ) -> bool:
        return not any(True for _ in self._findings(chosen, group, tensor_parallel, head_dim))

    def candidates(
        self, group: Group, tensor_parallel: int = 1, head_dim: int | None = None
    ) -> tuple[str, ...]:
        """Schemes worth planning with: legal, of usable speed, and each computation once."""
        least = HEAD_BITS if group.kind == HEAD else 1
        return tuple(
            name
            for name in self.planned
            if scheme(name).weight_bits >= least
            and self.speed_note(scheme(name)) is None
            and not any(rule.same_as for rule in self._rules(scheme(name), group))
            and self.legal(scheme(name), group, tensor_parallel, head_dim)
        )

    def computes(self, chosen: Scheme, env: Mapping[str, str] | None = None) -> str | None:
        """What the engine computes where it is not what the scheme says; None where it is."""
        static = chosen.activations is not None and chosen.activations.dynamic is False
        for rule in self.rules.get(kind_of(chosen), ()):
            if rule.ignores_static and static:
                return STATIC_IGNORED
            if rule.computes and not (rule.unless and (env or {}).get(rule.unless[0]) == rule.unless[1]):
                return rule.computes
        return None

    def instead(self, name: str) -> str:
        """The scheme to make here in place of ``name``: itself, unless another is computed better."""
        rules = self.rules.get(kind_of(scheme(name)), ())
        return next((rule.same_as for rule in rules if rule.same_as), None) or name

    def speed_note(self, chosen: Scheme) -> str | None:
        """Why a scheme that loads is of no use here; None if it is."""
        return next((rule.note for rule in self.rules.get(kind_of(chosen), ()) if rule.note), None)

    @property
    def untried(self) -> tuple[str, ...]:
        """Schemes and KV-cache types of which no rule was tried on such a machine."""
        return tuple(name for name in (*LADDER, *KV_SCHEMES) if name not in {"bf16", *self.measured})

    def kv_problems(self, kv: str, head_dim: int) -> tuple[Problem, ...]:
        """Why the KV cache cannot be of this type with heads of ``head_dim``. Raises SchemeError."""
        kv_scheme(kv)
        where = "KV cache"
        works = [name for name, rule in self.kv.items() if rule.takes(head_dim)]
        fix = f"use {' or '.join(works)}" if works else f"{self.name} cannot serve this model"
        if (rule := self.kv.get(kv)) is None:
            reason = self.refused.get(kv, f"{self.name} has {', '.join(self.kv)}")
            return (Problem(where, reason, f"type {kv}", fix),)
        if rule.takes(head_dim):
            return ()
        return (Problem(where, f"{kv} on {self.name} needs it {rule}", f"head size {head_dim}", fix),)

    def kv_computes(self, kv: str) -> str | None:
        return rule.computes if (rule := self.kv.get(kv)) else None

    def act_order_problems(self, module: str, order: str | None) -> tuple[Problem, ...]:
        """Why a module quantized elsewhere with this ``actorder`` cannot be loaded."""
        if order in self.act_order:
            return ()
        fix = "quantize it again with actorder static"
        return (Problem(module, f"{self.engine} no longer reorders inputs", f"actorder {order}", fix),)

    def check_plan(
        self, plan: Plan, modules: Modules, head_dim: int, tensor_parallel: int = 1
    ) -> tuple[Problem, ...]:
        """All reasons why the plan cannot be loaded; nothing if it can."""
        found = list(self.kv_problems(plan.kv, head_dim))
        names = {group.name for group in modules}
        for name in plan.groups.keys() - names:
            found.append(Problem(name, "the model has no such group", "is in the plan", "make the plan anew"))
        for group in modules:
            if group.name not in plan.groups:
                fix = "give it a scheme, for example bf16"
                found.append(Problem(group.name, "every group needs a scheme", "not in the plan", fix))
                continue
            try:
                chosen = scheme(plan.groups[group.name])
            except SchemeError as error:
                found.append(Problem(group.name, str(error), "has no scheme", "choose one of these"))
                continue
            found += self.problems(chosen, group, tensor_parallel, head_dim)
        return tuple(found)

    def check_modules(
        self,
        schemes: Mapping[str, str],
        modules: Modules,
        head_dim: int,
        kv: str = "auto",
        tensor_parallel: int = 1,
    ) -> tuple[Problem, ...]:
        """The same for schemes given per module, as in a checkpoint made elsewhere; bf16 where none is."""
        groups, split = {}, []
        for group in modules:
            given = {member.name: schemes.get(member.name, "bf16") for member in group.members}
            groups[group.name] = next(iter(given.values()))
            if len(set(given.values())) > 1:
                rule = f"{self.engine} computes them as one matrix, in one scheme"
                value = ", ".join(f"{name.rpartition('.')[2]} is {how}" for name, how in given.items())
                split.append(Problem(group.name, rule, value, "quantize them alike"))
        plan = Plan(groups=groups, kv=kv)
        return (*split, *self.check_plan(plan, modules, head_dim, tensor_parallel))

    def _rules(self, chosen: Scheme, group: Group) -> tuple[Rule, ...]:
        rules = self.expert_rules if is_experts(group) else self.rules
        return rules.get(kind_of(chosen), ())

    def _findings(
        self, chosen: Scheme, group: Group, ranks: int, head_dim: int | None
    ) -> Iterator[tuple[str, str, str]]:
        """(module, value, rule) of everything that is wrong."""
        matrices, uneven = shards(group, ranks, head_dim)
        yield from uneven
        kind = kind_of(chosen)
        if kind is Kind.FULL:
            return
        if not (rules := self._rules(chosen, group)):
            what = kind if kind is not Kind.OTHER else "weights and inputs in that combination"
            why = self.refused.get(kind, f"{self.engine} has no kernel for {what} on {self.processor}")
            if is_experts(group) and kind in self.rules:
                why = f"{self.engine} has no kernel for experts in it on {self.processor}"
            yield group.name, f"scheme {chosen.name}", why
            return
        for matrix in matrices:
            # Rules are alternatives: what is said is what the nearest one lacks.
            tried = [list(_violations(rule, chosen, matrix, ranks)) for rule in rules]
            yield from ((matrix.module, value, why) for value, why in min(tried, key=len))


def is_experts(group: Group) -> bool:
    return group.kind.rpartition(".")[2] == "experts"


def shards(
    group: Group, ranks: int, head_dim: int | None = None
) -> tuple[list[Matrix], list[tuple[str, str, str]]]:
    """The matrices that one of ``ranks`` tensor-parallel ranks holds of a group, and what cannot be split."""
    uneven: list[tuple[str, str, str]] = []
    parts: dict[str, list[tuple[int, int]]] = {}
    for member in group.members:
        leaf = member.name.rpartition(".")[2]
        n, k = member.out_features, member.in_features
        if group.kind == HEAD:
            n = -(-n // VOCABULARY_PADDING) * VOCABULARY_PADDING
        split, size = ("K", k) if leaf in ROW_PARALLEL else ("N", n)
        heads = n // head_dim if head_dim and leaf in _REPLICATED else 0
        if heads and heads < ranks and ranks % heads == 0:
            n //= heads
        elif size % ranks:
            why = f"tensor parallelism of {ranks} needs it a multiple of {ranks}"
            uneven.append((member.name, f"{split} is {size}", why))
            continue
        elif split == "K":
            k //= ranks
        else:
            n //= ranks
        place = member.name.rpartition(".")[0] + (".down" if split == "K" else "")
        parts.setdefault(place if is_experts(group) else group.name, []).append((n, k))
    return [
        Matrix(name.removesuffix(".down"), tuple(n for n, _ in sizes), sizes[0][1])
        for name, sizes in parts.items()
    ], uneven


def _violations(rule: Rule, chosen: Scheme, matrix: Matrix, ranks: int) -> Iterator[tuple[str, str]]:
    """(value, rule) of everything in which ``matrix`` does not suit the kernel."""
    weights, kernel = chosen.weights, rule.kernel
    assert weights is not None
    size = weights.group_size if weights.strategy == "group" else None
    if rule.bits and weights.bits not in rule.bits:
        yield f"{weights.bits} bits", f"{kernel} takes {_either(rule.bits)} bits"
        return
    if not weights.symmetric:
        if weights.bits not in rule.zero_points:
            yield f"zero points at {weights.bits} bits", f"{kernel} takes symmetric weights only"
        elif any(part % (32 // weights.bits) for part in matrix.parts):
            packed = 32 // weights.bits
            yield f"N is {_either(matrix.parts)}", f"zero points are packed by {packed}: a multiple of that"
    if size is None and weights.strategy == "channel" and not rule.per_channel:
        yield "one scale per channel", f"{kernel} takes groups of {_either(rule.groups or ())}"
    wide = rule.wide > 0 and (size is None or size > 128)
    if size is not None and not wide and (size not in rule.groups if rule.groups else size % 2):
        yield f"group size {size}", f"{kernel} takes {_either(rule.groups) if rule.groups else 'even ones'}"
    if weights.group_size and matrix.k % weights.group_size:
        yield f"K is {matrix.k}", f"groups of {weights.group_size} must divide it"
    if rule.dynamic_only and chosen.activations and chosen.activations.dynamic is not True:
        yield "static input scales", f"{kernel} takes dynamic ones"
    for name, value, multiple in (("N", matrix.n, rule.n), ("K", matrix.k, rule.k)):
        if value % multiple:
            yield f"{name} is {value}", f"{kernel} needs a multiple of {multiple}"
    if wide:
        for name, value in (("K", matrix.k), ("group size", size or 0)):
            if value % rule.wide:
                yield f"{name} is {value}", f"{kernel} needs a multiple of {rule.wide} with scales that wide"
    if rule.blocks:
        for name, value in (*(("N", part) for part in matrix.parts), ("K", matrix.k)):
            if value % BLOCK:
                yield f"{name} is {value}", f"{kernel} takes whole blocks of {BLOCK}"


def _either(values: Sequence[int]) -> str:
    *some, last = map(str, values)
    return f"{', '.join(some)} or {last}" if some else last
