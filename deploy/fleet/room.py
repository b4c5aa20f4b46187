"""Room for engines that run at once: their places, or why they do not fit and the least that helps. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from deploy.placement import GIB, Machine, Need, Placed, PlacementError, arranged, place, taken_by
from gateway.config.engine import cache_for, tokens_held

_MIB = 1 << 20
LEAST_CONTEXT = 1024
"""Tokens: a shorter context is no way out."""
MOST_LEFT_OUT = 12
"""Engines of which combinations to leave out are looked for."""


def side_by_side(machine: Machine, needs: Sequence[Need]) -> list[Placed]:
    """Places for engines that all run at once. Raises PlacementError, which says what would help."""
    if (found := arranged(machine, needs)) is not None:
        return found
    text = _alone(machine, needs)
    if not text:
        names = ", ".join(need.name for need in needs)
        whole = _gib(sum(map(taken_by, needs)))
        text = f"{names} do not fit on this machine side by side: they take {whole}, {_free(machine)}"
    raise PlacementError(f"{text}. {_help(machine, needs)}")


def too_large(machine: Machine, needs: Sequence[Need]) -> dict[str, str]:
    """Of engines that run one after another: name to why it fits not even alone, and what would help."""
    found = {need.name: (text, need) for need in needs if (text := _alone(machine, [need]))}
    return {name: f"{text}. {_help(machine, [need])}" for name, (text, need) in found.items()}


def _help(machine: Machine, needs: Sequence[Need]) -> str:
    ways = "; or ".join(helping(machine, needs))
    return f"What helps: {ways}" if ways else "Serve some elsewhere (pools), or take a larger machine"


def helping(machine: Machine, needs: Sequence[Need]) -> Iterator[str]:
    """Changes each of which is enough, as commands to a person, those that cost least first."""

    def fits(changed: Sequence[Need], where: Machine = machine) -> bool:
        return arranged(where, changed) is not None

    yield from _shorter(needs, fits)
    yield from _eight_bits(needs, fits)
    yield from _fewer(needs, fits)
    yield from _more_memory(machine, needs)


Fits = Callable[[Sequence[Need]], bool]


def _shorter(needs: Sequence[Need], fits: Fits) -> Iterator[str]:
    """The largest KV cache that all engines have at most, in whole GiB, and the context that it holds."""
    most = max(need.kv_bytes for need in needs) // GIB
    for gib in range(most - 1, 0, -1):
        changed = [dataclasses.replace(one, kv_bytes=min(one.kv_bytes, gib * GIB)) for one in needs]
        if not fits(changed):
            continue
        shortened = [one for one in needs if one.kv_bytes > gib * GIB and one.token_bytes]
        tokens = {one.name: min(one.context, tokens_held(gib * GIB, one.token_bytes)) for one in shortened}
        if tokens and min(tokens.values()) >= LEAST_CONTEXT:
            first = min(shortened, key=lambda one: tokens[one.name])
            held, cache = tokens[first.name], f"a KV cache of {gib} GiB instead of {most}"
            if held == first.context:
                yield f"{cache} (engine.kv_cache_gib: {gib}), for the same contexts, fewer at a time"
            else:
                keys = f"engine.kv_cache_gib: {gib}, engine.max_model_len: {held}"
                yield f"{cache} ({keys}), for contexts of {held:,} tokens instead of {first.context:,}"
        return


def _eight_bits(needs: Sequence[Need], fits: Fits) -> Iterator[str]:
    """A KV cache of eight bits for the same contexts, where it has sixteen."""
    wide = [one for one in needs if one.kv_dtype == "auto" and one.token_bytes and not one.needed]
    changed = {one.name: _halved(one) for one in wide}
    smaller = [one.name for one in wide if changed[one.name].kv_bytes < one.kv_bytes]
    if smaller and fits([changed.get(one.name, one) for one in needs]):
        yield f"an FP8 KV cache for {', '.join(smaller)} (variants made with --kv fp8), for the same contexts"


def _halved(need: Need) -> Need:
    cache = cache_for(need.context, need.token_bytes // 2)
    return dataclasses.replace(need, kv_bytes=min(need.kv_bytes, cache))


def _fewer(needs: Sequence[Need], fits: Fits) -> Iterator[str]:
    """The fewest engines to do without; of as many those that take least."""
    spare = [need for need in needs if not need.needed][:MOST_LEFT_OUT]
    for count in range(1, min(len(spare), len(needs) - 1) + 1):
        chosen = [
            left for left in combinations(spare, count) if fits([one for one in needs if one not in left])
        ]
        if chosen:
            least = min(chosen, key=lambda left: sum(map(taken_by, left)))
            models = dict.fromkeys(one.name.rpartition(":")[0] for one in least)
            where = ", ".join(f"models.{model}.serve" for model in models)
            yield f"without {' and '.join(one.name for one in least)} ({where}, or served elsewhere: pools)"
            return


def _more_memory(machine: Machine, needs: Sequence[Need]) -> Iterator[str]:
    """How much more free memory is enough: on every GPU, or of the machine."""

    def larger(more: int) -> Machine:
        gpus = tuple(dataclasses.replace(gpu, free=gpu.free + more) for gpu in machine.gpus)
        return dataclasses.replace(machine, gpus=gpus, memory_free=machine.memory_free + more)

    enough = _MIB
    while arranged(larger(enough), needs) is None:
        enough *= 2
        if enough > 1 << 50:
            return
    low = enough // 2
    while enough - low > 64 * _MIB:
        middle = (low + enough) // 2
        low, enough = (low, middle) if arranged(larger(middle), needs) is not None else (middle, enough)
    tenths = -(-enough * 10 // GIB) / 10
    yield f"{tenths:.1f} GiB more free memory{' on every GPU' if machine.gpus else ''}"


def _alone(machine: Machine, needs: Sequence[Need]) -> str:
    """Why the first that fits not even alone does not; empty where all do."""
    for need in needs:
        try:
            place(machine, need, [], 1)
        except PlacementError as error:
            return str(error)
    return ""


def _free(machine: Machine) -> str:
    if not machine.gpus:
        return f"and {_gib(machine.memory_free)} of memory are free"
    return "and " + ", ".join(f"{_gib(gpu.free)} on GPU {gpu.index}" for gpu in machine.gpus) + " are free"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
