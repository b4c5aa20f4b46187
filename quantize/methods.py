"""How the numbers of a variant are found: each method is one word, and words can be joined by ``+``.

A method ends in a *solver*, which chooses the stored integers, after any *transforms*, which rewrite the
model into an equal one that quantizes better:

=============== ============ ==============================================================================
``rtn``         solver       round to nearest, ranges from minimum and maximum; needs no data
``mse``         solver       round to nearest, ranges of least squared error; needs no data
``imatrix``     solver       ranges of least squared error weighted by E[x²] of each input
``gptq``        solver       error of each column passed on to the next ones (arXiv:2210.17323)
``autoround``   solver       rounding and clipping learned block by block (arXiv:2309.05516)
``awq``         transform    scales salient input channels up (arXiv:2306.00978); alone: ``awq+rtn``
``smoothquant`` transform    moves outliers from inputs to weights (arXiv:2211.10438); alone: ``…+gptq``
``rotation``    transform    Hadamard rotations folded into the weights (arXiv:2405.16406, R1 and R2);
                             alone: ``rotation+gptq``
=============== ============ ==============================================================================

All of them are llm-compressor's (AutoRound through it); this module only puts its modifiers together.
``imatrix+gptq`` is GPTQ with importance-weighted ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.modules import FUSED, Group, Modules
from quantize.plan import Plan
from quantize.schemes import Scheme, kv_scheme, scheme

SOLVERS: Mapping[str, str] = {
    "rtn": "memoryless_minmax",
    "mse": "memoryless_mse",
    "imatrix": "imatrix_mse",
    "gptq": "memoryless_minmax",
    "autoround": "memoryless_minmax",
}
"""Solver to llm-compressor's observer of weight ranges."""
ALONE: Mapping[str, str] = {"awq": "rtn", "smoothquant": "gptq", "rotation": "gptq"}
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

    def needs_data(self, plan: Plan) -> bool:
        """Whether calibration data are used at all."""
        return (
            bool(self.transforms)
            or self.solver not in ("rtn", "mse")
            or kv_scheme(plan.kv).calibrated
            or any(scheme(name).needs_calibration for name in plan.groups.values())
        )


def parse_method(name: str) -> Method:
    """Read a method's name such as ``gptq``, ``awq`` or ``smoothquant+imatrix+gptq``. Raises MethodError."""
    words = name.split("+")
    transforms = [word for word in words if word in ALONE]
    solvers = [word for word in words if word in SOLVERS]
    unknown = [word for word in words if word not in ALONE and word not in SOLVERS]
    if unknown:
        raise MethodError(
            f"unknown method {unknown[0]!r} in {name!r}; transforms: {', '.join(ALONE)}; "
            f"solvers: {', '.join(SOLVERS)}; join them by +, for example awq+gptq"
        )
    if words != transforms + solvers or len(set(words)) != len(words):
        raise MethodError(f"method {name!r}: transforms come first, each word once, for example awq+gptq")
    if not solvers:
        solvers = [ALONE[transforms[-1]]]
    *ranges, solver = solvers
    if len(ranges) > 1 or (ranges and (solver != "gptq" or ranges[0] not in ("imatrix", "mse"))):
        raise MethodError(f"method {name!r}: of two solvers, the first must be imatrix or mse, the last gptq")
    return Method(name, tuple(transforms), solver, SOLVERS[ranges[0] if ranges else solver])


def pattern(group: Group) -> str:
    """A regular expression that matches a group's modules and the name that vLLM fuses them into.

    Without the prefix before ``layers``: engines name the outer modules of a model in their own way.
    """
    place = group.name.removesuffix(group.kind).rpartition("layers.")[2]
    parent, _, leaf = group.kind.rpartition(".")
    if leaf == "experts":
        names = r"experts\..*"
    elif leaf in FUSED:
        names = "(" + "|".join((*FUSED[leaf], leaf)) + ")"
    else:
        names = leaf
    inner = (parent + "." if parent else "").replace(".", r"\.")
    return rf"re:.*layers\.{place.replace('.', chr(92) + '.')}{inner}{names}$"


