"""Grafana's dashboards, written from what is said here: ``python -m deploy.dashboards``.

The JSON files are what Grafana and the chart take; they are made, so that a change can be read here.
"""

from __future__ import annotations

from pathlib import Path

from deploy.dashboards.cost import COST
from deploy.dashboards.gateways import GATEWAYS
from deploy.dashboards.model import Dashboard
from deploy.dashboards.operators import OPERATORS
from deploy.dashboards.quality import QUALITY
from deploy.dashboards.render import COLUMNS, render, text_of

__all__ = ["COLUMNS", "DASHBOARDS", "DIRECTORY", "Dashboard", "render", "text_of"]

DIRECTORY = Path(__file__).resolve().parents[2] / "helm" / "tiercel" / "files" / "dashboards"
DASHBOARDS = (OPERATORS, QUALITY, COST, GATEWAYS)
