"""Variants beside each other as text, and the points of the picture: loss against bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantize.card import ONNX, Card, Outcome, Paired, Verdict
from quantize.core.engine_figures import EngineAccount
from quantize.gate.judgement import drop_upper_bound, wilson_interval
from quantize.report.reported import reported_rows

NOTHING = "-"
MARKS = {Outcome.PASSED: "pass", Outcome.FAILED: "FAIL", Outcome.NOT_ENOUGH_EVIDENCE: "not enough"}


@dataclass(frozen=True)
class Point:
    """One plan that was measured: bytes of its weights, and mean KL in nats per token with its interval.

    ``control`` marks plans that were only measured for comparison (uniform, random, first layers high …).
    """

    name: str
    bytes: int
    kl: float
    low: float | None = None
    high: float | None = None
    control: bool = False


def points(cards: Sequence[Card]) -> tuple[Point, ...]:
    """A point per measured variant that is not the reference."""
    return tuple(
        Point(
            card.variant,
            card.weight_bytes,
            card.evaluation.text.kl_mean,
            *(card.evaluation.text.kl_interval or (None, None)),
        )
        for card in cards
        if card.evaluation is not None and card.variant != card.reference
    )


def noise_floor(cards: Sequence[Card]) -> float | None:
    """Mean KL of the reference against itself, where it was measured."""
    found = (card.evaluation.noise for card in cards if card.evaluation and card.evaluation.noise)
    noise = next(found, None)
    return noise.kl_mean if noise else None


def pareto(candidates: Sequence[Point]) -> tuple[Point, ...]:
    """Points that no other beats in both bytes and loss, by rising bytes."""
    found: list[Point] = []
    for point in sorted(candidates, key=lambda point: (point.bytes, point.kl)):
        if not found or point.kl < found[-1].kl:
            found.append(point)
    return tuple(found)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def kl_text(value: float | None) -> str:
    """Three significant digits: losses differ by powers of ten."""
    return NOTHING if value is None else f"{value:.3g}"


def mean_kl_text(card: Card) -> str:
    """Mean KL with its 95 % interval; a figure over a part of the vocabulary is a lower bound."""
    text = card.evaluation.text if card.evaluation else None
    if text is None:
        return NOTHING
    least = "" if text.kl_exact or text.kl_mean == 0 else "at least "
    between = " ({} to {})".format(*map(kl_text, text.kl_interval)) if text.kl_interval else ""
    return f"{least}{kl_text(text.kl_mean)}{between}"


AS_REFERENCE = "as the reference"
"""What stands for 'right' where nobody has said what is: an answer that begins as the reference's own."""


def accuracy_text(card: Card, role: str) -> str:
    """Accuracy on the role's held-out items with its 95 % interval (Wilson)."""
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    if figures is None:
        return NOTHING
    low, high = wilson_interval(figures.correct, figures.items)
    share = f"{100 * figures.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return share if figures.evidence == "labels" else f"{share} {AS_REFERENCE}"


def drop_text(card: Card, role: str) -> str:
    """Drop in accuracy against the reference, and its one-sided 95 % upper bound, in points."""
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    if figures is None or card.variant == card.reference:
        return NOTHING
    drop = 100 * (figures.reference_correct - figures.correct) / figures.items
    return f"{drop:+.2f} points, at most {100 * drop_upper_bound(figures):+.2f}"


def checks_of(card: Card, role: str) -> dict[str, Paired]:
    """What else was measured for a role, by name: answers that have a property, paired with the reference."""
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    if figures is None:
        return {}
    made = {"grounded": figures.grounded, "valid JSON": figures.valid_json}
    if figures.long_context:
        made["right in a full context"] = figures.long_context.retrieval
    return {name: paired for name, paired in made.items() if paired is not None}


def paired_text(paired: Paired | None) -> str:
    """Share of answers with its 95 % interval, and the reference's share."""
    if paired is None:
        return NOTHING
    low, high = wilson_interval(paired.good, paired.items)
    share, reference = 100 * paired.good / paired.items, 100 * paired.reference_good / paired.items
    return f"{share:.1f} % ({100 * low:.1f} to {100 * high:.1f}), reference {reference:.1f} %"


def state_text(card: Card) -> str:
    if card.state == "broken":
        return f"broken: {card.engine_words}"
    return "suspicious" if card.doubts else card.state


def served_text(account: EngineAccount | None) -> str:
    """What an engine said of itself after it had loaded the variant, in a line."""
    if account is None:
        return "not told by the engine"
    parts = [f"quantization {account.quantization}"]
    for name, kernel in account.kernels.items():
        size = f" ({megabytes(kernel.bytes)})" if kernel.bytes else ""
        parts.append(f"{name} x {kernel.count}{size}")
    if account.kv_dtype:
        parts.append(f"KV cache {account.kv_dtype}")
    if account.weight_bytes is not None:
        parts.append(f"{megabytes(account.weight_bytes)} of weights")
    if account.device_bytes is not None:
        parts.append(f"{account.device_bytes / 1e9:,.2f} GB on the device")
    if account.ranks > 1:
        parts.append(f"{account.ranks} ranks")
    return "; ".join(parts) + ("" if account.source == "workers" else " (from its log)")


