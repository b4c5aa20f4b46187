"""What a target can serve of a model, and what making it will cost: all from headers, before any work.

Time and memory are :mod:`quantize.cost`'s and :mod:`quantize.plan.cost`'s.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from quantize.check_costs import basis, cost_rows, recipe_costs, size
from quantize.core.account import refuse_other_tensors
from quantize.core.architectures import architecture
from quantize.core.checkpoint import Checkpoint, CheckpointError
from quantize.core.companions import largest_token
from quantize.core.cost import Cost
from quantize.core.legality import LADDER, Target
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import uniform
from quantize.core.schemes import KV_SCHEMES, scheme
from quantize.core.tokenizer import refuse_bad_tokenizer
from quantize.make.blocks import free_room, making_room
from quantize.make.rate import Rates, machine_rates
from quantize.plan.session import SHORTLIST

SHOWN = (*LADDER, "w3a16-g128", "w2a16-g64", "w4a8-g128", "w8a8-static")
RANKS = (1, 2, 4, 8)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeRow(_Frozen):
    """One scheme on this model: in how many groups it is legal, and what it takes with bf16 elsewhere."""

    scheme: str
    legal: int
    bytes: int
    bits_per_weight: float
    problems: tuple[str, ...]
    computes: str | None
    note: str | None


class KvRow(_Frozen):
    kv: str
    bytes_per_token: int
    problem: str | None
    computes: str | None


class KeptRow(_Frozen):
    """What stays at 16 bits in every uniform variant, and its share of the smallest one's bytes."""

    what: str
    bytes: int
    share: float
    why: str

    def __str__(self) -> str:
        share = f"{self.share:.0%} of the smallest variant"
        return f"{self.what}: {size(self.bytes)} at 16 bits, {share}: {self.why}"


class CheckReport(_Frozen):
    model: str
    architecture: str
    target: str
    processor: str
    engine: str
    untried: tuple[str, ...]
    """Schemes and KV-cache types whose rules were read in the engine's sources, not run on such a machine."""
    groups: int
    weights: int
    bf16_bytes: int
    tensor_parallel: int
    schemes: tuple[SchemeRow, ...]
    kv: tuple[KvRow, ...]
    kept: tuple[KeptRow, ...]
    ranks: dict[int, str | None]
    """Tensor-parallel size to the reason why it does not fit; None where it does."""
    costs: dict[str, Cost | str]
    """Recipe, or ``plan``, to what it takes, or to why it cannot be."""
    basis: tuple[str, ...]
    """How these are known."""
    memory_free: int
    disk_free: int
    warnings: tuple[str, ...]


def refuse_unfit(checkpoint: Checkpoint) -> str:
    """The architecture, if it can be quantized, its tensors are all there, and the tokenizer fits.

    Imports transformers, and reads headers: seconds. Raises CheckpointError.
    """
    known = architecture(checkpoint.config)
    if known.refused:
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: {known.name}: {known.refused}")
    if checkpoint.config.get("quantization_config") or checkpoint.quantize_config:
        raise CheckpointError(f"{checkpoint.path} is quantized already; register it, or give its original")
    largest, vocabulary = largest_token(checkpoint.path), int(checkpoint.text_config["vocab_size"])
    if largest is not None and largest >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer's largest id is {largest}, the model's vocab_size "
            f"{vocabulary}; put the model's own tokenizer beside it"
        )
    refuse_other_tensors(checkpoint)
    refuse_bad_tokenizer(checkpoint)
    return known.name