def config_groups(plan: Plan, modules: Modules, observer: str) -> tuple[dict[str, Any], list[str]]:
    """compressed-tensors' ``config_groups`` and ``ignore`` for a plan; one config group per scheme."""
    targets: dict[str, list[str]] = {}
    ignore = ["lm_head"]
    for group in modules:
        name = plan.groups[group.name]
        if scheme(name).weights is None:
            ignore.append(pattern(group))
        else:
            targets.setdefault(name, []).append(pattern(group))
    made = {
        name: _arguments(scheme(name), observer) | {"targets": listed} for name, listed in targets.items()
    }
    return made, ignore


def quantization_config(plan: Plan, modules: Modules) -> dict[str, Any]:
    """What an engine will read in ``config.json`` of a variant made by ``plan``."""
    groups, ignore = config_groups(plan, modules, "memoryless_minmax")
    for name, group in groups.items():
        group["format"] = storage_format(scheme(name))
        group["weights"]["num_bits"] = scheme(name).weight_bits  # a smaller range is stored in whole bytes
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision" if len(formats) > 1 else next(iter(formats), "dense"),
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
        "ignore": ignore,
        "kv_cache_scheme": kv_scheme(plan.kv).arguments(),
    }


def storage_format(chosen: Scheme) -> str:
    """compressed-tensors' name of how a scheme's weights are stored."""
    weights = chosen.weights
    assert weights is not None
    if weights.kind == "float":
        packed = {"tensor_group": "nvfp4-pack-quantized", "group": "mxfp4-pack-quantized"}
        return "float-quantized" if weights.bits == 8 else packed[weights.strategy]
    return "pack-quantized" if chosen.activations is None else "int-quantized"


def _arguments(chosen: Scheme, observer: str) -> dict[str, Any]:
    assert chosen.weights is not None
    weighted = chosen.weights.strategy in ("channel", "group", "tensor_group")
    fallback = "memoryless_minmax" if observer == "imatrix_mse" else observer
    made: dict[str, Any] = {
        "weights": chosen.weights.arguments() | {"observer": observer if weighted else fallback}
    }
    if chosen.range_bits:
        made["weights"]["num_bits"] = chosen.range_bits
    if chosen.activations:
        made["input_activations"] = chosen.activations.arguments()
    return made


def modifiers(chosen: Method, plan: Plan, modules: Modules) -> Sequence[Any]:
    """llm-compressor's modifiers, in order, for ``plan`` by ``chosen``. Raises MethodError."""
    groups, ignore = config_groups(plan, modules, chosen.observer)
    kv = kv_scheme(plan.kv).arguments()
    if not groups and kv is None and not chosen.transforms:
        raise MethodError("the plan quantizes nothing: every group is bf16 and the KV cache is auto")
    transforms = [_transform(name) for name in chosen.transforms]
    if not groups and kv is None:
        return transforms
    common: dict[str, Any] = {"config_groups": groups, "ignore": ignore}
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if not groups:
        return [*transforms, QuantizationModifier(kv_cache_scheme=kv, targets=[], ignore=ignore)]
    if chosen.solver == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [*transforms, GPTQModifier(**common, kv_cache_scheme=kv)]
    if chosen.solver == "autoround":
        if kv is not None:
            raise MethodError(
                "autoround cannot calibrate a KV cache in the same pass; use gptq or imatrix, "
                "or leave the KV cache at auto"
            )
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        return [
            *transforms,
            AutoRoundModifier(**common, iters=AUTOROUND_ITERATIONS, enable_torch_compile=False),
        ]
    return [*transforms, QuantizationModifier(**common, kv_cache_scheme=kv)]


def _transform(name: str) -> Any:
    match name:
        case "awq":
            from llmcompressor.modifiers.transform.awq import AWQModifier

            return AWQModifier(duo_scaling="both")
        case "smoothquant":
            from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

            return SmoothQuantModifier(smoothing_strength=0.5)
        case _:
            from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

            return SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
