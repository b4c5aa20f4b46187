"""The table of docs/frameworks, of what `make frameworks` saw: ``python -m tests.frameworks.table``."""

from __future__ import annotations

import json
import re

from tests.frameworks.environments import PAGES, PLACE, Framework, frameworks
from tests.frameworks.recipe import sections

SEEN = PLACE / "seen.json"
"""What became of every scenario when it was last run."""
COLUMNS = {
    "plain": "Plain",
    "streaming with usage": "Streaming with usage",
    "tools": "Tools",
    "parallel tools": "Parallel tools",
    "strict schema": "Strict schema",
    "two roles": "Two agents, two roles",
    "cancel": "Cancel",
}
"""Scenarios, each with the heading of its recipe."""
BEGIN, END = "<!-- seen -->\n", "<!-- /seen -->\n"


def prose(page: str, heading: str) -> str:
    """What a page says under a heading, without the code."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return " ".join(
        re.sub(r"^```.*?^```", "", found[1] if found else "", flags=re.DOTALL | re.MULTILINE).split()
    )


def row(framework: Framework, seen: dict[str, dict[str, str]]) -> str:
    """A framework's line; a scenario that has something to be said of is a link to that."""
    page = framework.page.read_text(encoding="utf-8")
    shown = sections(page)
    cells = []
    for scenario, heading in COLUMNS.items():
        outcome = seen.get(scenario, {"outcome": "not run"})["outcome"]
        word = {"passed": "yes", "skipped": "no", "failed": "**fails**"}.get(outcome, outcome)
        if scenario == "two roles":
            word += ", header" if "variants" in shown.get(heading, "") else ", log"
        elif prose(page, heading):
            word = f"[{word}]({framework.page.name}#{heading.lower().replace(' ', '-')})"
        cells.append(word)
    others = [one for one in shown if one != "Connect" and one not in COLUMNS.values()]
    further = seen.get("further", {"outcome": "skipped"})["outcome"]
    more = ", ".join(one.lower() for one in others) if further == "passed" else "**fails**" if others else ""
    versions = ", ".join(f"`{one}`" for one in framework.install if "==" in one)
    return f"| [{framework.title}]({framework.page.name}) | {versions} | " + " | ".join([*cells, more]) + " |"


def table() -> str:
    """All lines, with the date of the newest."""
    seen = json.loads(SEEN.read_text(encoding="utf-8"))
    names = [name for name, one in frameworks().items() if not one.npm]
    dates = [one["date"] for of in seen.values() for one in of.values()]
    lines = [
        f"Seen on {max(dates)}:",
        "",
        "| framework | versions | " + " | ".join([*COLUMNS, "further"]) + " |",
        "|---" * (len(COLUMNS) + 3) + "|",
        *(row(frameworks()[name], seen.get(name, {})) for name in names),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    page = PAGES / "README.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
