"""llm-compressor's modifiers for a method and a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantize.core.methods import AUTOROUND_ITERATIONS, Method, MethodError
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.quantization_config import config_groups
from quantize.core.schemes import kv_scheme


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
        case "smooth":
            raise MethodError("smooth is made for integers and 8-bit floats alone; take smoothquant")
        case _:
            from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

            return SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
