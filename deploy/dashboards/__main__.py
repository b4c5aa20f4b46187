from __future__ import annotations

from deploy.dashboards import DASHBOARDS, DIRECTORY, text_of

DIRECTORY.mkdir(parents=True, exist_ok=True)
for dashboard in DASHBOARDS:
    (DIRECTORY / f"{dashboard.name}.json").write_text(text_of(dashboard), encoding="utf-8")
