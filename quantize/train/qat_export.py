"""Writes what was trained into a checkpoint, and proves it: what is stored stands for what the last pass
computed with, tensor by tensor, bit for bit. Nothing is rounded again on the way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantize.core.dequantize import dequantized, read_tensor
from quantize.core.tensors import overwrite, read_parts
from quantize.make.storage import stored_tensors
from quantize.train.loop import TrainError
from quantize.train.qat_student import Student


def stored(student: Student) -> dict[str, Tensor]:
    """Every trained tensor as it is stored, by its name in the checkpoint."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, one in student.weights.items():
            how = student.schemes[name]
            if how.activations is not None:  # fixed scales of inputs come below
                how = replace(how, activations=replace(how.activations, dynamic=True))
            dtype = one.scale.stored.dtype
            # Where they were trained: another processor's arithmetic could round one differently.
            made = stored_tensors(one.codes(), one.grid(), how, None, dtype)
            found |= {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}
        for name, first in student.firsts.items():
            if (fixed := student.inputs.get(first)) is not None:
                found[f"{name}.input_scale"] = fixed.value().to(fixed.stored.dtype)
        for name, norm in student.norms.items():
            found[f"{name}.weight"] = norm.value().to(norm.stored.dtype)
        for name, scale in student.cache.items():
            found[name] = scale.value().to(scale.stored.dtype)
    return {name: tensor.cpu() for name, tensor in found.items()}


def export(student: Student, directory: Path) -> int:
    """Put what was trained into the checkpoint in ``directory``, in place of what it was begun with, and
    compare it with what the student computes with. Returns the number of tensors that were compared.

    Raises TrainError where one is not the same in every bit.
    """
    overwrite(read_parts(directory), stored(student))
    return prove(student, directory)


def prove(student: Student, directory: Path) -> int:
    """Compare a checkpoint with what the student computes with; see :func:`export`."""
    parts = read_parts(directory)

    def refuse(name: str, same: bool) -> None:
        if not same:
            raise TrainError(
                f"{name} in {directory} is not what was trained; it is not kept: tell the maintainers"
            )

    compared = 0
    with torch.no_grad():
        for name, one in student.weights.items():
            refuse(name, torch.equal(dequantized(parts, name, student.schemes[name]), one.fake().cpu()))
            compared += 1
        values = {f"{name}.weight": norm.value() for name, norm in student.norms.items()}
        values |= {name: scale.value() for name, scale in student.cache.items()}
        for name, first in student.firsts.items():
            if first in student.inputs:
                values[f"{name}.input_scale"] = student.inputs[first].value()
        for name, value in values.items():
            refuse(name, torch.equal(read_tensor(parts[name]).float(), value.cpu()))
            compared += 1
    return compared
