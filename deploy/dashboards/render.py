"""A dashboard as Grafana reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deploy.dashboards.model import MODEL, Dashboard, Panel, Row

COLUMNS = 24
"""Of Grafana's grid."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def render(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana reads it."""
    return {
        "uid": f"tiercel-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["tiercel"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "fiscalYearStartMonth": 0,
        "links": [
            {
                "title": "Tiercel",
                "type": "dashboards",
                "tags": ["tiercel"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
                "tooltip": "",
                "url": "",
            }
        ],
        "annotations": {"list": []},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "regex": "",
                    "refresh": 1,
                    "hide": 0,
                    "multi": False,
                    "includeAll": False,
                    "options": [],
                    "current": {},
                },
                _labels("role", "Role", "label_values(tiercel_requests_total, role)"),
                _labels("model", "Model", "label_values(tiercel_variant_weight_bytes, model)"),
                _labels(
                    "variant", "Variant", f"label_values(tiercel_variant_weight_bytes{{{MODEL}}}, variant)"
                ),
                *dashboard.variables,
            ]
        },
        "panels": list(_placed(dashboard.rows)),
    }


def _labels(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable of label values; all of them unless some are chosen."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "variable"},
        "refresh": 2,
        "sort": 1,
        "regex": "",
        "hide": 0,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "options": [],
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _placed(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """Panels from left to right, row by row."""
    number, top = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
        }
        left, line, top = 0, 0, top + 1
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, line, top = 0, 0, top + line
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            left, line = left + panel.width, max(line, panel.height)
        top += line


def _panel(panel: Panel) -> dict[str, Any]:
    shown: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}, "mappings": []}
    if panel.limits is not None:
        low, high = panel.limits
        colours = ("red", "yellow", "green") if panel.good_is_high else ("green", "yellow", "red")
        steps = zip(colours, (None, low, high), strict=True)
        shown["thresholds"] = {
            "mode": "absolute",
            "steps": [{"color": colour, "value": value} for colour, value in steps],
        }
    else:
        shown["thresholds"] = {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}
    if panel.words:
        options = {
            value: {"text": word, "color": colour, "index": index}
            for index, (value, (word, colour)) in enumerate(panel.words.items())
        }
        shown["mappings"] = [{"type": "value", "options": options}]
    options, custom = _LOOKS[panel.kind]
    if panel.kind != "timeseries":
        shown["color"] = {"mode": "thresholds"}
    elif panel.stacked:
        custom = custom | {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}
    elif panel.limits is not None:
        custom = custom | {"thresholdsStyle": {"mode": "dashed"}}
    if panel.unit == "percentunit":
        shown["min"] = 0
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {**shown, "custom": custom}, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
                "instant": panel.kind in ("stat", "bargauge"),
                "range": panel.kind not in ("stat", "bargauge"),
            }
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_LOOKS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "timeseries": (
        {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False},
    ),
    "stat": ({"reduceOptions": _LAST, "colorMode": "value", "graphMode": "none", "textMode": "auto"}, {}),
    "bargauge": ({"reduceOptions": _LAST, "displayMode": "basic", "orientation": "horizontal"}, {}),
    "state-timeline": (
        {
            "showValue": "auto",
            "mergeValues": True,
            "rowHeight": 0.9,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
        },
        {"fillOpacity": 70, "lineWidth": 0},
    ),
}
"""Kind of panel to its options, and the custom part of its fields."""


def text_of(dashboard: Dashboard) -> str:
    """The file's text."""
    return json.dumps(render(dashboard), indent=2, ensure_ascii=False) + "\n"
