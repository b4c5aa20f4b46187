"""``tiercel quantize robustness``: a role's items asked otherwise, of the reference and of variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deploy.identity import identity
from deploy.machine import look
from deploy.making import role_tasks
from deploy.models import checkpoint_of, registry_of
from deploy.unlabelled import ask_reference, variant_engine
from gateway.config import ModelConfig
from quantize.card import Card
from quantize.evaluate.client import EngineClient
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import measurement_key
from quantize.evaluate.perturb import Kind
from quantize.evaluate.robustness import (
    Answers,
    Robustness,
    RobustnessRow,
    ask_all,
    asked,
    chosen_items,
    compare,
)
from quantize.evaluate.tasks import Item, TaskError
from quantize.report.tables import NOTHING, align

Say = Callable[[str], None]


async def measure_robustness(
    model: ModelConfig,
    variants: Sequence[str],
    kinds: Sequence[Kind],
    say: Say,
    *,
    roles: Sequence[str] = (),
    count: int = 60,
    seed: int = 0,
) -> Robustness:
    """Ask the reference and ``variants``, each on an engine of its own, one after another; what was asked
    before, of the same version on the same engine, is not asked again. Raises TaskError, CardError and
    EngineStartError."""
    registry = registry_of(model, say)
    reference = registry.add_reference(checkpoint_of(model, say))
    cards = [registry.card(name) for name in dict.fromkeys(variants) if name != reference.variant]
    await ask_reference(model, say)
    every = role_tasks(model)
    if unknown := [role for role in roles if role not in every]:
        raise TaskError(f"--role {unknown[0]}: no such role has items; there are {', '.join(every)}")
    tasks = {role: chosen_items(every[role], count) for role in roles or every}
    what = asked(tasks, kinds, seed)
    everything = {f"{kind} {role}": items for kind, by in what.items() for role, items in by.items()}
    key = measurement_key(everything, identity(model, look()))
    answers: dict[str, Answers] = {}
    async with registry.measuring():
        for card in (reference, *cards):
            answers[card.variant] = await _answers(model, card, what, key, say)
    rows: list[RobustnessRow] = []
    for card in cards:
        rows += compare(tasks, kinds, card.variant, answers[reference.variant], answers[card.variant])
    return Robustness(reference=reference.variant, seed=seed, rows=tuple(rows))


async def _answers(
    model: ModelConfig, card: Card, what: dict[str, dict[str, list[Item]]], key: str, say: Say
) -> Answers:
    registry = registry_of(model)
    path = registry.measurement_path(card, key)
    journal = Journal(path.with_name(f"robustness-{path.name}"))
    wanted = sum(len(items) for by in what.values() for items in by.values())
    if len(journal.read()) >= wanted:
        return await ask_all(EngineClient("http://nowhere", card.model), what, card.variant, journal)
    async with (
        variant_engine(model, card, say) as spec,
        EngineClient(spec.url, card.model) as client,
    ):
        return await ask_all(client, what, card.variant, journal)


def format_robustness(found: Robustness) -> str:
    """A line per variant, role and kind."""
    rows = [
        [
            "role",
            "asked with",
            "variant",
            "right",
            f"{found.reference} right",
            "lost more",
            "answered",
            "same",
        ]
    ]
    for one in found.rows:
        share = f"{one.answered} of {one.items}, {found.reference} {one.reference_answered}"
        same = f"{100 * one.same_answer / one.items:.0f} %"
        if one.changed is None or one.more_lost is None:
            rows.append([one.role, one.kind, one.variant, *[NOTHING] * 3, share, same])
            continue
        between = (
            " ({:+.1f} to {:+.1f})".format(*(100 * edge for edge in one.interval)) if one.interval else ""
        )
        rows.append(
            [
                *(one.role, one.kind, one.variant),
                f"{one.plain} -> {one.changed.good}",
                f"{one.reference_plain} -> {one.changed.reference_good}",
                f"{100 * one.more_lost:+.1f} points{between}",
                *(share, same),
            ]
        )
    return (
        align(rows)
        + "\nright: answers to the items as they are, and changed; lost more: the variant's drop less the "
        "reference's, with a 95 % interval over items; answered: by something that is no gibberish; same: "
        "the reference's answer, letter by letter. Reported, not gated."
    )
