"""What the demo measured, as data, and as the rows and words that its table, page and picture share."""

from __future__ import annotations

import math
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantize.card import Outcome, Verdict

OUTCOME_WORDS = {
    Outcome.PASSED: "passed",
    Outcome.FAILED: "failed",
    Outcome.NOT_ENOUGH_EVIDENCE: "not enough evidence",
}
NOTHING = "–"
"""What stands where a figure was not measured."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Machine(_Section):
    cpu: str
    cores: int = Field(ge=1)


class RoleReport(_Section):
    """One role's answers in the demo. Seconds are the client's; None means not measured."""

    variant_counts: dict[str, int] = Field(description="variant to answers that it gave")
    count: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1, description="share of right answers, by the role's check")
    accuracy_low: float = Field(ge=0, le=1, description="95 % interval")
    accuracy_high: float = Field(ge=0, le=1)
    agreement_with_reference: float | None = Field(
        default=None, ge=0, le=1, description="share equal to the reference's; None if it served the role"
    )
    latency_p50_s: float | None = Field(default=None, ge=0)
    latency_p95_s: float | None = Field(default=None, ge=0)
    ttft_p50_s: float | None = Field(default=None, ge=0)
    ttft_p95_s: float | None = Field(default=None, ge=0)
    tokens_per_second: float | None = Field(default=None, ge=0, description="completion tokens")
    hallucination_score: float | None = Field(
        default=None, ge=0, le=1, description="share of checked sentences that are grounded, 1 is best"
    )


class VariantReport(_Section):
    """One variant: what it costs, what it lost, and which roles its gate lets it serve."""

    scheme: str
    weight_bytes: int = Field(ge=0)
    kv_bytes_per_token: int = Field(ge=0)
    engine_memory_bytes: int | None = Field(default=None, ge=0, description="the engine's processes")
    kl_mean: float | None = Field(default=None, description="nats per token; None for the reference")
    perplexity: float | None = None
    gate: dict[str, Verdict] = Field(default_factory=dict)
    accuracy: dict[str, float] = Field(default_factory=dict, description="role to held-out accuracy")


class Answer(_Section):
    """One agent's answer; ``at``: seconds from the beginning of the run."""

    role: str
    variant: str | None
    right: bool
    at: float


class Demotion(_Section):
    """When the watch acted: answers of the harmed variant that clients got, and seconds, from the harm on."""

    role: str
    answers: int
    seconds: float
    why: str


class Incident(_Section):
    """The act, as it went."""

    variant: str
    fault: str
    harmed_at: float
    answers: tuple[Answer, ...]
    demotions: tuple[Demotion, ...]

    def accuracy(
        self, role: str, variant: str | None = None, since: float = 0.0, until: float = math.inf
    ) -> float | None:
        """Share of right answers of a role, of all variants or of one, within a stretch of time."""
        found = [
            answer.right
            for answer in self.answers
            if answer.role == role and since <= answer.at <= until and variant in (None, answer.variant)
        ]
        return sum(found) / len(found) if found else None


class DemoReport(_Section):
    """The whole report."""

    created: datetime
    machine: Machine
    messages: int = Field(ge=0)
    wall_seconds: float = Field(ge=0)
    roles: dict[str, RoleReport] = Field(min_length=1)
    variants: dict[str, VariantReport] = Field(min_length=1, description="the order is kept in tables")
    incident: Incident | None = Field(default=None, description="the second act")

    @model_validator(mode="after")
    def _served_variants_are_described(self) -> DemoReport:
        for name, role in self.roles.items():
            for variant in role.variant_counts:
                if variant not in self.variants:
                    raise ValueError(f"roles.{name}: served by {variant!r}, which variants does not have")
        return self

    @property
    def headline(self) -> str:
        return f"{self.messages:,} messages in {self.wall_seconds:,.1f} s"

    @property
    def circumstances(self) -> str:
        cores = f"{self.machine.cores} core" + "s" * (self.machine.cores != 1)
        return f"{self.machine.cpu}, {cores} · {self.created:%Y-%m-%d %H:%M %Z}".rstrip()


