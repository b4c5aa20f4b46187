"""An adapter that makes up for a part of what quantization lost: the best product of rank r for each matrix.

Of a matrix W that is stored as Q, the factors B (N, r) and A (r, K) are those with the least error of
outputs, E|(W - Q - B A) x|², on what goes into the module of the unquantized model. By Eckart and Young they
are the truncated singular values of (W - Q) L, where E[x xᵀ] = L Lᵀ
(:func:`quantize.compact.choose.low_rank`; arXiv:2402.02446, arXiv:2410.06040). Nothing is trained.

It is written as a LoRA adapter in PEFT's format, in the type that is served, so that an engine adds it to the
quantized modules: r (N + K) numbers of 16 bits a matrix, and as many products more.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from quantize.compact.choose import low_rank, relative_error
from quantize.compact.steps import CompactError
from quantize.core.checkpoint import Checkpoint
from quantize.core.dequantize import linear_weight
from quantize.core.engine_figures import RANKS
from quantize.core.files import write_whole
from quantize.core.legality import is_experts
from quantize.core.modules import HEAD, Group, Linear, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import BF16_BYTES, scheme
from quantize.core.tensors import Part, read_parts
from quantize.make.blocks import Blocks
from quantize.make.smooth import Scales, ScaleStore, unfolded
from quantize.make.statistics import first_of, observe
from quantize.train.adapters import PREFIX, write_files

if TYPE_CHECKING:
    from torch import Tensor

REPORT = "compensation.json"
"""Beside the adapter: what it makes up for."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MatrixCompensated(_Frozen):
    """Of one matrix: E|(Ŵ - W) x|² over E|W x|², its root."""

    module: str
    before: float
    after: float


class Compensation(_Frozen):
    """What an adapter makes up for."""

    rank: int
    numbers: int = Field(description="that the adapter holds")
    bytes: int = Field(description="of them, at 16 bits")
    quantized_bytes: int = Field(description="of all weights without it")
    matrices: tuple[MatrixCompensated, ...]

    @property
    def before(self) -> float:
        """Mean relative error of outputs without the adapter."""
        return sum(one.before for one in self.matrices) / len(self.matrices)

    @property
    def after(self) -> float:
        return sum(one.after for one in self.matrices) / len(self.matrices)


def refuse_uncompensated(modules: Modules, rank: int) -> None:
    """Raise CompactError for what gets no adapter here, whatever is quantized of it; before any work."""
    if not 1 <= rank <= RANKS[-1]:
        raise CompactError(f"rank: {rank}; is from 1 to {RANKS[-1]}, which engines take at most")
    if any(is_experts(group) for group in modules):
        raise CompactError("experts get no adapters here; give a dense model")
    members = (member for group in modules if group.kind != HEAD for member in group.members)
    least = min(members, key=_full_rank)
    if rank >= _full_rank(least):
        raise CompactError(
            f"rank: {rank}; {least.name} has {least.out_features} outputs and {least.in_features} inputs, "
            f"of which an adapter of rank {_full_rank(least)} is the whole matrix; take less"
        )


def compensate(
    checkpoint: Checkpoint,
    modules: Modules,
    plan: Plan,
    quantized: Path,
    scales: ScaleStore | None,
    sequences: Sequence[Sequence[int]],
    rank: int,
    out: Path,
) -> Compensation:
    """Write the adapter of what ``quantized``, made of ``checkpoint`` by ``plan``, has lost, to ``out``.

    ``scales`` are the smoothing scales that it stands under. ``sequences`` are token ids of calibration. Of
    the model one block is in memory at a time. Raises CompactError before any work.
    """
    refuse_uncompensated(modules, rank)
    if not (wanted := _quantized(modules, plan)):
        raise CompactError("the variant keeps its matrices in 16 bits: there is nothing to make up for")
    stored = read_parts(quantized)
    blocks = Blocks(checkpoint, modules)
    states = blocks.start(sequences)
    tensors: dict[str, Tensor] = {}
    rows: list[MatrixCompensated] = []
    for layer in tqdm(range(len(blocks)), desc=f"rank {rank}", unit="block", file=sys.stderr):
        mine = [group for group in wanted if group.layer == layer]
        under = scales.of(layer) if scales is not None else {}
        with blocks.loaded(layer):
            inputs = observe(blocks, layer, states, mine, {group.name for group in mine}).inputs
        for group in mine:
            for member in group.members:
                moments = inputs[first_of(group, member.name)].moments
                row, factors = _matrix(blocks, stored, plan, group, member, moments, under, rank)
                rows.append(row)
                tensors |= factors
    return _written(checkpoint, modules, plan, tensors, rows, rank, out)


def _matrix(
    blocks: Blocks,
    stored: dict[str, Part],
    plan: Plan,
    group: Group,
    member: Linear,
    moments: Tensor,
    scales: Scales,
    rank: int,
) -> tuple[MatrixCompensated, dict[str, Tensor]]:
    """Both factors of one matrix by their names in PEFT's format, in the basis that the variant stands in.

    They are found in the checkpoint's own: there its inputs are known, and an error of an output counts as
    much as it does in the model.
    """
    weight = blocks.files[f"{member.name}.weight"].to(blocks.device).float()
    kept = linear_weight(stored, member.name, scheme(plan.groups[group.name])).to(blocks.device)
    other = unfolded(member, kept, scales)
    found = low_rank(weight - other, rank, moments)
    left, right = found.left, found.right
    columns, rows = scales.get(f"{member.name}.columns"), scales.get(f"{member.name}.rows")
    if columns is not None:
        right = right * columns.to(right.device)
    if rows is not None:
        left = left / rows.to(left.device).unsqueeze(1)
    left, right = left.to(blocks.dtype), right.to(blocks.dtype)
    served = unfolded(member, kept + left.float() @ right.float(), scales)
    row = MatrixCompensated(
        module=member.name,
        before=float(f"{relative_error(weight, other, moments):.4g}"),
        after=float(f"{relative_error(weight, served, moments):.4g}"),
    )
    name = f"{PREFIX}{member.name}"
    return row, {
        f"{name}.lora_A.weight": right.cpu().contiguous(),
        f"{name}.lora_B.weight": left.cpu().contiguous(),
    }


def _written(
    checkpoint: Checkpoint,
    modules: Modules,
    plan: Plan,
    tensors: dict[str, Tensor],
    rows: Sequence[MatrixCompensated],
    rank: int,
    out: Path,
) -> Compensation:
    from peft import LoraConfig

    numbers = sum(tensor.numel() for tensor in tensors.values())
    done = Compensation(
        rank=rank,
        numbers=numbers,
        bytes=BF16_BYTES * numbers,
        quantized_bytes=plan.weight_bytes(modules),
        matrices=tuple(rows),
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,  # so that the product is added as it is
        target_modules=sorted({row.module.rpartition(".")[2] for row in rows}),
        base_model_name_or_path=checkpoint.path.resolve().name,
    )
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    write_files(partial, config.to_dict(), tensors)
    write_whole(partial / REPORT, done.model_dump_json(indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return done


def _quantized(modules: Modules, plan: Plan) -> list[Group]:
    """Groups of blocks that the plan quantizes."""
    return [
        group
        for group in modules
        if group.kind != HEAD and scheme(plan.groups[group.name]).weights is not None
    ]


def _full_rank(linear: Linear) -> int:
    return min(linear.out_features, linear.in_features)
