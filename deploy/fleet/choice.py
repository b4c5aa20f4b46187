"""What a fleet plan is made of: the variants that are there, their speeds, and what may serve each role."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.fleet.engines import Version, need_in
from deploy.fleet.layouts import Candidate
from deploy.fleet.plan import Target
from deploy.fleet.speed import speed_of
from deploy.models import registry_of
from gateway.cards import load_cards
from gateway.config import Config
from gateway.routing.pools import Pools
from gateway.routing.router import Router
from quantize.card import Card, CardError


def with_all_variants(config: Config) -> Config:
    """The configuration as if every variant that is there and loads were served. Raises CardError."""
    models = {}
    for one in config.each():
        names = tuple(card.variant for card in registry_of(one).cards() if card.state == "ready")
        if not names:
            raise CardError(
                f"models.{one.name}: {one.variants_dir} holds no variant that loads; run `tiercel quantize`"
            )
        models[one.name] = config.models[one.name].model_copy(update={"serve": names})
    return config.model_copy(update={"models": models, "pools": {}})


def ladders_of(config: Config) -> dict[str, tuple[str, ...]]:
    """Role to the variants that may serve it, the gateway's first choice first. Raises ConfigError."""
    router = Router(config, load_cards(config), Pools(config, lambda: 0.0))
    return {role: router.ladder(role) for role in config.roles}


def candidates_of(config: Config) -> dict[str, Candidate]:
    """Every served variant with what its engine needs and how fast it is. Raises NoSpeedError."""
    return {identity: _candidate(config, identity, card) for identity, card in load_cards(config).items()}


def _candidate(config: Config, identity: str, card: Card) -> Candidate:
    model = config.of(card.model)
    version = Version(model, card, registry_of(model).path(card.variant, card.version))
    need = need_in(config, version)
    return Candidate(identity, need, speed_of(card), card.kv_bytes_per_token, model.engine.max_num_seqs)


def beside(config: Config) -> Mapping[str, str]:
    """Variant to the reference that the watch asks about its answers."""
    if not config.watch.enabled or config.watch.reference != "live":
        return {}
    references = config.references
    return {one: references[one.rpartition(":")[0]] for one in config.served}


def targets(config: Config) -> dict[str, Target]:
    """Role to what it wants of its latencies."""
    return {
        name: Target(role.target.ttft_s, role.target.total_s)
        for name, role in config.roles.items()
        if role.target is not None
    }
