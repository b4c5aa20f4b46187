"""What a checkpoint that was quantized elsewhere is made of, read from its ``quantization_config``.

================== ====================================================================== ==============
``quant_method``   written by                                                             tensors
================== ====================================================================== ==============
compressed-tensors llm-compressor, AutoRound (format ``llm_compressor``)                  N x K, packed
gptq               GPTQModel, AutoGPTQ, AutoRound (format ``auto_gptq``)                  packed along K
awq                AutoAWQ, AutoRound (format ``auto_awq``)                               packed along N
auto-round         AutoRound (format ``auto_round``); ``packing_format`` says which       as one of these
================== ====================================================================== ==============

The configuration only says what was intended; :mod:`quantize.register.stored` compares the files with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantize.core.checkpoint import CheckpointError
from quantize.core.modules import Linear
from quantize.core.schemes import KV_SCHEMES, Numbers, Scheme, SchemeError, scheme

Layout = Literal["compressed-tensors", "gptq", "awq"]
NAMED = (
    "w8a8",
    "w8a8-static",
    "w8a8-asym",
    "fp8",
    "fp8-dynamic",
    "fp8-block",
    "fp8a16",
    "nvfp4",
    "nvfp4a16",
    "mxfp4",
)
"""Schemes whose names are not made of their numbers."""
_REGEX_SIGNS = frozenset(r"*+?^$()[]{}|\\")
_MODIFIERS = {"GPTQModifier": "gptq", "AutoRoundModifier": "autoround", "QuantizationModifier": "rtn"}
_TRANSFORMS = {"SmoothQuantModifier": "smoothquant", "AWQModifier": "awq", "SpinQuantModifier": "spinquant"}


@dataclass(frozen=True)
class Prequantized:
    """The schemes of a ready-made checkpoint. ``schemes`` is by linear module, ``bf16`` included."""

    layout: Layout
    method: str
    schemes: Mapping[str, str]
    kv: str = "auto"
    notes: tuple[str, ...] = field(default=())
    orders: Mapping[str, str] = field(default_factory=dict)
    """Linear module to the order of its columns, by compressed-tensors' name, where it is not the model's."""


def read_prequantized(directory: Path, config: Mapping[str, Any], linears: Iterable[Linear]) -> Prequantized:
    """Read the ``quantization_config`` of ``config``, which lies in ``directory``, for the base's modules.

    Raises CheckpointError when there is none, or when it is of a format or a scheme without a name here.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{directory}/config.json has no quantization_config; only quantized checkpoints are registered "
            "(set model.path for a 16-bit one)"
        )
    names = [linear.name for linear in linears]
    readers = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "auto-round": _auto_round,
        "auto_round": _auto_round,
        "intel/auto-round": _auto_round,
    }
    method = str(settings.get("quant_method", settings.get("provider", ""))).lower()
    if method not in readers:
        raise CheckpointError(
            f"{directory}/config.json: quant_method {method!r} is not read; "
            "export the checkpoint as compressed-tensors, gptq, awq or auto-round"
        )
    try:
        return readers[method](directory, settings, names)
    except (KeyError, TypeError, AttributeError, re.error, SchemeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be understood ({error})"
        raise CheckpointError(f"{directory}/config.json: quantization_config {what}") from None


def name_of(weights: Numbers, activations: Numbers | None) -> str:
    """The name of the scheme with these numbers. Raises SchemeError when it has none."""
    for name in NAMED:
        known = scheme(name)
        if known.weights == weights and known.activations == activations:
            return name
    group = f"-g{weights.group_size}" if weights.strategy == "group" else ""
    inputs = activations.bits if activations else 16
    name = f"w{weights.bits}a{inputs}{group}{'' if weights.symmetric else '-asym'}"
    if weights.kind == "int":
        found: Scheme = scheme(name)
        if (found.weights, found.activations) == (weights, activations):
            return name
    raise SchemeError(f"no scheme has weights {weights} with inputs {activations or 'of 16 bits'}")


def _compressed_tensors(directory: Path, settings: Mapping[str, Any], names: list[str]) -> Prequantized:
    groups = [
        (
            group["targets"],
            name_of(_numbers(group["weights"]), _numbers_or_none(group.get("input_activations"))),
        )
        for group in settings["config_groups"].values()
    ]
    ignore = settings.get("ignore") or []
    schemes, orders = {}, {}
    for name in names:
        found = [number for number, (targets, _) in enumerate(groups) if _targeted(name, targets)]
        kept = not found or _targeted(name, ignore)
        schemes[name] = "bf16" if kept else groups[found[0]][1]
        order = (
            None if kept else list(settings["config_groups"].values())[found[0]]["weights"].get("actorder")
        )
        if order:
            orders[name] = str(order)
    return Prequantized(
        "compressed-tensors",
        _method(directory),
        schemes,
        _kv(settings.get("kv_cache_scheme")),
        orders=orders,
    )


def _numbers(arguments: Mapping[str, Any]) -> Numbers:
    """compressed-tensors' ``QuantizationArgs`` as saved; what it leaves out has its default there."""
    size = arguments.get("group_size")
    strategy: Any = arguments.get("strategy")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(size, "group")
    grouped = strategy in ("group", "tensor_group")
    return Numbers(
        bits=int(arguments.get("num_bits", 8)),
        kind=arguments.get("type", "int"),
        strategy=strategy,
        group_size=int(size) if grouped and size else None,
        symmetric=bool(arguments.get("symmetric", True)),
        dynamic=arguments.get("dynamic", False),
    )


def _numbers_or_none(arguments: Mapping[str, Any] | None) -> Numbers | None:
    return _numbers(arguments) if arguments else None


def _targeted(name: str, targets: Iterable[str]) -> bool:
    """Whether a linear module is meant: by class, by exact name, or by ``re:`` and a pattern."""
    return any(
        re.match(target.removeprefix("re:"), name) is not None
        if target.startswith("re:")
        else target in (name, "Linear")
        for target in targets
    )


def _kv(arguments: Mapping[str, Any] | None) -> str:
    if not arguments:
        return "auto"
    wanted = _numbers(arguments)
    for name, kv in KV_SCHEMES.items():
        known = kv.arguments()
        if known and _numbers(known) == wanted:
            return name
    raise SchemeError(f"no KV-cache scheme has {wanted}; known are {', '.join(KV_SCHEMES)}")


def _method(directory: Path) -> str:
    """llm-compressor leaves its recipe beside the weights; the modifiers' names are the method."""
    recipe = directory / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    transforms = [name for modifier, name in _TRANSFORMS.items() if modifier in text]
    solvers = [name for modifier, name in _MODIFIERS.items() if modifier in text]
    return "+".join([*transforms, *solvers[:1]]) or "unknown"


def _integers(bits: int, group_size: int, symmetric: bool) -> str:
    """The name of weight-only integers; a group size of -1 is one scale per output channel."""
    grouped = group_size > 0
    weights = Numbers(
        int(bits),
        "int",
        "group" if grouped else "channel",
        int(group_size) if grouped else None,
        symmetric=bool(symmetric),
    )
    return "bf16" if bits >= 16 else name_of(weights, None)


def _gptq(_: Path, settings: Mapping[str, Any], names: list[str]) -> Prequantized:
    default = {key: settings[key] for key in ("bits", "group_size")} | {"sym": settings.get("sym", True)}
    inside = _flat(settings.get("modules_in_block_to_quantize") or ())
    schemes = {}
    for name in names:
        how: Mapping[str, Any] | None = default
        if inside and not any(name.endswith("." + end) for end in inside):
            how = None
        for pattern, changed in (settings.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                how = None if pattern.startswith("-:") else default | changed
                break
        schemes[name] = _integers(how["bits"], how["group_size"], how["sym"]) if how else "bf16"
    notes: tuple[str, ...] = ()
    orders: dict[str, str] = {}
    if settings.get("desc_act"):
        notes = ("columns are in the order of their activations (desc_act)",)
        # One group per output channel has no order; vLLM makes no difference for GPTQ's static groups.
        if int(settings["group_size"]) != -1:
            orders = {name: "group" for name, how in schemes.items() if how != "bf16"}
    return Prequantized("gptq", _provider(settings, "gptq"), schemes, notes=notes, orders=orders)


def _flat(entries: Iterable[Any]) -> list[str]:
    return [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]


def _awq(_: Path, settings: Mapping[str, Any], names: list[str]) -> Prequantized:
    bits = settings["bits"] if "bits" in settings else settings["w_bit"]
    size = settings["group_size"] if "group_size" in settings else settings["q_group_size"]
    how = _integers(bits, size, not settings.get("zero_point", True))
    kept = settings.get("modules_to_not_convert") or ()
    schemes = {name: "bf16" if any(part in name for part in kept) else how for name in names}
    if (version := str(settings.get("version") or settings.get("format") or "gemm").lower()) != "gemm":
        raise SchemeError(f"AWQ version {version!r} has another packing; only gemm is read")
    return Prequantized("awq", _provider(settings, "awq"), schemes)


def _provider(settings: Mapping[str, Any], method: str) -> str:
    return "autoround" if settings.get("provider") == "auto-round" else method


def _auto_round(_: Path, settings: Mapping[str, Any], names: list[str]) -> Prequantized:
    if (kind := settings.get("data_type", "int")) != "int" or int(settings.get("act_bits", 16)) < 16:
        raise SchemeError(f"data_type {kind!r} with {settings.get('act_bits', 16)}-bit inputs is not read")
    packing = str(settings.get("packing_format", "auto_round:auto_gptq")).rpartition(":")[2]
    blocks = settings.get("block_name_to_quantize")
    blocks = blocks.split(",") if isinstance(blocks, str) else _flat(blocks or ())
    default = {key: settings[key] for key in ("bits", "group_size")} | {"sym": settings.get("sym", True)}
    extra = settings.get("extra_config") or {}
    schemes = {}
    for name in names:
        how = default | _extra(name, extra)
        if blocks and not any(name.startswith(block.strip()) for block in blocks) and name not in extra:
            how["bits"] = 16
        schemes[name] = _integers(how["bits"], how["group_size"], how["sym"])
    layout: Layout = "awq" if "awq" in packing else "gptq"
    return Prequantized(layout, "autoround", schemes)


def _extra(name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """AutoRound's exceptions: the module's own name first, then patterns that are found in it."""
    if name in extra:
        found = extra[name]
    else:
        patterns = (key for key in extra if _REGEX_SIGNS & set(key) and re.search(key, name))
        found = extra.get(next(patterns, ""), {})
    return {key: found[key] for key in ("bits", "group_size", "sym") if found.get(key) is not None}


def bits_of(schemes: Mapping[str, str]) -> dict[str, int]:
    """Linear module to weight bits."""
    return {name: scheme(how).weight_bits for name, how in schemes.items()}
