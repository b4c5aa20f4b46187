"""The report as one HTML file: no script, no request to anywhere, dark or light, readable on a phone."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from math import inf

from deploy.report_data import DemoReport, Incident, incident_lines, percent, role_rows, variant_rows
from deploy.report_figure import PANELS, render_svg
from deploy.watch_page import Mark, Share, gathered, over_time
from quantize.report.page import document, framed, row, table, verdict

STYLE = """
.time { overflow-x: auto; } .time svg { min-width: 34rem; }
ul { padding-left: 1.2rem; }
"""


def render_html(report: DemoReport) -> str:
    """The page as text, to be written as UTF-8."""
    charts = "\n".join(
        f'<figure role="group" aria-label="{escape(title)}"><h3>{escape(title)}</h3>'
        f"{render_svg(panel, report, f'chart{index}')}</figure>"
        for index, (title, panel) in enumerate(PANELS.items())
    )
    width = len(variant_rows(report)[0]) - len(report.roles)
    body = f"""<header>
<h1>Every agent at the precision it needs</h1>
<p>{escape(report.circumstances)}</p>
</header>
{_tiles(report)}
<section class="charts" aria-label="Charts">
{charts}
</section>
<section>
<h2>Roles</h2>
{table(role_rows(report))}
</section>
<section>
<h2>Variants</h2>
{table([row[:width] for row in variant_rows(report)])}
</section>
<section>
<h2>Gates: which role a variant may serve</h2>
{_gates(report)}
</section>
{_incident(report)}
<footer>Latency is measured at the client. Accuracy in the table of roles is on the demo's messages, in the
gates on held-out items. The same figures are in report.json.</footer>"""
    return document(f"Tiercel: {report.headline}", body, STYLE)


_A_POINT = 12
"""Answers, at least, that a point of the second act's chart is of."""


def _phases(incident: Incident, role: str) -> list[Share]:
    """Right answers of a role, added up within what came before the harm, until its demotion, and after."""
    answers = [Share(answer.at, int(answer.right), 1) for answer in incident.answers if answer.role == role]
    ends = [incident.harmed_at]
    ends += [incident.harmed_at + one.seconds for one in incident.demotions if one.role == role]
    points: list[Share] = []
    for begin, end in pairwise([-inf, *ends, inf]):
        phase = [answer for answer in answers if begin < answer.at <= end]
        points += gathered(phase, max(1, len(phase) // _A_POINT))
    return points


def _incident(report: DemoReport) -> str:
    """The second act: right answers of every role over time, before and after the harm."""
    incident = report.incident
    if incident is None:
        return ""
    lines = {role: _phases(incident, role) for role in report.roles}
    marks = [Mark(incident.harmed_at, f"{incident.variant} harmed", "var(--bad)")]
    for one in incident.demotions:
        marks.append(Mark(incident.harmed_at + one.seconds, f"demoted for {one.role}", "var(--good)"))
    title = "Right answers over time, by role"
    said = "".join(f"<li>{escape(line)}</li>" for line in incident_lines(incident))
    return f"""<section>
<h2>The second act: a variant is harmed under live traffic</h2>
<ul>{said}</ul>
<figure class="time"><h3>{title}</h3>{over_time(lines, marks, title, "seconds")}</figure>
</section>"""


def _tiles(report: DemoReport) -> str:
    answers = sum(role.count for role in report.roles.values())
    lowered = sum(
        count
        for role in report.roles.values()
        for variant, count in role.variant_counts.items()
        if report.variants[variant].kl_mean is not None
    )
    rate = report.messages / report.wall_seconds if report.wall_seconds else 0.0
    tiles = {
        "messages": f"{report.messages:,}",
        "wall time": f"{report.wall_seconds:,.1f} s",
        "messages per second": f"{rate:,.1f}",
        "answers below reference precision": percent(lowered / answers if answers else None),
    }
    body = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in tiles.items()
    )
    return f"<dl>{body}</dl>"


def _gates(report: DemoReport) -> str:
    heads = ("variant", "role", "outcome", "accuracy", "because")
    lines = [
        row(
            (
                escape(name),
                escape(role),
                verdict(judged.outcome),
                percent(variant.accuracy.get(role)),
                escape("; ".join(judged.reasons)),
            ),
            heads,
        )
        for name, variant in report.variants.items()
        for role, judged in variant.gate.items()
    ]
    return framed(heads, lines)