def making_text(card: Card) -> str:
    """Time and memory that making the variant took."""
    if (took := card.making) is None:
        return NOTHING
    peak = took.peak_memory_bytes
    memory = f", {peak / 1e9:.2f} GB at most" if peak is not None else ""
    return f"{took.seconds:,.0f} s{memory}"


def training_text(card: Card) -> str:
    """What a variant was trained from and on, and what that took off in torch."""
    if (one := card.training) is None:
        return NOTHING
    loss = f"; KL {kl_text(one.kl_before)} -> {kl_text(one.kl_after)} in torch"
    return f"from {one.base}, {one.sequences:,} conversations ({one.tokens:,} tokens){loss}"


def speed_text(card: Card) -> str:
    """Tokens per second, of a classifier labels, and per joule where the machine told."""
    if (speed := card.speed) is None:
        return NOTHING
    energy = f"{speed.tokens_per_joule:.3g} per joule ({speed.energy})" if speed.tokens_per_joule else ""
    unknown = f"energy: {speed.energy}" if speed.energy else ""
    what = "labels" if card.target == ONNX else "tokens"
    return "; ".join(filter(None, (f"{speed.tokens_per_s:,.0f} {what}/s", energy or unknown)))


def roles_of(cards: Sequence[Card]) -> list[str]:
    return sorted({role for card in cards for role in card.gate})


def _verdict(verdict: Verdict | None) -> str:
    return MARKS[verdict.outcome] if verdict else NOTHING


def verdict_text(card: Card, role: str) -> str:
    """The verdict and the accuracy that it rests on; of the reference the accuracy alone."""
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    word = "right" if figures is None or figures.evidence == "labels" else AS_REFERENCE
    right = f"{100 * figures.accuracy:.1f} % {word}" if figures else ""
    if card.variant == card.reference:
        return right or NOTHING
    return ", ".join(filter(None, (_verdict(card.gate.get(role)), right)))


