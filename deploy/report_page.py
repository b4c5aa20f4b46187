"""The report as one HTML file: no script, no request to anywhere, dark or light, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deploy.report import DemoReport, percent, role_rows, variant_rows
from deploy.report_figure import OUTCOMES, PANELS, render_svg

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #5b6470; --grid: #e3e7eb; --paper: #f6f8fa;
  --card: #ffffff; --good: #00694d; --bad: #a34700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaef; --muted: #9aa5b1; --grid: #2d333b; --paper: #0f1318; --card: #171c22;
    --good: #4cc9a0; --bad: #f0955a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: 0; color: var(--muted); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1.6rem 0; }
dl div, figure, table { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
dl div { padding: .8rem 1rem; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.4rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: 1rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: .9rem; }
th, td { padding: .6rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--grid); }
thead th { border: 0; color: var(--muted); font-weight: 500; }
tbody th { font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.passed { color: var(--good); } .failed { color: var(--bad); } .not_enough_evidence { color: var(--muted); }
b { white-space: nowrap; }
footer { margin-top: 2rem; font-size: .85rem; color: var(--muted); }
@media (max-width: 50rem) {
  thead { position: absolute; clip-path: inset(50%); }
  tbody, tr, th, td { display: block; }
  tr { padding: .5rem 0; border-top: 1px solid var(--grid); } tbody tr:first-child { border: 0; }
  th, td { border: 0; padding: .15rem 1rem; }
  td { display: flex; gap: 1rem; justify-content: space-between; text-align: right; }
  td::before { content: attr(data-label); color: var(--muted); text-align: left; flex: none; }
}
"""


def render_html(report: DemoReport) -> str:
    """The page as text, to be written as UTF-8."""
    charts = "\n".join(
        f'<figure role="group" aria-label="{escape(title)}"><h3>{escape(title)}</h3>'
        f"{render_svg(panel, report, f'chart{index}')}</figure>"
        for index, (title, panel) in enumerate(PANELS.items())
    )
    width = len(variant_rows(report)[0]) - len(report.roles)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Tiercel: {escape(report.headline)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>Every agent at the precision it needs</h1>
<p>{escape(report.circumstances)}</p>
</header>
{_tiles(report)}
<section class="charts" aria-label="Charts">
{charts}
</section>
<section>
<h2>Roles</h2>
{_table(role_rows(report))}
</section>
<section>
<h2>Variants</h2>
{_table([row[:width] for row in variant_rows(report)])}
</section>
<section>
<h2>Gates: which role a variant may serve</h2>
{_gates(report)}
</section>
<footer>Latency is measured at the client. Accuracy in the table of roles is on the demo's messages, in the
gates on held-out items. The same figures are in report.json.</footer>
</main>
</body>
</html>
"""


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


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells know their heading, for screens on which the head does not fit."""
    heads, *body = rows
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-label="{escape(head)}">{escape(cell)}</td>'
            for head, cell in zip(heads[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in body
    ]
    return _framed(heads, lines)


def _gates(report: DemoReport) -> str:
    lines = []
    for name, variant in report.variants.items():
        for role, verdict in variant.gate.items():
            sign, words, _, _ = OUTCOMES[verdict.outcome]
            lines.append(
                f'<tr><th scope="row">{escape(name)}</th><td data-label="role">{escape(role)}</td>'
                f'<td data-label="outcome"><b class="{verdict.outcome}">{sign} {words}</b></td>'
                f'<td data-label="accuracy">{percent(variant.accuracy.get(role))}</td>'
                f'<td data-label="because">{escape("; ".join(verdict.reasons))}</td></tr>'
            )
    return _framed(("variant", "role", "outcome", "accuracy", "because"), lines)


def _framed(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
