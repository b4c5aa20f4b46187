"""The demo's report as files, and as a table for a terminal.

``report.json`` holds the figures and is the source of the other two: ``report.html`` is one file that
asks for nothing outside itself, ``report.png`` the picture for a chat or a slide.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deploy.report_data import OUTCOME_WORDS, DemoReport, incident_lines, role_rows, variant_rows

STEM = "report"


def write_report(report: DemoReport, directory: Path) -> None:
    """Write ``report.json``, ``report.png`` and ``report.html`` into ``directory``, made if missing.

    A reader sees the old file or the new one, never a part of one.
    """
    # Matplotlib takes a second to import, which commands without a picture should not pay.
    from deploy.report_figure import render_png
    from deploy.report_page import render_html

    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "json": (report.model_dump_json(indent=2) + "\n").encode(),
        "png": render_png(report),
        "html": render_html(report).encode(),
    }
    for suffix, content in files.items():
        partial = directory / f"{STEM}.{suffix}.partial"
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(directory / f"{STEM}.{suffix}")


def format_table(report: DemoReport) -> str:
    """The report for a terminal: a headline and two tables, no line with trailing blanks."""
    gates = ["gate"] + [
        f"{variant} for {role}: {OUTCOME_WORDS[verdict.outcome]} ({'; '.join(verdict.reasons)})"
        for variant, figures in report.variants.items()
        for role, verdict in figures.gate.items()
    ]
    # The gates have a list of their own: with their reasons they do not fit into columns.
    width = len(variant_rows(report)[0]) - len(report.roles)
    blocks = [
        f"{report.headline} · {report.circumstances}",
        _align(role_rows(report)),
        _align([row[:width] for row in variant_rows(report)]),
        "\n  ".join(gates) if len(gates) > 1 else "",
        "\n  ".join(["watch", *incident_lines(report.incident)]) if report.incident else "",
    ]
    return "\n\n".join(block for block in blocks if block)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; the first to the left, and every one whose cells are words."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    figures = [any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if figure and index else cell.ljust(width)
            for index, (cell, width, figure) in enumerate(zip(row, widths, figures, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])
