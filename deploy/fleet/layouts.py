"""Layouts: which variants are served together, what each role gets then, and on which devices they run.

A layout is a set of variants. What a role gets of it is what the gateway's router would choose: the first of
the role's ladder that is served. So a plan needs nothing but the lists ``models.<name>.serve``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy.fleet.predict import MPS_GAIN, Device, PoolLoad
from deploy.fleet.room import side_by_side
from deploy.fleet.speed import EngineSpeed
from deploy.fleet.traffic import RoleTraffic, Traffic
from deploy.placement import Machine, Need, Placed, PlacementError

MOST_TOGETHER = 4
"""Variants in one layout, apart from references that must be served beside them."""
BESIDE_CORES = 0.05
"""Of a core, what an engine's other processes take, and the gateway for its sake (measured on two cores).
Where engines leave no core free it is taken from theirs."""


@dataclass(frozen=True)
class Candidate:
    """A variant that could be served: its speed, and what an engine of it needs."""

    id: str
    """``model:variant``."""
    need: Need
    speed: EngineSpeed
    kv_bytes_per_token: int
    max_num_seqs: int


@dataclass(frozen=True)
class Layout:
    """Variants that are served together. ``mps``: those that share a GPU compute at the same time."""

    served: tuple[str, ...]
    serves: Mapping[str, str]
    """Role to the variant that it gets."""
    placed: Mapping[str, Placed]
    devices: tuple[Device, ...]
    mps: bool = False

    @property
    def memory(self) -> int:
        """Bytes of all engines, on all their devices."""
        return sum(one.memory * max(1, len(one.gpus)) for one in self.placed.values())


def layouts(
    candidates: Mapping[str, Candidate],
    ladders: Mapping[str, Sequence[str]],
    beside: Mapping[str, str],
    machine: Machine,
    traffic: Traffic,
) -> tuple[list[Layout], dict[tuple[str, ...], str]]:
    """All that fit on the machine, and why others do not, by what they would serve.

    ``ladders`` are the variants that may serve a role, the first choice first; ``beside`` is what must be
    served beside a variant (the reference that the watch asks). A variant that no role gets is served only
    where it must.
    """
    fit: list[Layout] = []
    refused: dict[tuple[str, ...], str] = {}
    for served in _sets(candidates, ladders, beside):
        serves = {
            role: next(one for one in ladder if one in served)
            for role, ladder in ladders.items()
            if role in traffic.roles
        }
        used = set(serves.values())
        if set(served) != used | {beside[one] for one in used if one in beside}:
            continue
        try:
            places = side_by_side(machine, [candidates[one].need for one in served])
        except PlacementError as error:
            refused[served] = str(error)
            continue
        placed = dict(zip(served, places, strict=True))
        for mps in (False, True) if _share_a_gpu(placed) else (False,):
            devices = _devices(served, serves, placed, candidates, traffic, machine, mps)
            fit.append(Layout(served, serves, placed, devices, mps))
    return fit, refused


def _sets(
    candidates: Mapping[str, Candidate], ladders: Mapping[str, Sequence[str]], beside: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """Sets of variants in which every role finds one, in the order of ``candidates``."""
    seen = set()
    for count in range(1, min(len(candidates), MOST_TOGETHER) + 1):
        for chosen in itertools.combinations(candidates, count):
            with_references = {*chosen, *(beside[one] for one in chosen if one in beside)}
            served = tuple(one for one in candidates if one in with_references)
            if served in seen:
                continue
            seen.add(served)
            if all(any(one in served for one in ladder) for ladder in ladders.values()):
                yield served


def _share_a_gpu(placed: Mapping[str, Placed]) -> bool:
    taken = [gpu for one in placed.values() for gpu in one.gpus]
    return len(set(taken)) < len(taken)


def _devices(
    served: Sequence[str],
    serves: Mapping[str, str],
    placed: Mapping[str, Placed],
    candidates: Mapping[str, Candidate],
    traffic: Traffic,
    machine: Machine,
    mps: bool,
) -> tuple[Device, ...]:
    """Pools that are asked, by what they compute on: pools with a GPU in common are one device."""
    groups: list[tuple[set[str], list[PoolLoad]]] = []
    for one in served:
        roles = {role: traffic.roles[role] for role, chosen in serves.items() if chosen == one}
        if not roles:
            continue
        candidate, where = candidates[one], placed[one]
        names = {f"GPU {gpu}" for gpu in where.gpus} or {f"core {core}" for core in where.cores} or {"cores"}
        load = PoolLoad(one, candidate.speed, roles, _fits(candidate, roles))
        joined = [group for group in groups if group[0] & names]
        for group in joined:
            groups.remove(group)
        groups.append(
            (
                names.union(*(group[0] for group in joined)),
                [*(pool for group in joined for pool in group[1]), load],
            )
        )
    on_gpus = any(one.gpus for one in placed.values())
    gain = (MPS_GAIN if mps else None) if on_gpus else 1.0
    share = 1.0 if on_gpus else _share_of_cores(placed, machine)
    return tuple(Device(", ".join(sorted(names)), tuple(pools), gain, share) for names, pools in groups)


def _share_of_cores(placed: Mapping[str, Placed], machine: Machine) -> float:
    """Of the cores that engines compute on, what is left to them."""
    used = {core for one in placed.values() for core in one.cores}
    free = machine.cores - len(used)
    return 1.0 - max(0.0, BESIDE_CORES * len(placed) - free) / len(used) if used else 1.0


def _fits(candidate: Candidate, roles: Mapping[str, RoleTraffic]) -> int:
    """Requests at a time, by the engine's own limit and by its KV cache."""
    longest = max(one.prompt_tokens + one.answer_tokens for one in roles.values())
    if not candidate.kv_bytes_per_token:
        return candidate.max_num_seqs
    held = candidate.need.kv_bytes // round(candidate.kv_bytes_per_token * longest)
    return max(1, min(candidate.max_num_seqs, int(held)))