def check_report(
    checkpoint: Checkpoint,
    target: Target,
    tensor_parallel: int = 1,
    *,
    calibration: Sequence[int],
    shipped: bool = False,
    out: Path | None = None,
    memory_free: int | None = None,
    rates: Rates | None = None,
) -> CheckReport:
    """Everything that can be said before work starts. Raises CheckpointError for a model that is unfit.

    ``calibration`` are the lengths of its conversations in tokens, which are Tiercel's own where ``shipped``;
    ``out`` is where variants would be.
    """
    architecture = refuse_unfit(checkpoint)
    modules = read_modules(checkpoint)
    rates, lengths = rates or machine_rates(), tuple(calibration)
    costs = recipe_costs(checkpoint, modules, target, lengths, rates)
    memory = _memory(memory_free)
    disk = shutil.disk_usage(_existing(out or checkpoint.path)).free
    ranks = {ranks: _fits(checkpoint, target, modules, ranks) for ranks in sorted({*RANKS, tensor_parallel})}
    rows = tuple(_scheme_row(checkpoint, target, modules, name, tensor_parallel) for name in SHOWN)
    return CheckReport(
        model=str(checkpoint.path),
        architecture=architecture,
        target=target.name,
        processor=target.processor,
        engine=target.engine,
        untried=target.untried,
        kept=tuple(kept_rows(modules, target, min(row.bytes for row in rows))),
        groups=len(modules.groups),
        weights=sum(group.weights for group in modules),
        bf16_bytes=uniform(modules, "bf16").weight_bytes(modules),
        tensor_parallel=tensor_parallel,
        schemes=rows,
        kv=tuple(_kv_row(checkpoint, target, name) for name in KV_SCHEMES),
        ranks=ranks,
        costs=costs,
        basis=tuple(basis(rates, lengths, shipped)),
        memory_free=memory[0],
        disk_free=disk,
        warnings=(*checkpoint.notes, *_warnings(costs, memory, disk, target, ranks[tensor_parallel])),
    )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _scheme_row(checkpoint: Checkpoint, target: Target, modules: Modules, name: str, ranks: int) -> SchemeRow:
    chosen = scheme(name)
    problems: dict[str, set[str]] = {}
    groups = {}
    for group in modules:
        found = target.problems(chosen, group, ranks, checkpoint.head_dim)
        groups[group.name] = "bf16" if found else name
        for problem in found:
            # The same rule broken in every layer is said once.
            why = (
                problem.rule
                if problem.value.startswith("scheme ")
                else f"{problem.value}, but {problem.rule}"
            )
            problems.setdefault(why, set()).add(group.kind)
    plan = uniform(modules, "bf16").model_copy(update={"groups": groups})
    kinds = {group.kind for group in modules}
    whys = (
        why if where == kinds else f"{', '.join(sorted(where))}: {why}" for why, where in problems.items()
    )
    return SchemeRow(
        scheme=name,
        legal=sum(how == name for how in groups.values()),
        bytes=plan.weight_bytes(modules),
        bits_per_weight=plan.bits_per_weight(modules),
        problems=tuple(whys),
        computes=target.computes(chosen),
        note=target.speed_note(chosen),
    )


def kept_rows(modules: Modules, target: Target, least: int) -> Iterable[KeptRow]:
    """Embeddings, head and towers, beside ``least`` bytes of the smallest uniform variant."""
    lookup = f"{target.name} looks embeddings up at 16 bits"
    if target.name.startswith("vllm-cuda"):
        lookup += "; its kernel for packed ones, which few architectures use, was not run"
    if modules.head is None:
        yield from _kept_row("embeddings, which are the head too", modules.embedding_bytes, least, lookup)
    else:
        taken = [name for name in target.candidates(modules.head) if name in SHORTLIST]
        why = (
            f"a plan may give it {' or '.join(taken)}, in which {target.name} serves it"
            if taken
            else f"{target.name} has no kernel for it in 8 bits"
        )
        yield from _kept_row("embeddings", modules.embedding_bytes, least, lookup)
        yield from _kept_row("output head", modules.head_bytes, least, why)
    tower = "only the text part is quantized"
    yield from _kept_row("other towers of the model", modules.tower_bytes, least, tower)


def _kept_row(what: str, size: int, least: int, why: str) -> Iterable[KeptRow]:
    if size:
        yield KeptRow(what=what, bytes=size, share=size / least, why=why)


def _kv_row(checkpoint: Checkpoint, target: Target, name: str) -> KvRow:
    config = checkpoint.text_config
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    per_token = KV_SCHEMES[name].bytes_per_token(int(config["num_hidden_layers"]), heads, checkpoint.head_dim)
    found = target.kv_problems(name, checkpoint.head_dim)
    return KvRow(
        kv=name,
        bytes_per_token=per_token,
        problem=f"{found[0].value}: {found[0].rule}" if found else None,
        computes=target.kv_computes(name),
    )


def _fits(checkpoint: Checkpoint, target: Target, modules: Modules, ranks: int) -> str | None:
    """Why the unquantized model cannot be split over that many ranks; None if it can."""
    heads = int(checkpoint.text_config["num_attention_heads"])
    kv_heads = int(checkpoint.text_config.get("num_key_value_heads") or heads)
    if heads % ranks:
        return f"{heads} attention heads are not a multiple of {ranks}"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} KV heads and {ranks} ranks: neither is a multiple of the other"
    found = target.check_plan(uniform(modules, "bf16"), modules, checkpoint.head_dim, ranks)
    return str(found[0]) if found else None


def _warnings(
    costs: Mapping[str, Cost | str],
    memory: tuple[int, int],
    disk: int,
    target: Target,
    unsplit: str | None,
) -> Iterable[str]:
    if unsplit:
        yield f"tensor parallelism: {unsplit}; choose a size that fits"
    known = [cost for cost in costs.values() if isinstance(cost, Cost)]
    yield from _shortages(known, sum(cost.disk_bytes for cost in known), memory, disk)
    if target.untried:
        yield (
            f"of {target.name}, these rules were read in {target.engine}'s sources and not run on such a "
            f"machine: {', '.join(target.untried)}"
        )


