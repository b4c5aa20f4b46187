"""Is what an engine serves what the variant's card says? The engine's own account against the card.

A variant may load and be something else: an engine takes another file that lies beside the weights, skips
a quantization config that it does not find, or gives the KV cache another type. Nothing of that shows in
answers that are merely too good. Light: the accounts come over HTTP or from a log.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from quantize.card import Card
from quantize.core.engine_figures import EngineAccount, Kernel
from quantize.core.modules import FUSED

_LAYER = re.compile(r".*\blayers\.(\d+)\.(.*)")
_FUSED_NAME = {member: fused for fused, members in FUSED.items() for member in members}
_QUANTIZATION = re.compile(r"\bquantization=([\w-]+)")
_KV_DTYPE = re.compile(r"\bkv_cache_dtype=([\w-]+)")
_VERSION = re.compile(r"\bLLM engine \(v([\w.+-]+)\)")
_KERNEL = re.compile(r"\bUsing (\w+) for (\w[\w -]*\w)")
SHOWN = 3
"""Modules that a message names."""


def account_of_workers(answer: Mapping[str, Any]) -> EngineAccount:
    """The account from the answer of our route: all ranks of ``/tiercel/account`` together."""
    ranks: Sequence[Mapping[str, Any]] = answer["ranks"]
    count: Counter[str] = Counter()
    held: Counter[str] = Counter()
    bits: dict[str, int] = {}
    for number, rank in enumerate(ranks):
        for module in rank["modules"].values():
            name = _kernel_name(module)
            count[name] += number == 0
            held[name] += sum(size for _, size in module["parameters"].values()) + module["in_kernel"]
            bits[name] = module["bits"]
    on_device = [rank["device_bytes"] for rank in ranks if rank["device_bytes"] is not None]
    return EngineAccount(
        source="workers",
        engine=str(answer["version"]),
        quantization=str(ranks[0]["quantization"] or "none"),
        kernels={name: Kernel(count=count[name], bits=bits[name], bytes=held[name]) for name in count},
        kv_dtype=", ".join(ranks[0]["kv_dtypes"]),
        weight_bytes=sum(rank["weight_bytes"] for rank in ranks),
        device_bytes=sum(on_device) if on_device else None,
        ranks=len(ranks),
    )


def _kernel_name(module: Mapping[str, Any]) -> str:
    """``scheme/kernel``, as far as the module has them, else its method."""
    named = [module["scheme"] or module["method"], module["kernel"]]
    return "/".join(part for part in named if part)


def account_of_log(log: str) -> EngineAccount | None:
    """What a stock server's log shows: quantization, KV type, names of kernels. None without its first
    line, which lists its configuration."""
    if (quantization := _QUANTIZATION.search(log)) is None:
        return None
    version, kv = _VERSION.search(log), _KV_DTYPE.search(log)
    kernels = {"/".join(found[::-1]) for found in _KERNEL.findall(log) if "Kernel" in found[0]}
    return EngineAccount(
        source="log",
        engine=version[1] if version else "",
        quantization=quantization[1].lower(),
        kernels={name: Kernel(count=1, bits=0, bytes=0) for name in sorted(kernels)},
        kv_dtype=kv[1] if kv and kv[1] != "auto" else "",
    )


def differences(card: Card, account: EngineAccount, answer: Mapping[str, Any] | None = None) -> list[str]:
    """What the engine serves otherwise than ``card`` says, a sentence each; empty where nothing is known
    to differ. ``answer`` is the route's, by which every module is compared."""
    found = []
    quantized = any(bits < 16 for bits in card.module_bits.values())
    if quantized and account.quantization == "none":
        found.append(f"the engine found no quantization config, the card says {card.scheme} by {card.method}")
    if not quantized and account.quantization != "none":
        found.append(f"the engine loaded it as {account.quantization}, the card says {card.scheme}")
    if account.kv_dtype and (wrong := _kv_differs(card.kv, account.kv_dtype)):
        found.append(wrong)
    if answer is not None:
        found += _modules_differ(card, answer["ranks"][0]["modules"])
    return found


def _kv_differs(said: str, served: str) -> str:
    whole = "16" in served or served.startswith("float32")
    same = whole if said == "auto" else served.split("_e")[0] == said.split("_e")[0]
    return "" if same else f"the KV cache is {served}, the card says {said if said != 'auto' else '16 bits'}"


def _modules_differ(card: Card, modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Linear modules with other bits than the card's: by layer and name within it, fused as engines do."""
    served = {place: module for name, module in modules.items() if (place := _place(name))}
    wrong: dict[str, str] = {}
    missing = []
    wanted = {_place(name): bits for name, bits in card.module_bits.items()}
    for place, bits in wanted.items():
        if place is None:
            continue
        if (module := served.get(place)) is None:
            missing.append(place)
        elif module["bits"] and module["bits"] != bits:
            wrong[f"layer {place[0]} {place[1]}"] = (
                f"{module['bits']} bits ({_kernel_name(module)}), the card says {bits}"
            )
    if not card.module_bits:  # a reference: every module is whole
        wrong |= {
            f"layer {place[0]} {place[1]}": f"{module['bits']} bits ({_kernel_name(module)}), "
            f"the card says {card.weight_bits}"
            for place, module in served.items()
            if 0 < module["bits"] < card.weight_bits
        }
    lines = [f"{name} is served with {text}" for name, text in list(wrong.items())[:SHOWN]]
    if len(wrong) > SHOWN:
        lines.append(f"and {len(wrong) - SHOWN} more modules")
    if missing and len(missing) == len(wanted):
        return lines  # the engine names its modules otherwise: nothing can be said of them
    if missing:
        lines.append(f"the engine has no layer {missing[0][0]} {missing[0][1]}")
    return lines


def _place(name: str) -> tuple[int, str] | None:
    """Layer and name within it, fused, whatever wrapper is in front; experts are one module."""
    if (found := _LAYER.fullmatch(name)) is None:
        return None
    within = re.sub(r"(\bexperts)\..*", r"\1", found[2])
    parent, dot, leaf = within.rpartition(".")
    return int(found[1]), parent + dot + _FUSED_NAME.get(leaf, leaf)


def suspicion(card: Card, account: EngineAccount | None) -> str:
    """What to say of a quantized variant whose answers and scores equal the reference's in every bit."""
    known = (
        "its engine told that it computes with " + ", ".join(account.kernels)
        if account is not None and account.kernels
        else "its engine does not tell what it computes with"
    )
    return (
        f"all answers and all log-probabilities equal the reference's in every bit, which quantized weights "
        f"({card.scheme}, KV {card.kv}) do not do: the engine may have served other files; {known}"
    )