def role_rows(report: DemoReport) -> list[list[str]]:
    """The table of roles: a row of headings, then a row of texts per role."""
    rows = [
        "role|served by|answers|accuracy (95 %)|as reference|latency p50/p95"
        "|TTFT p50/p95|tokens/s|grounded".split("|")
    ]
    for name, role in report.roles.items():
        rows.append(
            [
                name,
                served_by(role),
                f"{role.count:,}",
                f"{percent(role.accuracy)} ({100 * role.accuracy_low:.1f}–{100 * role.accuracy_high:.1f})",
                percent(role.agreement_with_reference),
                _pair(milliseconds(role.latency_p50_s), milliseconds(role.latency_p95_s)),
                _pair(milliseconds(role.ttft_p50_s), milliseconds(role.ttft_p95_s)),
                number(role.tokens_per_second, 0),
                percent(role.hallucination_score),
            ]
        )
    return rows


def variant_rows(report: DemoReport) -> list[list[str]]:
    """The table of variants, gates last: a row of headings, then a row of texts per variant."""
    rows = [
        "variant|scheme|engine memory|weights|KV per token|KL (nats/token)|perplexity".split("|")
        + [f"gate: {role}" for role in report.roles]
    ]
    for name, variant in report.variants.items():
        rows.append(
            [
                name,
                variant.scheme,
                memory(variant.engine_memory_bytes),
                memory(variant.weight_bytes),
                memory(variant.kv_bytes_per_token),
                number(variant.kl_mean, 4),
                number(variant.perplexity, 2),
                *(gate_text(variant, role) for role in report.roles),
            ]
        )
    return rows


def incident_lines(incident: Incident) -> list[str]:
    """The second act in sentences."""
    lines = [f"the engine of {incident.variant} was replaced by one with harmed weights ({incident.fault})"]
    for one in incident.demotions:
        before = incident.accuracy(one.role, until=incident.harmed_at)
        harmed = incident.accuracy(one.role, incident.variant, incident.harmed_at)
        # Answers that were under way at the demotion were finished by the harmed variant.
        later = [
            a for a in incident.answers if a.role == one.role and a.at > incident.harmed_at + one.seconds
        ]
        healthy = [a.right for a in later if a.variant != incident.variant]
        after = sum(healthy) / len(healthy) if healthy else None
        lines.append(
            f"{one.role}: demoted after {one.answers} answers, {one.seconds:.0f} s, because {one.why}; "
            f"right: {percent(before)} before, {percent(harmed)} harmed, {percent(after)} afterwards"
        )
    missed = {a.role for a in incident.answers if a.variant == incident.variant} - {
        one.role for one in incident.demotions
    }
    lines += [f"{role}: not demoted" for role in sorted(missed)]
    return lines


def served_by(role: RoleReport) -> str:
    """The variants that served a role, most answers first, with their shares when there are several."""
    ranked = sorted(role.variant_counts.items(), key=lambda item: -item[1])
    if len(ranked) == 1:
        return ranked[0][0]
    total = sum(role.variant_counts.values()) or 1
    return ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in ranked) or NOTHING


def gate_text(variant: VariantReport, role: str) -> str:
    """A gate's outcome, with the held-out accuracy that it was judged by where there is one."""
    verdict = variant.gate.get(role)
    if verdict is None:
        return NOTHING
    words = OUTCOME_WORDS[verdict.outcome]
    return f"{words}, {percent(variant.accuracy[role])}" if role in variant.accuracy else words


def _pair(first: str, second: str) -> str:
    """Two figures with their unit written once where it is the same."""
    unit = " " + second.rpartition(" ")[2]
    return f"{first.removesuffix(unit)}/{second}" if first.endswith(unit) else f"{first} / {second}"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def milliseconds(seconds: float | None) -> str:
    """A duration in milliseconds below one second, else in seconds."""
    if seconds is None:
        return NOTHING
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def memory(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    if count is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
