"""LoRA adapters by ``peft``: put around a model's linear modules, written in PEFT's format, read again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.dequantize import read_tensor
from quantize.core.files import write_whole
from quantize.core.modules import Modules
from quantize.core.tensors import Part
from quantize.train.loop import TrainError
from quantize.train.state import write_state

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""
OTHER = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
)
"""Settings of adapters that do more than add two matrices' product, by one scale, to a module's weight."""
TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the base: what the adapter begins as is taken out of it."""
A, B, BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
"""Ends of names of an adapter's tensors; ``BASE`` of a weight that PEFT saves beside them."""


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter. ``targets`` are last parts of module names; none are all linear modules."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainError(f"rank: {self.rank}; must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise TrainError(f"dropout: {self.dropout}; is a share, from 0 to below 1")

    def of(self, modules: Modules) -> tuple[str, ...]:
        """The last parts of the names of the modules that get one. Raises TrainError for an unknown one."""
        known = sorted({linear.name.rpartition(".")[2] for linear in modules.linears})
        if unknown := [name for name in self.targets if name not in known]:
            raise TrainError(f"targets: {unknown[0]!r} is no linear module; known: {', '.join(known)}")
        return self.targets or tuple(known)

    def parameters(self, modules: Modules) -> int:
        """Trained numbers of an adapter of this shape."""
        chosen = set(self.of(modules))
        return sum(
            self.rank * (linear.in_features + linear.out_features)
            for linear in modules.linears
            if linear.name.rpartition(".")[2] in chosen
        )


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one matrix: ``scale`` * ``b`` (N, r) @ ``a`` (r, K)."""

    module: str
    a: Tensor
    b: Tensor
    scale: float

    def added(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())


def wrapped(model: Any, lora: Lora, modules: Modules, base_path: Path, seed: int) -> Any:
    """The model with a new adapter, of which alone is trained. The same ``seed`` gives the same adapter."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # a number, whatever the annotation says
        lora_dropout=lora.dropout,
        target_modules=list(lora.of(modules)),
        base_model_name_or_path=str(base_path),
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """What is trained of a model, by name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def write_adapter(model: Any, directory: Path) -> None:
    """Write the adapter of a model that :func:`wrapped` made, in PEFT's format."""
    from peft import get_peft_model_state_dict

    write_files(directory, model.peft_config["default"].to_dict(), get_peft_model_state_dict(model))


def write_files(directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's ``settings``, those of PEFT's configuration, and ``tensors``, by PEFT's names."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**settings, "inference_mode": True}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    config.pop("runtime_config", None)
    write_state(directory / WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()}, {})
    write_whole(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def adapter_sha256(directory: Path) -> str:
    """Changes whenever a file that decides the adapter changes."""
    raw = b"\0".join((directory / name).read_bytes() for name in (CONFIG, WEIGHTS))
    return hashlib.sha256(raw).hexdigest()


def read_config(directory: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises TrainError where there is none, or it is not of LoRA's plain kind
    (:data:`OTHER`)."""
    path = directory / CONFIG
    if not path.is_file() or not (directory / WEIGHTS).is_file():
        raise TrainError(f"{directory} holds no adapter ({CONFIG} and {WEIGHTS}); give a directory of PEFT's")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, numbers = str(config.get("peft_type")), {name: config[name] for name in ("r", "lora_alpha")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainError(f"{path} is no adapter's ({type(error).__name__}: {error})") from None
    for name, number in numbers.items():
        kinds = (int,) if name == "r" else (int, float)
        if type(number) not in kinds or not 0 < number < math.inf:
            raise TrainError(f"{path}: {name}: {number!r}; must be a number above 0, and r a whole one")
    modules = config.get("target_modules")
    if not (isinstance(modules, str) or (isinstance(modules, list) and all(type(m) is str for m in modules))):
        raise TrainError(f"{path}: target_modules: {modules!r}; must be names of modules, such as ['q_proj']")
    other = [name for name in OTHER if config.get(name)]
    if kind != "LORA" or other or config.get("bias", "none") != "none":
        plain = f"peft_type {kind}" if kind != "LORA" else f"bias {config.get('bias')}"
        named = other[0] if other else plain
        raise TrainError(f"{path}: {named} is not served or merged here; train a plain LoRA adapter")
    if (begun := str(config.get("init_lora_weights"))).startswith(TAKEN_OUT):
        raise TrainError(
            f"{path}: init_lora_weights {begun} changes the base, which is not served or merged here; save "
            "it as a plain adapter (PEFT's path_initial_model_for_weight_conversion)"
        )
    return config


def changes(directory: Path, base: Mapping[str, Part] | None = None) -> Iterator[Change]:
    """What an adapter adds to each matrix, by the matrix's name on disk.

    Raises TrainError, before the first one, for a tensor that is no part of such a change; one that ``base``
    holds as it is changes nothing, and may be there.
    """
    config = read_config(directory)
    rank = int(config["r"])
    scale = float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    with _opened(directory) as file:
        names = set(file.keys())
        modules = sorted(name.removesuffix(A) for name in names if name.endswith(A))
        for module in modules:
            if f"{module}{B}" not in names:
                raise TrainError(f"{directory / WEIGHTS} has {module}{A} and no {module}{B}; it is damaged")
        known = {f"{module}{end}" for module in modules for end in (A, B)}
        for name in sorted(names - known):
            if not _is_same(file.get_tensor(name), (base or {}).get(_of_base(name))):
                raise TrainError(
                    f"{directory / WEIGHTS}: {name} is not served or merged here, and would be lost; train a "
                    "plain LoRA adapter, of linear modules alone"
                )
    return _changes(directory, modules, scale)


def _changes(directory: Path, modules: Sequence[str], scale: float) -> Iterator[Change]:
    with _opened(directory) as file:
        for module in modules:
            a, b = file.get_tensor(f"{module}{A}"), file.get_tensor(f"{module}{B}")
            yield Change(module.removeprefix(PREFIX), a, b, scale)


def _opened(directory: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(directory / WEIGHTS), framework="pt", device="cpu")
    except SafetensorError as error:
        raise TrainError(f"{directory / WEIGHTS} cannot be read ({error}); copy the adapter again") from None


def _of_base(name: str) -> str:
    """A weight's name on disk, by the one that PEFT saves it under."""
    found = name.removeprefix(PREFIX)
    return f"{found.removesuffix(BASE)}.weight" if found.endswith(BASE) else found


def _is_same(tensor: Tensor, part: Part | None) -> bool:
    """Whether a tensor is what is stored, but for the type it was loaded in."""
    return (
        part is not None
        and part.shape == tuple(tensor.shape)
        and bool((read_tensor(part).float() == tensor.float()).all())
    )


def described(lora: Lora, modules: Modules) -> dict[str, Any]:
    """For a record."""
    return {**asdict(lora), "targets": list(lora.of(modules)), "parameters": lora.parameters(modules)}