def _memory(free: int | None) -> tuple[int, int]:
    """Bytes that are free for making, which uses one device, and for that and an engine, which may use more;
    ``free`` for both where it is given."""
    return (making_room(), free_room()) if free is None else (free, free)


def _shortages(costs: Sequence[Cost], disk_needed: int, memory: tuple[int, int], disk: int) -> Iterable[str]:
    needs = [pair for c in costs for pair in zip((c.making_bytes, c.memory_bytes), memory, strict=True)]
    if short := [(needed, free) for needed, free in needs if needed > free]:
        most, free = max(short)
        yield (
            f"memory: calibration needs about {size(most)}, free are {size(free)}; "
            "use fewer calibration tokens, method rtn, or a larger machine"
        )
    if disk_needed > disk:
        many = f"{len(costs)} variants" if len(costs) > 1 else "a variant"
        copied = disk_needed > sum(cost.disk_bytes for cost in costs)
        many += " and the reference take" if copied else " take" if len(costs) > 1 else " takes"
        yield f"disk: {many} up to {size(disk_needed)}, free are {size(disk)}; make room first"


def refuse_short(
    costs: Cost | Sequence[Cost],
    out: Path,
    memory_free: int | None = None,
    disk_free: int | None = None,
    more_bytes: int = 0,
) -> None:
    """Raise CheckpointError, before any work, when memory or the disk of ``out`` cannot hold it.

    Several ``costs`` are of variants that are made one after another and all kept: the most memory and the
    sum of their bytes count. ``more_bytes`` are taken beside them, such as a copy of the reference.
    """
    together = [costs] if isinstance(costs, Cost) else list(costs)
    disk = shutil.disk_usage(_existing(out)).free if disk_free is None else disk_free
    needed = sum(cost.disk_bytes for cost in together) + more_bytes
    if found := list(_shortages(together, needed, _memory(memory_free), disk)):
        raise CheckpointError("; ".join(found))


def reference_bytes(checkpoint: Checkpoint, out: Path) -> int:
    """Bytes that a copy of the checkpoint takes on the disk of ``out``: none where files can be linked."""
    there = _existing(out).stat().st_dev
    taken = 0
    for name in checkpoint.files:
        status = (checkpoint.path / name).stat()
        linked = status.st_dev == there and status.st_uid in (os.geteuid(), 0)
        taken += 0 if linked else status.st_size
    return taken


def refuse_pattern(path: Path, name: str = "variants_dir") -> None:
    """Raise CheckpointError for a directory whose name vLLM reads as a pattern: it finds no weights there."""
    if found := sorted(set("*?[") & set(str(path))):
        raise CheckpointError(
            f"{name} {path} has {' and '.join(found)} in its path, which vLLM reads as a "
            "pattern and finds no weights by; choose a path without"
        )


def format_check(report: CheckReport) -> str:
    """The report for a terminal."""
    lines = [
        f"{report.model}: {report.architecture}, {report.groups} module groups, "
        f"{report.weights / 1e6:.1f} M weights to quantize, {size(report.bf16_bytes)} at bf16",
        f"target {report.target}: {report.engine} on {report.processor}"
        + (f", {report.tensor_parallel} ranks" if report.tensor_parallel > 1 else ""),
        "",
    ]
    rows = [["scheme", "groups", "bytes", "bits/weight", ""]]
    for row in report.schemes:
        share = f"{row.legal}/{report.groups}"
        said = [*(["computes " + row.computes] if row.computes and row.legal else [])]
        said += [row.note] if row.note and row.legal else []
        said += row.problems[:2]
        more = [f"and {len(row.problems) - 2} reasons more"] if len(row.problems) > 2 else []
        figures = [size(row.bytes), f"{row.bits_per_weight:.2f}"] if row.legal else ["-", "-"]
        rows.append([row.scheme, share if row.legal else "no", *figures, "; ".join(said + more)])
    lines += [*_table(rows), "where a scheme is not legal in all groups, bytes are with bf16 in the rest", ""]
    lines += map(str, report.kept)
    lines += [""]
    rows = [["KV cache", "bytes/token", ""]]
    for cache in report.kv:
        said_kv = cache.problem or (f"computes {cache.computes}" if cache.computes else "")
        rows.append([cache.kv, "no" if cache.problem else str(cache.bytes_per_token), said_kv])
    lines += [*_table(rows), ""]
    lines += [f"{ranks} ranks: {why or 'fits'}" for ranks, why in report.ranks.items()]
    lines += ["", *_table(cost_rows(report.costs)), *report.basis]
    free = f"free: {size(report.memory_free)} of memory, {size(report.disk_free)} of disk"
    lines += [free, *(f"warning: {warning}" for warning in report.warnings)]
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
