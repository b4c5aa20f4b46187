"""The ``quantization_config`` of a checkpoint, in compressed-tensors' words."""

from __future__ import annotations

from typing import Any

from quantize.core.modules import FUSED, HEAD, Group, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import Scheme, kv_scheme, scheme

TEXT_PART = "language_model"


def pattern(group: Group) -> str:
    """A regular expression that matches a group's modules and the name that vLLM fuses them into.

    Without the prefix before ``layers``: engines name the outer modules of a model in their own way, but for
    ``language_model``, which all have for the text part of a multimodal wrapper.
    """
    if group.kind == HEAD:
        return rf"re:(.*\.)?{HEAD}$"
    place = group.name.removesuffix(group.kind).rpartition("layers.")[2]
    parent, _, leaf = group.kind.rpartition(".")
    if leaf == "experts":
        names = r"experts\..*"
    elif leaf in FUSED:
        names = "(" + "|".join((*FUSED[leaf], leaf)) + ")"
    else:
        names = leaf
    inner = (parent + "." if parent else "").replace(".", r"\.")
    # A wrapper's other towers have layers of the same names.
    outer = rf"{TEXT_PART}\..*" if f"{TEXT_PART}." in group.name else ""
    return rf"re:.*{outer}layers\.{place.replace('.', chr(92) + '.')}{inner}{names}$"


def config_groups(plan: Plan, modules: Modules, observer: str) -> tuple[dict[str, Any], list[str]]:
    """compressed-tensors' ``config_groups`` and ``ignore`` for a plan; one config group per scheme."""
    targets: dict[str, list[str]] = {}
    ignore = [] if any(group.kind == HEAD for group in modules) else [HEAD]
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
