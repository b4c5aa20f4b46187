"""The engines that ``tiercel up`` starts: which version of every variant, at which address, and where."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.engine import EngineSpec, need_of
from deploy.fleet.room import side_by_side
from deploy.machine import look
from deploy.models import Say, registry_of
from deploy.placement import Machine, Need, PlacementError, place
from gateway.config import Config, ModelConfig
from gateway.telemetry.engines import ENGINES_FILE, engine_pids, resident_bytes
from quantize.card import VERSION, Card, refuse_broken
from quantize.versions import usable_version


@dataclass(frozen=True)
class Version:
    """A version of a variant that is to be served here."""

    model: ModelConfig
    card: Card
    directory: Path


def engine_specs(config: Config, say: Say = lambda _text: None) -> list[EngineSpec]:
    """The engines to start here, each with its place: served variants of all models without given replicas.

    In place of a version that its engine could not load, the newest one that passed is served, which is
    said. Raises CardError and PlacementError.
    """
    return placed_specs(config, served_here(config, say), look())


def served_here(config: Config, say: Say = lambda _text: None) -> list[Version]:
    """Raises CardError."""
    found = []
    for model in config.each():
        for variant in model.serve:
            if variant not in model.pools:
                directory, sentence = usable_version(model.variants_dir, variant)
                if sentence:
                    say(sentence)
                version = directory.name if VERSION.fullmatch(directory.name) else None
                found.append(version_of(model, variant, version))
                refuse_broken(found[-1].card)
    return found


def version_of(model: ModelConfig, variant: str, version: str | None) -> Version:
    """That version, or the one in use, after checking its files. Raises CardError."""
    registry = registry_of(model)
    card = registry.card(variant, version)
    return Version(model, card, registry.path(variant, card.version))


def placed_specs(config: Config, versions: Sequence[Version], machine: Machine) -> list[EngineSpec]:
    """What to start for ``versions``, all at once. Raises PlacementError."""
    places = side_by_side(machine, [need_in(config, one) for one in versions])
    return [
        EngineSpec(
            card=one.card,
            directory=one.directory,
            settings=one.model.engine,
            port=one.model.ports[one.card.variant],
            log=one.model.log(one.card.variant),
            placed=placed,
        )
        for one, placed in zip(versions, places, strict=True)
    ]


def need_in(config: Config, version: Version) -> Need:
    """What the version's engine takes, and whether the fleet can do without it."""
    watched = config.watch.enabled and config.watch.reference == "live"
    needed = watched and version.card.variant == version.model.reference
    return dataclasses.replace(need_of(version.card, version.directory, version.model.engine), needed=needed)


def placed_again(config: Config, spec: EngineSpec, all_of_them: Sequence[EngineSpec]) -> EngineSpec:
    """The same with a place of its own beside engines that run; where none is found, with the one it had."""
    version = Version(config.of(spec.card.model), spec.card, spec.directory)
    # What the others take is not free as it is.
    busy = [dataclasses.replace(one.placed, memory=0) for one in all_of_them if one.id != spec.id]
    try:
        placed = place(look(), need_in(config, version), busy, len(all_of_them))
    except PlacementError:
        placed = None
    return dataclasses.replace(spec, placed=placed or spec.placed)


def without_ours(machine: Machine, run_dir: Path) -> Machine:
    """The machine as it would be if the engines that ``tiercel up`` runs here now were not there."""
    running = set(engine_pids(run_dir).values())
    try:
        told = json.loads((run_dir / ENGINES_FILE).read_text(encoding="utf-8"))["engines"].values()
    except (OSError, ValueError, KeyError, AttributeError):
        return machine
    ours = [(one, size) for one in told if one["pid"] in running and (size := resident_bytes(one["pid"]))]
    gpus = tuple(
        dataclasses.replace(
            gpu, free=gpu.free + sum(one["memory"] for one, _ in ours if gpu.index in one.get("gpus", ()))
        )
        for gpu in machine.gpus
    )
    return dataclasses.replace(machine, gpus=gpus, memory_free=machine.memory_free + sum(s for _, s in ours))
