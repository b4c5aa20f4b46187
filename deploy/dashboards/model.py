"""What a dashboard is made of, and the parts of PromQL that many panels have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.engine import WITHOUT_ADAPTER

ROLE, MODEL = 'role=~"$role"', 'model=~"$model"'
VARIANT = f'{MODEL}, variant=~"$variant"'
BOTH = f"{ROLE}, {VARIANT}"
ENGINE = f'model_name=~"($model)({WITHOUT_ADAPTER})?"'
"""What the choice of models narrows vLLM's own metrics by."""
RATE = "$__rate_interval"

Query = tuple[str, str]
"""PromQL, and the legend of its series."""


@dataclass(frozen=True)
class Panel:
    """One panel. ``limits``: values from which on it is yellow, and red. ``unit``: one of Grafana's ids."""

    title: str
    text: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    limits: tuple[float, float] | None = None
    good_is_high: bool = False
    stacked: bool = False
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Value to the word that stands for it, and its colour."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    text: str
    rows: Sequence[Row]
    variables: Sequence[Mapping[str, Any]] = ()


def quantile(q: float, metric: str, by: str, labels: str = BOTH) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{labels}}}[{RATE}])))"


def mean(metric: str, by: str, labels: str = BOTH) -> str:
    total, count = (f"sum by ({by}) (rate({metric}_{part}{{{labels}}}[{RATE}]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def small(title: str, text: str, query: str, unit: str = "short", **more: Any) -> Panel:
    """One number."""
    return Panel(title, text, [(query, "")], unit, kind="stat", width=4, height=4, **more)
