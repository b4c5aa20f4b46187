"""What an engine's worker really holds: per linear module its quantization method, kernel and bytes.

A worker extension in vLLM's sense (``--worker-extension-cls account_worker.AccountWorker``): its methods
become methods of every worker, on a CPU and a GPU, under the V1 and the V2 model runner alike, and are
called by ``collective_rpc``. A class that adds other methods may inherit from it. Nothing is changed.
"""

from __future__ import annotations

import re
from typing import Any

_NAMED_BITS = re.compile(r"W(\d+)A\d+")
"""Bits of weights in the names of vLLM's schemes, such as ``CompressedTensorsW8A8Int8``."""
_BESIDE_WEIGHTS = re.compile("scale|zero|bias|g_idx|shape|azp")
"""In names of parameters that are not the matrix itself."""
WEIGHT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8}
"""Bits of a weight that is stored as it is; packed types (int32) hold several weights each."""


class AccountWorker:
    """Adds :meth:`tiercel_account` to a worker."""

    def tiercel_account(self) -> dict[str, Any]:
        """This rank's account: plain types alone, so that any serializer takes it.

        ``modules`` maps a module's name in the engine to its method, scheme, kernel, parameters and bits
        of a weight (0 where they cannot be told); ``embeddings`` likewise for embeddings and head.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        modules, others, caches = {}, {}, set()
        for name, module in model.named_modules():
            if (cache := getattr(module, "kv_cache_dtype", None)) and hasattr(module, "kv_cache"):
                caches.add(_cache(module, str(cache)))
            if (method := getattr(module, "quant_method", None)) is None:
                continue
            if hasattr(module, "num_embeddings"):
                others[_plain(name)] = _describe(module, method)
            elif hasattr(module, "input_size") or hasattr(module, "local_num_experts"):
                modules[_plain(name)] = _describe(module, method)
        config = self.vllm_config  # type: ignore[attr-defined]
        return {
            "quantization": config.model_config.quantization,
            "load_format": str(config.load_config.load_format),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_dtypes": sorted(caches),
            "modules": modules,
            "embeddings": others,
            "weight_bytes": _bytes(model) + sum(entry["in_kernel"] for entry in modules.values()),
            "device_bytes": _device_bytes(),
        }


def _plain(name: str) -> str:
    """A module's name without what an adapter's wrapper adds to it."""
    return name.removesuffix(".base_layer")


def _describe(module: Any, method: Any) -> dict[str, Any]:
    scheme = getattr(module, "scheme", None) or getattr(method, "scheme", None)
    kernel = next(
        (found for owner in (scheme, method) if (found := _kernel(owner)) is not None),
        None,
    )
    parameters = {
        name: [str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()]
        for name, tensor in module.named_parameters(recurse=False)
    }
    bits = _bits(module, method, scheme, parameters)
    return {
        "method": type(method).__name__,
        "scheme": type(scheme).__name__ if scheme is not None else "",
        "kernel": kernel or "",
        "parameters": parameters,
        "bits": bits,
        "in_kernel": _bytes_in_kernel(module, bits, parameters),
    }


def _bytes_in_kernel(module: Any, bits: int, parameters: dict[str, list[Any]]) -> int:
    """Bytes of a matrix that a CPU kernel has taken over, so that its parameter is empty: by its shape."""
    shape = [getattr(module, f"{side}_size_per_partition", 0) for side in ("input", "output")]
    matrices = [size for name, (_, size) in parameters.items() if not _BESIDE_WEIGHTS.search(name)]
    return 0 if any(matrices) else shape[0] * shape[1] * bits // 8


def _kernel(owner: Any) -> str | None:
    """The class that computes, where the method or its scheme holds one."""
    for name in ("kernel", "fp8_linear", "mp_kernel", "experts_cls"):
        if (found := getattr(owner, name, None)) is not None:
            return found.__name__ if isinstance(found, type) else type(found).__name__
    return None


def _bits(module: Any, method: Any, scheme: Any, parameters: dict[str, list[Any]]) -> int:
    """Bits of a weight: as the scheme says or is called, else by the type of the largest parameter."""
    for owner in (scheme, method, getattr(method, "quant_config", None)):
        if (kind := getattr(owner, "quant_type", None)) is not None and hasattr(kind, "size_bits"):
            return int(kind.size_bits)
        for name in ("num_bits", "weight_bits"):
            if isinstance(bits := getattr(owner, name, None), int):
                return bits
    if named := _NAMED_BITS.search(type(scheme).__name__):
        return int(named[1])
    unquantized = type(method).__name__.startswith("Unquantized")
    if unquantized and (kind := getattr(module, "params_dtype", None)) is not None:
        return WEIGHT_BITS.get(str(kind).removeprefix("torch."), 0)
    largest = str(max(parameters.values(), key=lambda entry: int(entry[1]), default=["", 0])[0])
    return 8 if largest.startswith("float8") else WEIGHT_BITS.get(largest, 0)


def _cache(module: Any, named: str) -> str:
    """The attention's KV-cache type; ``auto`` is the type of the tensor that it got."""
    if named != "auto":
        return named
    cache = module.kv_cache
    tensor = cache[0] if isinstance(cache, (list, tuple)) and cache else cache
    return str(getattr(tensor, "dtype", named)).removeprefix("torch.")


def _bytes(model: Any) -> int:
    """Bytes of all parameters and buffers; what is shared (tied weights) counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def _device_bytes() -> int | None:
    """Bytes that this process has taken on its accelerator, KV cache included; None on a CPU."""
    import torch

    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else None
