"""What ``tiercel up MODEL`` tells at its end: what was found of each variant, and what serves which role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.cards import load_cards
from gateway.config import Config, ModelConfig, parts_of
from gateway.routing.ladders import Ladders
from quantize.card import Card
from quantize.gate.judgement import evidence_text
from quantize.gate.limits import limit_tests
from quantize.gate.paired import ALPHA
from quantize.gate.unlabelled import unjudged_json
from quantize.report.tables import MARKS, NOTHING, align, kl_text, megabytes


def who_serves(config: Config, model: ModelConfig, cards: Sequence[Card]) -> str:
    """A line per variant, with its figures and its verdict for every role, and a sentence per role, by the
    gateway's own choice, and per variant that is not served. Raises CardError and ConfigError."""
    roles = list(model.roles)
    rows = [["variant", "weights", "tokens/s", "KL", "other first choices", "begin otherwise", *roles]]
    for card in cards:
        found = [card.variant, megabytes(card.weight_bytes), _speed(card), *_figures(card)]
        rows.append([*found, *_marks(card, roles)])
    lines = [align(rows), ""]
    ladders = Ladders(config, load_cards(config))
    serving = {role: parts_of(ladders.of_role(role)[0])[1] for role in roles}
    for variant in dict.fromkeys(serving.values()):
        together = [role for role, one in serving.items() if one == variant]
        lines.append(
            f"{model.id(variant)} serves {_listed(together)}: {_why(model, cards, variant, together)}"
        )
    lines += [
        f"{card.variant} is not served: {why}"
        for card in cards
        if card.variant not in model.serve and (why := _why_not(model, card, serving))
    ]
    return "\n".join(lines)


def _speed(card: Card) -> str:
    return f"{card.speed.tokens_per_s:,.0f}" if card.speed else NOTHING


def _figures(card: Card) -> list[str]:
    """KL in nats per token, and where answers are compared with the reference's own, how many change."""
    if card.variant == card.reference or card.evaluation is None:
        return [NOTHING] * 3
    text = card.evaluation.text
    own = [one for one in card.evaluation.roles.values() if one.evidence == "reference"]
    changed = f"{own[0].items - own[0].correct} of {own[0].items}" if own else NOTHING
    other = NOTHING if text.other_choices is None else f"{100 * text.other_choices:.1f} %"
    return [kl_text(text.kl_mean), other, changed]


def _marks(card: Card, roles: Sequence[str]) -> list[str]:
    if card.variant == card.reference:
        return [NOTHING] * len(roles)
    return [MARKS[card.gate[role].outcome] if role in card.gate else NOTHING for role in roles]


def _why(model: ModelConfig, cards: Sequence[Card], variant: str, roles: Sequence[str]) -> str:
    if variant == model.reference:
        return "nothing cheaper is shown to be good enough"
    card = next(card for card in cards if card.variant == variant)
    return f"the cheapest that passes, judged by {_evidence(model, card, roles)}"


def _evidence(model: ModelConfig, card: Card, roles: Sequence[str]) -> str:
    """What the variant was judged by for the roles, and what it was not judged by."""
    known = card.evaluation.roles if card.evaluation else {}
    found = {role: known[role] for role in roles if role in known}
    texts = " and ".join(dict.fromkeys(map(evidence_text, found.values())))
    left_out = (unjudged_json(figures, model.roles[role].budget) for role, figures in found.items())
    return "; ".join(dict.fromkeys([texts, *filter(None, left_out)]))


def _why_not(model: ModelConfig, card: Card, serving: Mapping[str, str]) -> str:
    """Why a variant that was made is not served."""
    if card.state == "broken":
        return f"its engine could not load it ({card.engine_words})"
    if card.variant == model.reference:
        return "no role needs it"
    if passed := [role for role in serving if role in card.passed]:
        return f"what it passes for ({_listed(passed)}) another one serves at less cost"
    return "; ".join(_broken_limits(model, card)) or "its verdicts are shown by `tiercel variants show`"


def _broken_limits(model: ModelConfig, card: Card) -> list[str]:
    """Of the first role the limits that the variant breaks, or does not show to keep."""
    role, settings = next(iter(model.roles.items()))
    if card.evaluation is None or role not in card.evaluation.roles:
        return ["it was not measured"]
    tests = limit_tests(card.evaluation.roles[role], settings.budget)
    beyond = [test.found for test in tests if test.beyond]
    return [f"for {role}: {found}" for found in beyond or (test.found for test in tests if test.p > ALPHA)]


def _listed(names: Sequence[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last
