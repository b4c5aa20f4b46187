"""What all of Tiercel's pages share: one HTML file, no script, no request to anywhere, dark or light,
readable on a phone, with tables that a screen reader can follow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from quantize.card import Outcome

INK, MUTED, GRID, PAPER = "#1f2328", "#5b6470", "#e3e7eb", "#ffffff"
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's colours, told apart with every common form of colour vision; one per variant."""
OUTCOMES = {
    Outcome.PASSED: ("✓", "passed", "#d9f0e8", "#00694d"),
    Outcome.FAILED: ("✕", "failed", "#fbe3d6", "#a34700"),
    Outcome.NOT_ENOUGH_EVIDENCE: ("?", "not enough evidence", "#eceff2", "#4a525c"),
}
"""Sign, words, tile and text colour: an outcome is never told by its colour alone."""

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


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; ``body`` is HTML, ``style`` further CSS. To be written as UTF-8."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Of text; the first row is the heads, the first cell of a row names it."""
    heads, *body = rows
    return framed(heads, [row([escape(cell) for cell in cells], heads) for cells in body])


def row(cells: Sequence[str], heads: Sequence[str]) -> str:
    """Cells of HTML that know their heading, for screens on which the head does not fit."""
    first, *rest = cells
    return (
        f'<tr><th scope="row">{first}</th>'
        + "".join(
            f'<td data-label="{escape(head)}">{cell}</td>' for head, cell in zip(heads[1:], rest, strict=True)
        )
        + "</tr>"
    )


def framed(heads: Sequence[str], lines: Sequence[str]) -> str:
    """A table of rows that are HTML already."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def verdict(outcome: Outcome) -> str:
    """An outcome as sign and words."""
    sign, words, _, _ = OUTCOMES[outcome]
    return f'<b class="{outcome}">{sign} {words}</b>'


def section(title: str, text: str, body: str) -> str:
    """A part of the page; ``text`` and ``body`` are HTML."""
    return f"<section><h2>{escape(title)}</h2>\n<p>{text}</p>\n{body}\n</section>"
