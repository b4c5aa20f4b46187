"""Makes parts of variants in one pass over the model: block by block, all schemes and methods together.

Per block: its weights are mapped, calibration's hidden states go through it, and what went into its
linears (:mod:`quantize.make.statistics`) serves every scheme and method. Inputs are those of the unquantized
model, so that a part does not depend on what the groups before it became, and any mixture of parts fits. Of
the transforms ``smooth`` is made here: its scales are found once per block, from the same pass, and kept.

Memory: one block, its second moments (4 K² bytes per kind of input), hidden states (on disk where they are
many), and what GPTQ works on. Ranges alone, without data (``rtn``, ``mse``), take no pass at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from quantize.core.checkpoint import Checkpoint
from quantize.core.methods import SMOOTH, Method, MethodError, independent, parse_method
from quantize.core.modules import HEAD, Group, Modules
from quantize.core.schemes import Scheme, scheme
from quantize.make.blocks import Blocks, Files, best_device, serving_dtype
from quantize.make.gptq import gptq
from quantize.make.ranges import Grid, find_grid, restored, rounded
from quantize.make.smooth import Scales, ScaleStore, block_scales, folded, places, smoothable
from quantize.make.statistics import BlockStatistics, InputStatistics, first_of, observe
from quantize.make.storage import stored_tensors
from quantize.make.threads import each_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Choice = tuple[str, str]
"""A scheme and a method."""
Keep = Callable[[Group, Choice, Mapping[str, "Tensor"]], None]
"""Is given a finished part: its tensors by their names in the checkpoint."""
KeepKv = Callable[[int, float, "Tensor"], None]
"""Is given a block's number, its largest |key|, and its largest |value| by head and channel."""
RANGES = {"memoryless_minmax": "minmax", "memoryless_mse": "mse", "imatrix_mse": "imatrix"}
MAX_ROUND_TRIP_ERROR = 0.75
"""Relative error of a stored weight above which it cannot be right: 2-bit rounding stays below."""


class QuantizeError(RuntimeError):
    """The variant cannot be made. The text says why and what to change."""


def streams(choice: Choice) -> bool:
    """Whether a choice is made here; others are llm-compressor's (transforms, AutoRound, 4-bit floats)."""
    how, method = scheme(choice[0]), parse_method(choice[1])
    if method.trained or method.transforms not in ((), (SMOOTH,)) or method.solver == "autoround":
        return False
    if how.weights is None:
        return True
    if how.weights.kind == "float":
        return how.weights.bits == 8 and not method.by_columns
    return True


def needs_data(choice: Choice) -> bool:
    """Whether calibration data decide anything of the part."""
    how, method = scheme(choice[0]), parse_method(choice[1])
    return how.weights is not None and (
        how.needs_calibration or method.by_columns or method.observer == "imatrix_mse"
    )


def refuse_choice(choice: Choice) -> None:
    """Raise MethodError, before any work, for a scheme that a method does not make."""
    name, method = choice
    if smoothed(choice) and scheme(name).needs_calibration:
        raise MethodError(
            f"{name} by {method}: fixed scales of inputs are not measured behind smoothing; take a scheme "
            "that scales inputs by token, such as w8a8 or fp8-dynamic"
        )
    if parse_method(method).asymmetric and not streams(choice):
        raise MethodError(f"{name} by {method}: gptaq rounds to integers alone; take {independent(method)}")


def smoothed(choice: Choice) -> bool:
    """Whether the part is of the model with smoothing scales."""
    return SMOOTH in parse_method(choice[1]).transforms