def format_variants(
    cards: Sequence[Card],
    versions: Mapping[str, int] | None = None,
    stale: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """One line per variant. ``versions`` is how many each has, by name; ``stale`` what is measured on
    another engine than the one at hand, and how that differs."""
    roles = roles_of(cards)
    differ = stale or {}
    rows = [["variant", "version", "scheme", "method", "weights", "bits", "KV/token", "KL", *roles, "state"]]
    for card in cards:
        count = (versions or {}).get(card.variant, 1)
        bits = f"{card.bits_per_weight:.2f}" if card.bits_per_weight else str(card.weight_bits)
        row = [card.variant, card.version + (f" (of {count})" if count > 1 else ""), card.scheme, card.method]
        row += [megabytes(card.weight_bytes), bits, f"{card.kv_bytes_per_token:,} B"]
        row.append(kl_text(card.evaluation.text.kl_mean if card.evaluation else None))
        row += [verdict_text(card, role) for role in roles]
        state = "registered" if card.origin == "registered" and card.state == "ready" else card.state
        marks = ["suspicious"] * bool(card.doubts) + ["stale"] * bool(differ.get(card.variant))
        rows.append([*row, ", ".join([state, *marks])])
    lines = [align(rows)]
    lines += [f"{card.variant} is suspicious: {doubt}" for card in cards for doubt in card.doubts]
    lines += stale_lines(differ)
    return "\n".join(lines)


def stale_lines(stale: Mapping[str, Sequence[str]]) -> list[str]:
    """Variants that were measured on another engine, those with the same differences in one sentence."""
    together: dict[tuple[str, ...], list[str]] = {}
    for variant, differences in stale.items():
        if differences:
            together.setdefault(tuple(differences), []).append(variant)
    return [
        f"{', '.join(names)}: measured on another engine ({'; '.join(differences)}); "
        f"`tiercel quantize measure {' '.join(names)}` measures again"
        for differences, names in together.items()
    ]


Field = tuple[str, Callable[[Card], str]]

FIELDS: tuple[Field, ...] = (
    ("version", lambda card: card.version),
    ("state", state_text),
    ("origin", lambda card: card.origin),
    ("scheme", lambda card: card.scheme),
    ("method", lambda card: card.method),
    ("KV cache", lambda card: card.kv),
    ("weights", lambda card: megabytes(card.weight_bytes)),
    ("bits per weight", lambda card: f"{card.bits_per_weight:.3f}" if card.bits_per_weight else NOTHING),
    ("KV cache per token", lambda card: f"{card.kv_bytes_per_token:,} B"),
    ("checked for", lambda card: card.target or NOTHING),
    ("made in", making_text),
    ("trained", training_text),
    ("served as", lambda card: served_text(card.account) if card.account else NOTHING),
    ("speed", speed_text),
    ("predicted KL", lambda card: kl_text(card.predicted_kl)),
    ("mean KL", mean_kl_text),
    ("99th percentile", lambda card: kl_text(card.evaluation.text.kl_p99 if card.evaluation else None)),
    ("perplexity", lambda card: f"{card.evaluation.text.perplexity:.4f}" if card.evaluation else NOTHING),
    (
        "same first choice",
        lambda card: f"{100 * card.evaluation.text.top1_agreement:.2f} %" if card.evaluation else NOTHING,
    ),
)
"""Rows of a comparison: the name of a figure, and its text for a card."""


def comparison_rows(cards: Sequence[Card]) -> list[list[str]]:
    """A head, then a row per figure and some per role; a column per variant."""
    rows = [["", *(card.variant for card in cards)]]
    rows += [[name, *(text(card) for card in cards)] for name, text in FIELDS]
    for role in roles_of(cards):
        rows.append([f"{role}: gate", *(_verdict(card.gate.get(role)) for card in cards)])
        rows.append([f"{role}: right", *(accuracy_text(card, role) for card in cards)])
        rows.append([f"{role}: drop", *(drop_text(card, role) for card in cards)])
        checks = [checks_of(card, role) for card in cards]
        for name in dict.fromkeys(name for found in checks for name in found):
            rows.append([f"{role}: {name}", *(paired_text(found.get(name)) for found in checks)])
        rows += reported_rows(cards, role)
    return rows


def format_comparison(cards: Sequence[Card]) -> str:
    """Variants side by side, and the module groups that they store differently."""
    text = align(comparison_rows(cards))
    differ = different_groups(cards)
    if differ:
        head = ["stored differently", *(card.variant for card in cards)]
        text += "\n\n" + align([head, *differ])
    return text


def different_groups(cards: Sequence[Card]) -> list[list[str]]:
    """Module groups whose scheme is not the same in all cards: name, then the scheme in each."""
    names = dict.fromkeys(name for card in cards for name in card.schemes)
    rows = [[name, *(card.schemes.get(name, "bf16") for card in cards)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def right_text(card: Card, role: str) -> str:
    """Right answers of a role: the variant's and the reference's; the reference's own alone."""
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    if figures is None:
        return ""
    word = "right" if figures.evidence == "labels" else "begin as the reference's"
    text = accuracy_text(card, role).removesuffix(f" {AS_REFERENCE}")
    own = f"{word}: {figures.correct} of {figures.items}, {text}"
    if card.variant == card.reference:
        return own
    theirs = figures.reference_correct
    of_items = f"{theirs} of {figures.items}, {100 * theirs / figures.items:.1f} %"
    return f"{own}; the reference {card.reference}: {of_items}"


def format_card(card: Card, versions: Sequence[str] = (), stale: Sequence[str] = ()) -> str:
    """Everything about one variant: figures, verdicts with their reasons, notes, schemes, versions.

    ``stale`` is how the engine that it was measured on differs from the one at hand.
    """
    lines = [f"{card.model}:{card.variant}", align([[name, text(card)] for name, text in FIELDS])]
    for role, verdict in card.gate.items():
        lines.append(f"{role}: {MARKS[verdict.outcome]}: " + "; ".join(verdict.reasons))
        if right := right_text(card, role):
            lines.append(f"  {right}")
    lines += [f"suspicious: {doubt}" for doubt in card.doubts]
    lines += stale_lines({card.variant: stale})
    lines += [f"note: {note}" for note in card.notes]
    if card.calibration:
        used = card.calibration
        lines.append(f"calibrated on {used.source}: {used.samples:,} samples, {used.tokens:,} tokens")
    if len(set(card.schemes.values())) > 1:
        lines += ["", align([["module group", "scheme", "method"], *_schemes(card)])]
    if card.evaluation:
        engine = ", ".join(f"{name} {value}" for name, value in card.evaluation.engine.items() if value)
        lines.append(f"measured on: {engine}")
    made = ", ".join(f"{name} {value}" for name, value in card.versions.items())
    lines.append(f"created {card.created} with {made}")
    if len(versions) > 1:
        marked = (f"{name} (this one)" if name == card.version else name for name in versions)
        lines.append(f"versions, the oldest first: {', '.join(marked)}")
    return "\n".join(lines)


def _schemes(card: Card) -> list[list[str]]:
    return [[name, how, card.methods.get(name, card.method)] for name, how in card.schemes.items()]


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
