"""A fleet plan for people: a table, sentences, a page with a picture; and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from deploy.fleet.plan import FleetPlan, Ranked
from deploy.fleet.traffic import Traffic
from quantize.report.figures import draw_text, svg
from quantize.report.page import PALETTE, document, table
from quantize.report.tables import align

MOST_SHOWN = 8
"""Layouts in the table and the picture."""
_BAR, _GAP, _LEFT, _RIGHT = 26, 14, 12, 96


def format_plan(plan: FleetPlan, traffic: Traffic, refused: Mapping[tuple[str, ...], str]) -> str:
    """The table of layouts, what each role gets of the chosen one, and why the runner-up lost."""
    best = plan.chosen
    lines = [align(_rows(plan)), ""]
    lines.append(f"chosen: {name_of(best)}")
    lines.append(align(_role_rows(best, traffic)))
    lines += [f"  {variant} on {one.where}" for variant, one in best.layout.placed.items()]
    if len(plan.ranked) > 1:
        second = plan.ranked[1]
        lines.append(f"runner-up: {name_of(second)}: {plan.why(second)}")
    lines += [f"does not fit: {' + '.join(served)}: {why}" for served, why in refused.items()]
    if best.missed:
        lines += [
            f"{role} misses its target: it would take {factor:.1f} times as long"
            for role, factor in best.missed.items()
        ]
    if best.layout.mps:
        lines.append("this needs NVIDIA's MPS: start nvidia-cuda-mps-control -d before the engines")
    return "\n".join(lines)


def name_of(one: Ranked) -> str:
    """What a layout serves."""
    return " + ".join(one.layout.served) + (" with MPS" if one.layout.mps else "")


def plan_as_json(plan: FleetPlan, traffic: Traffic, refused: Mapping[tuple[str, ...], str]) -> dict[str, Any]:
    """Everything that :func:`format_plan` tells, of all layouts."""
    return {
        "traffic": traffic.model_dump(mode="json"),
        "layouts": [
            {
                "served": list(one.layout.served),
                "mps": one.layout.mps,
                "serves": dict(one.layout.serves),
                "where": {variant: placed.where for variant, placed in one.layout.placed.items()},
                "memory_bytes": one.layout.memory,
                "sessions_per_s": one.prediction.sessions_per_s,
                "session_s": one.prediction.session_s,
                "busy": dict(one.prediction.busy),
                "latencies": {
                    role: {"first_token_s": latency.first_token_s, "total_s": latency.total_s}
                    for role, latency in one.prediction.latencies.items()
                },
                "missed": dict(one.missed),
                "why_not": plan.why(one) if one is not plan.chosen else "",
            }
            for one in plan.ranked
        ],
        "refused": [{"served": list(served), "why": why} for served, why in refused.items()],
    }


def plan_page(plan: FleetPlan, traffic: Traffic, refused: Mapping[tuple[str, ...], str]) -> str:
    """The plan as one HTML page."""
    best = plan.chosen
    body = [
        "<h1>Fleet plan</h1>",
        f"<p>{traffic.sessions} sessions at a time. Chosen: {escape(name_of(best))}, predicted "
        f"{best.prediction.sessions_per_s:.3g} sessions per second.</p>",
        f"<h2>Layouts</h2><figure>{_bars(plan)}</figure>",
        table(_rows(plan)),
        "<h2>What each role gets</h2>",
        table(_role_rows(best, traffic)),
    ]
    if refused:
        rows = [["does not fit", "why"], *([" + ".join(served), why] for served, why in refused.items())]
        body += ["<h2>What does not fit</h2>", table(rows)]
    return document("Fleet plan", "\n".join(body))


def _rows(plan: FleetPlan) -> list[list[str]]:
    rows = [["served", "sessions/s", "session", "memory", "busiest", "why not"]]
    for one in plan.ranked[:MOST_SHOWN]:
        busiest, share = max(one.prediction.busy.items(), key=lambda entry: entry[1])
        rows.append(
            [
                name_of(one),
                f"{one.prediction.sessions_per_s:.3g}",
                f"{one.prediction.session_s:.3g} s",
                f"{one.layout.memory / 1e9:.2f} GB",
                f"{busiest} {100 * share:.0f} %",
                plan.why(one) if one is not plan.chosen else "chosen",
            ]
        )
    return rows


def _role_rows(one: Ranked, traffic: Traffic) -> list[list[str]]:
    rows = [["role", "gets", "first token", "answer", "prompt", "new", "answer tokens"]]
    for role, latency in one.prediction.latencies.items():
        asked = traffic.roles[role]
        rows.append(
            [
                role,
                one.layout.serves[role],
                f"{latency.first_token_s:.3g} s",
                f"{latency.total_s:.3g} s",
                f"{asked.prompt_tokens:.0f}",
                f"{asked.new_tokens:.0f}",
                f"{asked.answer_tokens:.0f}",
            ]
        )
    return rows


def _bars(plan: FleetPlan) -> str:
    """Sessions per second of each layout; the chosen one in another colour, and it says so."""
    shown = plan.ranked[:MOST_SHOWN]
    most = max(one.prediction.sessions_per_s for one in shown)
    width = 760
    parts = []
    for number, one in enumerate(shown):
        y = number * (_BAR + _GAP + 16) + 18
        length = (width - _LEFT - _RIGHT) * one.prediction.sessions_per_s / most
        chosen = one is plan.chosen
        colour = PALETTE[0] if chosen else "var(--grid)"
        parts.append(draw_text(_LEFT, y - 4, name_of(one) + (" (chosen)" if chosen else ""), colour="--ink"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="3" fill="{colour}"/>'
        )
        parts.append(
            draw_text(_LEFT + length + 6, y + _BAR - 8, f"{one.prediction.sessions_per_s:.3g} per s")
        )
    height = len(shown) * (_BAR + _GAP + 16) + 6
    return svg(width, height, "Predicted sessions per second of each layout", parts)