def make_parts(
    checkpoint: Checkpoint,
    modules: Modules,
    wanted: Mapping[str, Sequence[Choice]],
    sequences: Sequence[Sequence[int]],
    keep: Keep,
    keep_kv: KeepKv | None = None,
    device: torch.device | None = None,
    label: str = "quantize",
    scales: ScaleStore | None = None,
) -> None:
    """Make the ``wanted`` parts, choices by group name, and hand each to ``keep`` as it is finished.

    With ``keep_kv``, keys and values are measured as well. With ``scales``, smoothing scales of the blocks
    that it has none of are made and kept there. ``sequences`` are calibration's token ids, needed for methods
    with data and for the KV cache. Raises QuantizeError for a damaged weight or inputs that are not finite.
    """
    groups = [group for group in modules if wanted.get(group.name)]
    data = {group.name for group in groups if any(map(needs_data, wanted[group.name]))}
    missing = scales.missing(modules.layers) if scales is not None else set()
    _refuse(groups, wanted, data, scales)
    if (data or keep_kv or missing) and not sequences:
        raise QuantizeError("these methods need calibration data; set calibration in the YAML")
    if data or keep_kv or missing:
        refuse_short_sequences(sequences)
    where = device or best_device()
    if not data and keep_kv is None and not missing:
        files = Files(checkpoint.path)
        dtype = serving_dtype(checkpoint)
        with tqdm(total=len(groups), desc=label, unit="group", file=sys.stderr) as bar:

            def work(group: Group) -> None:
                _make_group(group, wanted[group.name], files, None, where, dtype, keep, scales)
                bar.update()

            each_on(where, work, groups)
        return
    chosen = places(sequences)
    if not data and keep_kv is None:  # the rows that are sampled are all that is wanted
        sequences = [sequences[number] for number in chosen]
        chosen = dict(enumerate(chosen.values()))
    blocks = Blocks(checkpoint, modules, where)
    states = blocks.start(sequences)
    last = max(missing | {g.layer for g in groups if g.name in data}, default=-1)
    last = last if keep_kv is None else len(blocks) - 1
    full = {name for name in data if any(parse_method(m).by_columns for _, m in wanted[name])}
    for layer in tqdm(range(len(blocks)), desc=label, unit="block", file=sys.stderr):
        mine = [group for group in groups if group.layer == layer]
        found = None
        if layer <= last:
            to_smooth = smoothable(checkpoint.config, modules, layer) if layer in missing else []
            measured = [group for group in mine if group.name in data]
            with blocks.loaded(layer):
                found = observe(blocks, layer, states, measured, full, to_smooth, chosen)
            if keep_kv is not None:
                keep_kv(layer, found.keys, found.values)
            if scales is not None and layer in missing:
                made = block_scales(
                    checkpoint, to_smooth, found.rows, found.energy, blocks.files, blocks.dtype
                )
                scales.keep(layer, made)
        for group in mine:
            _make_group(group, wanted[group.name], blocks.files, found, where, blocks.dtype, keep, scales)
    for group in groups:
        if group.kind == HEAD:
            _make_group(group, wanted[group.name], blocks.files, None, where, blocks.dtype, keep, scales)


def _refuse(
    groups: Sequence[Group],
    wanted: Mapping[str, Sequence[Choice]],
    data: Collection[str],
    scales: ScaleStore | None,
) -> None:
    """Raise before any work what cannot be made."""
    for group in groups:
        if group.kind == HEAD and group.name in data:
            raise QuantizeError("the head is quantized by ranges alone, without data: rtn or mse")
        for name, method in wanted[group.name]:
            if parse_method(method).asymmetric:
                raise MethodError(
                    f"{name} by {method} is made for one plan, in its order; parts that plans share are made "
                    f"by {independent(method)}"
                )
            refuse_choice((name, method))
            if smoothed((name, method)) and scales is None:
                raise ValueError("smoothed parts need a store of scales")


def _make_group(
    group: Group,
    choices: Sequence[Choice],
    files: Files,
    statistics: BlockStatistics | None,
    device: torch.device,
    dtype: torch.dtype,
    keep: Keep,
    store: ScaleStore | None,
) -> None:
    """Make all parts of one group: those by GPTQ together, per input that they share."""
    for smooth in (False, True):
        mine = [choice for choice in choices if smoothed(choice) == smooth]
        found = store.of(group.layer) if smooth and mine and store and group.kind != HEAD else {}
        if mine:
            _make_choices(group, mine, files, statistics, device, dtype, keep, found)


def _make_choices(
    group: Group,
    choices: Sequence[Choice],
    files: Files,
    statistics: BlockStatistics | None,
    device: torch.device,
    dtype: torch.dtype,
    keep: Keep,
    scales: Scales,
) -> None:
    """Those parts of one group that are of the model with ``scales``."""
    weights = {member.name: _weight(files, member.name, device, scales) for member in group.members}
    by_input: dict[str, list[str]] = {}
    for name in weights:
        by_input.setdefault(first_of(group, name), []).append(name)
    tensors: dict[Choice, dict[str, Tensor]] = {choice: {} for choice in choices}
    for choice in choices:
        if scheme(choice[0]).weights is None:
            tensors[choice] = {f"{name}.weight": weight.to(dtype).cpu() for name, weight in weights.items()}
    quantized = [choice for choice in choices if scheme(choice[0]).weights is not None]
    for first, names in by_input.items():
        inputs = statistics.inputs.get(first) if statistics else None
        if inputs is not None and (columns := scales.get(f"{first}.columns")) is not None:
            inputs = inputs.divided(columns.to(device))
        tasks = [(name, choice) for choice in quantized for name in names]
        largest = statistics.largest(group, first) if statistics else None
        for (_, choice), made in zip(tasks, solved(tasks, weights, inputs, dtype, largest), strict=True):
            tensors[choice] |= made
    for choice, made in tensors.items():
        keep(group, choice, made)


