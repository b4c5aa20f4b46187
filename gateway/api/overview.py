"""What the console shows, in one answer."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Query, Request, Response

from gateway.api.models import longest
from gateway.config import shown_url
from gateway.console.history import (
    INTERVAL_S,
    KEPT,
    SET_BACK_S,
    History,
    Totals,
    add_totals,
    read_totals,
    rows,
)
from gateway.identity import Caller
from gateway.proxy.plane import DataPlane, Snapshot
from gateway.quality.watch import Watch
from gateway.routing.replicas import STALE_READING_S, Replica
from gateway.telemetry.counters import GaugeFamily
from gateway.telemetry.metrics import Metrics
from gateway.workers.sheet import Sheets
from quantize.card import Card

LOOKED_S = 30.0
"""Several workers take samples while somebody looks, and this much longer: each adds up all of them."""
SEVERAL = (
    "This gateway has several workers. Figures are of all of them; charts begin when the console is opened, "
    "and whether a replica is left out after errors is one worker's view."
)
_LAYER = re.compile(r".*\blayers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\..*")


class Overview:
    """The route, and the samples of the last minutes that it shows."""

    def __init__(
        self,
        plane: DataPlane,
        metrics: Metrics,
        admin: Callable[[Request], None],
        watch: Watch | None = None,
        sheets: Sheets | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``sheets``: what all workers have counted, where there are several. ``clock``: Unix time."""
        self._plane = plane
        self._metrics = metrics
        self._admin = admin
        self._watch = watch
        self._sheets = sheets
        self._clock = clock
        self._history = History(metrics)
        self._started = clock()
        if sheets is None:
            self._history.add(self._started, Totals(), {})
        self._looked = float("-inf")
        self._sampled = 0
        self._totals = Totals()
        self._shown: tuple[Snapshot, Mapping[tuple[str, str], str]] | None = None
        self._setup: dict[str, Any] = {}

    def add_to(self, app: FastAPI) -> None:
        app.get("/admin/overview", dependencies=[Depends(self._admin)])(self.show)

    async def sample_forever(self) -> None:
        """Take a sample at every multiple of the interval; of several workers only while somebody looks."""
        while True:
            await asyncio.sleep(INTERVAL_S - self._clock() % INTERVAL_S)
            if self._sheets is None or time.monotonic() - self._looked < LOOKED_S:
                await self.sample()

    async def sample(self) -> None:
        """Take a sample, unless there is one of this interval."""
        slot = int(self._clock() // INTERVAL_S) * INTERVAL_S
        if self._sampled - SET_BACK_S < slot <= self._sampled:
            return
        self._sampled = slot
        totals = self._totals = await self._read()
        engines = {
            one["name"]: [one["in_flight"], one["waiting"], one["kv_cache_usage"], one["memory_bytes"]]
            for one in self._replicas()
        }
        self._history.add(slot, totals, engines)

    async def show(
        self,
        since: Annotated[float, Query(ge=0, description="Unix time of the newest sample that is known")] = 0,
        known: Annotated[str, Query(max_length=64, description="id of the set-up that is known")] = "",
    ) -> Response:
        """Roles with what may serve them and why, cards, replicas, figures of the last minute, samples of
        the last quarter of an hour, tokens. What is known already is left out."""
        self._looked = time.monotonic()
        if self._sheets is not None:
            await self.sample()
            totals = self._totals
        else:
            totals = read_totals(self._metrics)
        snapshot = await self._describe()
        seconds, figures, routes = self._history.last_minute()
        answer = {
            "time": self._clock(),
            "started": self._started,
            "interval_s": INTERVAL_S,
            "kept": KEPT,
            "lacks": [SEVERAL] if self._sheets else [],
            "setup_id": snapshot["id"],
            "setup": None if known == snapshot["id"] else snapshot,
            "replicas": self._replicas(),
            "last_minute": {
                "seconds": seconds,
                "series": [[*series, *values] for series, values in figures.items()],
                "routes": rows(routes),
            },
            "samples": [
                {
                    "at": sample.at,
                    "series": [[*series, *values] for series, values in sample.figures.items()],
                    "engines": sample.engines,
                }
                for sample in self._history.since(since)
            ],
            "requests": totals.requests,
            "tokens": rows(totals.tokens),
            "key_tokens": rows(totals.key_tokens),
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    async def _read(self) -> Totals:
        if self._sheets is None:
            return read_totals(self._metrics)
        sheets = self._sheets
        return await asyncio.to_thread(add_totals, sheets.numbers)

    async def _describe(self) -> dict[str, Any]:
        """What changes with the configuration and with demotions only."""
        snapshot, demoted = self._plane.snapshot, self._watch.demoted() if self._watch else {}
        if self._shown is None or self._shown[0] is not snapshot or self._shown[1] != demoted:
            # Hundreds of roles are judged in a tenth of a second, in which requests must go on.
            shown = await asyncio.to_thread(describe, snapshot, self._watch is not None)
            shown["id"] = hashlib.sha256(msgspec.json.encode(shown)).hexdigest()[:16]
            self._setup, self._shown = shown, (snapshot, demoted)
        return self._setup

    def _replicas(self) -> list[dict[str, Any]]:
        memory = _by_replica(self._metrics.engine_memory)
        now = self._plane.clock()
        return [
            _replica(replica, memory.get((*replica.labels, replica.name)), now)
            for replica in self._plane.snapshot.pools.replicas()
        ]


def describe(snapshot: Snapshot, watched: bool) -> dict[str, Any]:
    """Roles with their choice and its reasons, and the cards."""
    config = snapshot.config
    return {
        "models": [
            {"name": name, "reference": config.references[name], "max_model_len": longest(snapshot, name)}
            for name in config.models
        ],
        "default_role": config.default_role,
        "keys": bool(config.keys),
        "workers": config.gateway.workers,
        "watch": watched,
        "max_in_flight": config.gateway.max_in_flight,
        "roles": [_role(snapshot, name) for name in config.roles],
        "variants": [_variant(variant, card) for variant, card in snapshot.cards.items()],
        "providers": [provider.model for provider in config.providers],
    }


def _role(snapshot: Snapshot, name: str) -> dict[str, Any]:
    config = snapshot.config
    role = config.roles[name]
    found = snapshot.router.explain(Caller(name, None), name)
    return {
        "name": name,
        "models": config.models_of(name),
        "ladder": found.ladder,
        "reason": found.reason,
        "considered": [
            {
                "variant": step.variant,
                "memory_bytes": step.memory_bytes,
                "tokens_per_s": step.tokens_per_s,
                "verdict": step.verdict,
                "why": step.why,
            }
            for step in found.considered
        ],
        "budget": role.budget.model_dump(exclude_none=True),
        "when_full": role.when_full,
        "canary": role.canary.model_dump() if role.canary else None,
    }


def _variant(variant: str, card: Card) -> dict[str, Any]:
    evaluation = card.evaluation
    text = evaluation.text if evaluation else None
    roles = evaluation.roles if evaluation else {}
    return {
        "variant": variant,
        "model": card.model,
        "version": card.version,
        "reference": card.variant == card.reference,
        "scheme": card.scheme,
        "method": card.method,
        "kv": card.kv,
        "weight_bits": card.weight_bits,
        "bits_per_weight": card.bits_per_weight,
        "weight_bytes": card.weight_bytes,
        "kv_bytes_per_token": card.kv_bytes_per_token,
        "created": card.created,
        "notes": card.notes,
        "text": text.model_dump() if text else None,
        "roles": {
            name: {
                "items": one.items,
                "evidence": one.evidence,
                "accuracy": one.accuracy,
                "reference_accuracy": one.reference_correct / one.items,
                "agreement": one.agreement,
                "across": {model: paired.drop for model, paired in one.across.items()},
                "kl": one.text.kl_mean,
            }
            for name, one in roles.items()
        },
        "modules": module_bits(card),
    }


def module_bits(card: Card) -> list[dict[str, Any]]:
    """The lowest bits of every kind of module, layer by layer, with the scheme where the card says it. The
    experts of a layer are one."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, bits in card.module_bits.items():
        if (place := _LAYER.fullmatch(name)) is None:
            continue
        layer, within = int(place[1]), place[2]
        if expert := _EXPERT.fullmatch(within):
            name, within = name[: place.start(2)] + expert[1], expert[1]
        cell = found.setdefault(
            (within, layer), {"kind": within, "layer": layer, "bits": bits, "scheme": _scheme(card, name)}
        )
        cell["bits"] = min(cell["bits"], bits)
    return [found[key] for key in sorted(found)]


def _scheme(card: Card, module: str) -> str | None:
    """A plan names groups that engines fuse: ``qkv_proj`` for ``q_proj``, ``gate_up_proj`` for
    ``gate_proj``."""
    if (scheme := card.schemes.get(module)) is not None:
        return scheme
    parent, _, leaf = module.rpartition(".")
    stem = leaf.removesuffix("_proj")
    for group, scheme in card.schemes.items():
        where, _, fused = group.rpartition(".")
        if where == parent and stem in fused.removesuffix("_proj"):
            return scheme
    return None


def _replica(replica: Replica, memory: float | None, now: float) -> dict[str, Any]:
    reading = replica.reading
    fresh = now - reading.at <= STALE_READING_S
    return {
        "variant": replica.variant,
        "model": replica.model,
        "name": replica.name,
        "url": shown_url(replica.url),
        "reachable": replica.reachable,
        "usable": replica.breaker.free,
        "in_flight": replica.in_flight,
        "running": reading.running if fresh else None,
        "waiting": reading.waiting if fresh else None,
        "kv_cache_usage": reading.kv_cache_usage if fresh else None,
        "cache_tokens": reading.cache_tokens,
        "memory_bytes": memory,
    }


def _by_replica(gauge: GaugeFamily) -> dict[tuple[str, ...], float]:
    return {labels: child.value for labels, child in gauge.children.items()}
