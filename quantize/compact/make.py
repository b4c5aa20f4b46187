"""Takes one step on a checkpoint: block by block, a new checkpoint directory out, which is a model again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from quantize.compact import choose
from quantize.compact.layers import without_layers
from quantize.compact.outliers import kept_high
from quantize.compact.steps import CompactError, Step
from quantize.core.account import refuse_other_tensors
from quantize.core.architectures import architecture
from quantize.core.checkpoint import Checkpoint, CheckpointError, copy_companions, open_checkpoint
from quantize.core.files import write_whole
from quantize.core.modules import Group, Modules, read_modules
from quantize.core.tensors import Part, read_file_parts, read_parts, write_shards
from quantize.make.blocks import Blocks, States
from quantize.make.smooth import DOWN, GATE_UP, OUT, QKV, save_whole
from quantize.make.statistics import InputStatistics, first_of, observe
from quantize.numerics.quantizers import quantizer

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = (QKV, OUT, GATE_UP, DOWN)
REPORT = "compaction.json"
"""Beside the weights: what was taken out."""
MULTIPLE = 64
"""MLP channels that are left are a multiple of this, so that group scales and kernels still fit."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupTaken(_Frozen):
    """Of one module group: what share of its weights is left, and what that does to its outputs."""

    group: str
    kind: str
    layer: int
    left: float = Field(description="weights that are not zero or gone; of factors, the numbers they hold")
    error: float = Field(
        description="|W'x - Wx| / |Wx|; but for svd, inputs are taken for uncorrelated there"
    )


class Taken(_Frozen):
    """One step, done."""

    step: str
    exploited: str
    parameters_before: int
    parameters_after: int = Field(description="stored, zeros included")
    zeros: int = Field(description="of them")
    bytes_before: int
    bytes_after: int
    bytes_named: int | None = Field(
        default=None, description="that a format would take which no engine here has: of sparse beside dense"
    )
    what: str = Field(description="what went, in words")
    groups: tuple[GroupTaken, ...]


