"""The model that is trained, in torch: whole and trainable, or frozen, in 16 or 32 bits or in NF4.

Its tensors come from the checkpoint's files one at a time, so that loading takes no more memory than what is
loaded. On a processor 32 bits are computed in, on an accelerator the type that is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quantize.core.architectures import architecture
from quantize.core.checkpoint import Checkpoint
from quantize.core.legality import is_experts
from quantize.core.modules import Modules, read_modules
from quantize.train.loop import TrainError

if TYPE_CHECKING:
    import torch

    from quantize.make.blocks import Blocks
    from quantize.train.nf4 import Whose

Method = Literal["lora", "qlora", "full"]


@dataclass
class Base:
    """A model in memory. ``blocks`` knows its parameters' names on disk."""

    checkpoint: Checkpoint
    modules: Modules
    model: Any
    blocks: Blocks
    device: torch.device


def refuse_untrainable(checkpoint: Checkpoint, modules: Modules) -> None:
    """Raise TrainError for what is not trained here, before any work."""
    if checkpoint.config.get("quantization_config") or checkpoint.quantize_config:
        raise TrainError(
            f"{checkpoint.path} is quantized already, and rounded weights cannot be trained; give the 16-bit "
            "checkpoint that it was made from (qlora keeps that in 4 bits while it trains)"
        )
    if architecture(checkpoint.config).wrapper:
        raise TrainError(f"{checkpoint.path} is a model with images, whose text part is not trained here")
    if any(is_experts(group) for group in modules):
        raise TrainError(f"{checkpoint.path} has experts, which are not trained here; give a dense model")


def load_base(
    checkpoint: Checkpoint,
    method: Method,
    device: torch.device | str | None = None,
    nf4: str | None = None,
) -> Base:
    """The model for a method: all of it trainable in 32 bits for ``full``; frozen for ``lora``; frozen with
    linear modules in NF4 for ``qlora``, ``nf4`` saying whose (:func:`quantize.train.nf4.whose`). Raises
    TrainError for one that cannot be trained."""
    import torch

    from quantize.make.blocks import Blocks, best_device, put, serving_dtype
    from quantize.train.nf4 import whose

    modules = read_modules(checkpoint)
    refuse_untrainable(checkpoint, modules)
    where = torch.device(device) if device is not None else best_device()
    by = whose(nf4, where)
    wide = method == "full" or where.type == "cpu"
    dtype = torch.float32 if wide else serving_dtype(checkpoint)
    blocks = Blocks(checkpoint, modules, where, dtype)
    model = blocks.model
    packed = {linear.name for linear in modules.linears} if method == "qlora" else set()
    for name, parameter in list(model.named_parameters()):
        stored = blocks.stored(name)
        if not parameter.is_meta or name.startswith("lm_head") or stored is None:
            continue
        tensor = blocks.files[stored].to(where)
        if stored.removesuffix(".weight") in packed:
            _pack(model, name, tensor, blocks, by)
        elif f"{stored.rpartition('.')[0]}" not in packed:  # a bias goes with its matrix
            put(model, name, tensor.to(dtype))
    if blocks.stored("lm_head.weight") is not None and not model.config.tie_word_embeddings:
        put(model, "lm_head.weight", blocks.head())
    model.tie_weights()
    if left := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise TrainError(f"{checkpoint.path} holds no tensor for {left[0]}; download it again")
    blocks.files.close()
    if method == "full":
        model.requires_grad_(True)
    return Base(checkpoint, modules, model, blocks, where)


def _pack(model: Any, name: str, weight: torch.Tensor, blocks: Blocks, by: Whose) -> None:
    """Put a linear module in NF4 in place of the skeleton's."""
    from quantize.train.nf4 import packed

    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    bias = blocks.tensor(f"{path}.bias")
    bias = None if bias is None else bias.to(weight.device, blocks.dtype)
    setattr(model.get_submodule(parent), leaf, packed(weight, bias, blocks.dtype, by))