def solved(
    tasks: Sequence[tuple[str, Choice]],
    weights: Mapping[str, Tensor],
    inputs: InputStatistics | None,
    dtype: torch.dtype,
    largest: float | None = None,
) -> list[dict[str, Tensor]]:
    """Stored tensors of (linear, choice) pairs that share ``inputs``; those by GPTQ are solved together.

    ``largest`` |x| is what a fixed scale of inputs is made from. Raises QuantizeError for inputs that are not
    finite.
    """
    if inputs is not None and tasks:
        refuse_infinite(tasks[0][0], inputs.moments)

    def grid_of(task: tuple[str, Choice]) -> Grid:
        name, (scheme_name, method) = task
        return _grid(weights[name], scheme(scheme_name), parse_method(method), inputs, dtype)

    device = weights[tasks[0][0]].device if tasks else best_device()
    grids = each_on(device, grid_of, tasks)
    integers = {}
    if inputs is not None:
        numbers = [n for n, (_, choice) in enumerate(tasks) if parse_method(choice[1]).by_columns]
        if numbers:
            found = gptq([(weights[tasks[n][0]], grids[n]) for n in numbers], inputs.moments)
            integers = dict(zip(numbers, found, strict=True))

    def stored(number: int) -> dict[str, Tensor]:
        (name, choice), grid = tasks[number], grids[number]
        q = integers[number] if number in integers else rounded(weights[name], grid)
        return _checked(name, weights[name], q, grid, scheme(choice[0]), largest, dtype)

    return each_on(device, stored, range(len(tasks)))


def refuse_infinite(name: str, found: Tensor) -> None:
    """Raise QuantizeError where what calibration found of the inputs of a linear holds NaN or infinity."""
    if not found.isfinite().all():
        raise QuantizeError(
            f"calibration's inputs of {name} are not finite; the model overflows the type that it is served "
            "in: set dtype to bfloat16 in its config.json, or take other calibration data"
        )


def refuse_short_sequences(sequences: Sequence[Sequence[int]]) -> None:
    """Raise QuantizeError for calibration sequences of which nothing can be learned."""
    if not all(sequences):
        raise QuantizeError("a calibration sequence is empty; take it out of the calibration data")
    if sequences and max(map(len, sequences)) < 2:
        raise QuantizeError(
            "every calibration sequence is a single token, of which nothing can be learned; give whole "
            "conversations as calibration data"
        )


def _weight(files: Files, name: str, device: torch.device, scales: Scales) -> Tensor:
    import torch

    weight = files[f"{name}.weight"].to(device, torch.float32)
    weight = folded(f"{name}.weight", weight, scales)
    if not torch.isfinite(weight).all():
        raise QuantizeError(f"{name}.weight holds NaN or infinity; the checkpoint is damaged")
    return weight


def _grid(
    weight: Tensor, how: Scheme, method: Method, inputs: InputStatistics | None, dtype: torch.dtype
) -> Grid:
    ranges = RANGES[method.observer]
    importance = inputs.importance if inputs is not None else None
    if ranges == "imatrix" and importance is None:
        ranges = "mse"  # an expert that no calibration token came to
    return find_grid(weight, how, ranges, importance, dtype)


def _checked(
    name: str,
    weight: Tensor,
    q: Tensor,
    grid: Grid,
    how: Scheme,
    largest: float | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    error = float((restored(q, grid) - weight).norm() / weight.norm().clamp_min(1e-12))
    if not error <= MAX_ROUND_TRIP_ERROR:
        raise QuantizeError(f"{name}: its weights at {how.name} are {error:.0%} off; use more bits")
    stored = stored_tensors(q, grid, how, largest, dtype)
    return {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