def take(checkpoint: Checkpoint, step: Step, sequences: Sequence[Sequence[int]], out: Path) -> Taken:
    """Take ``step`` and write the model to ``out``, which must not exist. ``sequences`` are token ids of
    calibration; magnitudes need none. Raises CompactError before any work."""
    modules = read_modules(checkpoint)
    refuse(checkpoint, modules, step, out)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        work = _Work(checkpoint, modules, step, partial / ".blocks")
        parts, config, what = work.layers(sequences) if step.kind == "layers" else work.matrices(sequences)
        write_shards(parts, partial)
        write_whole(partial / "config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(checkpoint, partial)
        done = _account(checkpoint, step, parts, what, work)
        write_whole(partial / REPORT, done.model_dump_json(indent=1) + "\n")
        shutil.rmtree(partial / ".blocks", ignore_errors=True)
        _refuse_misfit(checkpoint, step, partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return done


def _refuse_misfit(checkpoint: Checkpoint, step: Step, made: Path) -> None:
    """Raise CompactError where ``made`` is no model: its tensors are not those of its configuration."""
    try:
        refuse_other_tensors(open_checkpoint(made))
    except CheckpointError as error:
        raise CompactError(
            f"{step.name}: {checkpoint.path} has tensors that do not go with what is cut ({error}); "
            "take a mask"
        ) from None


def refuse(checkpoint: Checkpoint, modules: Modules, step: Step, out: Path) -> None:
    """Raise CompactError where the step cannot be taken."""
    if out.exists():
        raise CompactError(f"{out} exists; name another directory")
    if architecture(checkpoint.config).wrapper:
        raise CompactError(f"{checkpoint.path}: multimodal wrappers are not taken apart; give a text model")
    kinds = {group.kind for group in modules}
    if step.kind in ("neurons", "heads") and not kinds <= set(KNOWN):
        other = ", ".join(sorted(kinds - set(KNOWN)))
        raise CompactError(f"{step.name}: {other} is not cut here; take a mask, or layers")
    if step.kind in ("wanda", "svd", "outliers") and any(kind.endswith("experts") for kind in kinds):
        raise CompactError(f"{step.name}: experts are not looked at here; take magnitude, or layers")
    config = checkpoint.text_config
    if step.kind == "layers" and step.amount >= config["num_hidden_layers"]:
        raise CompactError(f"{step.name}: the model has {config['num_hidden_layers']} layers; take fewer")
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    if step.kind == "heads" and step.amount >= heads:
        raise CompactError(f"{step.name}: a layer has {heads} key-value heads; take fewer")
    if step.kind == "neurons" and neurons_left(config["intermediate_size"], step.amount) < MULTIPLE:
        raise CompactError(f"{step.name}: of {config['intermediate_size']} channels none would be left")
    if step.of_four and (bad := [one for one in modules.linears if one.in_features % 4]):
        raise CompactError(f"{step.name}: {bad[0].name} has {bad[0].in_features} inputs, no multiple of 4")


def neurons_left(size: int, share: float) -> int:
    """Channels that are left of ``size``, a multiple of :data:`MULTIPLE` where ``size`` is one."""
    left = round(size * (1 - share))
    return left // MULTIPLE * MULTIPLE if size % MULTIPLE == 0 else left


class _Work:
    """What a step needs while it goes through the blocks."""

    def __init__(self, checkpoint: Checkpoint, modules: Modules, step: Step, blocks: Path) -> None:
        self.checkpoint, self.modules, self.step = checkpoint, modules, step
        self.directory = blocks
        self.parts: dict[str, Part] = read_parts(checkpoint.path)
        self.rows: list[GroupTaken] = []
        self.zeros = self.outliers = 0
        self.named_bits = 0.0
        """Of quantized matrices and the outliers beside them."""

    def layers(self, sequences: Sequence[Sequence[int]]) -> tuple[dict[str, Part], dict[str, Any], str]:
        """The model without the layers whose output is most like their input."""
        influence = _influences(self.checkpoint, self.modules, sequences)
        gone = sorted(sorted(range(len(influence)), key=influence.__getitem__)[: int(self.step.amount)])
        left = [layer for layer in range(len(influence)) if layer not in gone]
        known, found = architecture(self.checkpoint.config), dict[str, Part]()
        for name, part in self.parts.items():
            place = known.locate(name)
            if place is None:
                found[name] = part
            elif place[1] in left:
                prefix = place[0].removesuffix(f"{place[1]}.")
                found[f"{prefix}{left.index(place[1])}.{place[2]}"] = part
        config = without_layers(self.checkpoint, left)
        told = ", ".join(f"{layer} ({influence[layer]:.3f})" for layer in gone)
        return found, config, f"layers, with 1 - cos(input, output): {told}"

    def matrices(self, sequences: Sequence[Sequence[int]]) -> tuple[dict[str, Part], dict[str, Any], str]:
        """The model with other matrices, block by block; each block sees what those before it became."""
        self.directory.mkdir(parents=True)
        blocks = Blocks(self.checkpoint, self.modules)
        states = blocks.start(sequences, copies=2) if self.step.needs_data else None
        for layer in tqdm(range(len(blocks)), desc=self.step.name, unit="block", file=sys.stderr):
            with blocks.loaded(layer):
                made = self._block(blocks, layer, states)
            file = self.directory / f"{layer}.safetensors"
            save_whole(made, file)
            self.parts |= read_file_parts(file)
        config = dict(self.checkpoint.config)
        what = f"{self.zeros:,} weights are zero" if self.step.masks else "singular values"
        match self.step.kind:
            case "neurons":
                left = neurons_left(config["intermediate_size"], self.step.amount)
                size, config["intermediate_size"] = config["intermediate_size"], left
                what = f"{size - left} of {size} MLP channels a layer"
            case "outliers":
                count = sum(linear.weights for linear in self.modules.linears)
                bits = self.named_bits / count
                what = f"{self.outliers:,} weights stay in 16 bits; {bits:.2f} bits a weight in all"
            case "heads":
                heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
                left = heads - int(self.step.amount)
                what = f"{int(self.step.amount)} of {heads} key-value heads a layer, with their query heads"
                config["num_attention_heads"] = config["num_attention_heads"] // heads * left
                config["num_key_value_heads"] = left
                config["head_dim"] = self.checkpoint.head_dim
        return self.parts, config, what

    def _block(self, blocks: Blocks, layer: int, states: States | None) -> dict[str, Tensor]:
        """New tensors of a loaded block; its own weights become what they stand for, and with ``states``
        hidden states go through it."""
        mine = [group for group in self.modules if group.layer == layer]
        inputs: dict[str, InputStatistics] = {}
        before = []
        if states is not None:
            before = [states.room(batch.hidden).copy_(batch.hidden) for batch in states.batches]
            whole = {group.name for group in mine} if self.step.kind == "svd" else set()
            inputs = observe(blocks, layer, states, mine, whole).inputs
        importance = {
            member.name: inputs[first].moments
            for group in mine
            for member in group.members
            if (first := first_of(group, member.name)) in inputs
        }
        made = self._made(blocks, mine, importance)
        if states is not None:
            for batch, hidden in zip(states.batches, before, strict=True):
                batch.hidden.copy_(hidden)
            blocks.forward(layer, states)
        return made

    def _made(
        self, blocks: Blocks, groups: Sequence[Group], importance: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.step.kind in ("neurons", "heads"):
            return self._cut(blocks, {group.kind: group for group in groups}, importance)
        made: dict[str, Tensor] = {}
        for group in groups:
            left, error, total = 0.0, 0.0, 0
            for member in group.members:
                place, e = blocks.places[member.name], importance.get(member.name)
                weight = place.weight.float()
                other, numbers = self._other(weight, e)
                other = other.to(blocks.dtype)
                error += choose.relative_error(weight, other, e) ** 2 * weight.numel()
                left, total = left + numbers, total + weight.numel()
                place.write(other)
                made[f"{member.name}.weight"] = other.cpu().contiguous()
            self._row(group, left / total, (error / total) ** 0.5)
        return made

    def _other(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, float]:
        """The matrix that takes its place, and the numbers that it holds."""
        if self.step.kind == "svd":
            shape = (weight.shape[0], weight.shape[1])
            found = choose.low_rank(weight, choose.rank_for(shape, self.step.amount), importance)
            return found.product(), found.numbers
        if self.step.kind == "outliers":
            both = kept_high(weight, quantizer(self.step.quantizer), self.step.amount, importance)
            self.outliers += both.outliers
            self.named_bits += both.bits
            return both.weight, weight.numel()
        of = choose.scores(weight, importance if self.step.kind == "wanda" else None)
        mask = choose.kept_of_four(of) if self.step.of_four else choose.kept(of, self.step.amount)
        stays = int(mask.sum())
        self.zeros += weight.numel() - stays
        return weight * mask, stays

    def _cut(
        self, blocks: Blocks, groups: Mapping[str, Group], importance: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Smaller matrices of a block. In the block itself the channels that go are zeros where they are
        read."""
        import torch

        reader, makers = (DOWN, GATE_UP) if self.step.kind == "neurons" else (OUT, QKV)
        (reading,) = groups[reader].members
        place = blocks.places[reading.name]
        weight = place.weight
        of = choose.channel_scores(weight, importance[reading.name])
        if self.step.kind == "neurons":
            drop = len(of) - neurons_left(len(of), self.step.amount)
            columns = choose.kept_channels(of, drop)
            fused = torch.cat([columns, columns + len(of)])
            rows = {
                member.name: fused if member.name.endswith(GATE_UP) else columns
                for member in groups[makers].members
            }
        else:
            columns, rows = self._heads(of, groups[makers])
        made = {f"{reading.name}.weight": weight[:, columns].cpu().contiguous()}
        mask = torch.zeros(weight.shape[1], device=weight.device)
        mask[columns] = 1
        share = float(mask.mean())
        self._row(
            groups[reader],
            share,
            choose.relative_error(weight, weight.float() * mask, importance[reading.name]),
        )
        place.write(weight.float() * mask)
        for member in groups[makers].members:
            parent = blocks.places[member.name].module
            for leaf, tensor in dict(parent.named_parameters()).items():
                made[f"{member.name}.{leaf}"] = tensor.data[rows[member.name]].cpu().contiguous()
        self._row(groups[makers], share, 0.0)
        return made

    def _heads(self, of: Tensor, makers: Group) -> tuple[Tensor, dict[str, Tensor]]:
        """Channels of the heads that stay: those that the output projection reads, and the rows of what makes
        queries, keys and values."""
        import torch

        config, size = self.checkpoint.text_config, self.checkpoint.head_dim
        queries = int(config["num_attention_heads"])
        heads = int(config.get("num_key_value_heads") or queries)
        each = queries // heads
        chosen = choose.kept_channels(of.reshape(heads, each * size).sum(1), int(self.step.amount))
        wide, narrow = choose.head_channels(chosen, each * size), choose.head_channels(chosen, size)
        fused = torch.cat([wide, narrow + queries * size, narrow + (queries + heads) * size])
        rows = {"q_proj": wide, "qkv_proj": fused}
        return wide, {one.name: rows.get(one.name.rpartition(".")[2], narrow) for one in makers.members}

    def _row(self, group: Group, left: float, error: float) -> None:
        self.rows.append(
            GroupTaken(
                group=group.name,
                kind=group.kind,
                layer=group.layer,
                left=round(left, 4),
                error=float(f"{error:.4g}"),
            )
        )


def _influences(checkpoint: Checkpoint, modules: Modules, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Of every layer, the mean over tokens of 1 - cos(input, output)."""
    import torch

    blocks = Blocks(checkpoint, modules)
    states = blocks.start(sequences, copies=2)
    found = []
    for layer in tqdm(range(len(blocks)), desc="layers", unit="block", file=sys.stderr):
        before = [batch.hidden.clone() for batch in states.batches]
        with blocks.loaded(layer):
            blocks.forward(layer, states)
        turned = [
            torch.nn.functional.cosine_similarity(
                old[batch.real].float(), batch.hidden[batch.real].float(), -1
            )
            for old, batch in zip(before, states.batches, strict=True)
        ]
        found.append(1 - float(torch.cat(turned).mean()))
    return found


def _account(checkpoint: Checkpoint, step: Step, parts: Mapping[str, Part], what: str, work: _Work) -> Taken:
    def count(shapes: Sequence[Sequence[int]]) -> int:
        total = 0
        for shape in shapes:
            size = 1
            for one in shape:
                size *= one
            total += size
        return total

    before = read_parts(checkpoint.path)
    named = None
    if step.kind == "outliers":
        linears = {f"{linear.name}.weight" for linear in work.modules.linears}
        others = sum(part.bytes for name, part in before.items() if name not in linears)
        named = others + round(work.named_bits / 8)
    return Taken(
        step=step.name,
        exploited=step.exploited,
        parameters_before=count([part.shape for part in before.values()]),
        parameters_after=count([part.shape for part in parts.values()]),
        zeros=work.zeros,
        bytes_before=sum(part.bytes for part in before.values()),
        bytes_after=sum(part.bytes for part in parts.values()),
        bytes_named=named,
        what=what,
        groups=tuple(work.rows),
    )
