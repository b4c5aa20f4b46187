"""The metrics that exist: the gateway's by its registry, vLLM's by a list compared with its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
from prometheus_client import CollectorRegistry
from promql_parser import VectorSelector

from gateway.telemetry.counters import Family
from gateway.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "helm" / "tiercel" / "files" / "rules.yaml"
DASHBOARDS = ROOT / "helm" / "tiercel" / "files" / "dashboards"
VLLM_LIST = Path(__file__).with_name("vllm-0.32-metrics.txt")
VLLM_SOURCE = ROOT / ".venv-engine" / "lib"
SCRAPED = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds."""
_BY_CLASS = {"_gauge_cls": "gauge", "_counter_cls": "counter", "_histogram_cls": "histogram"}


def gateway_metrics() -> dict[str, frozenset[str]]:
    """Every series of the gateway, by name, with its labels: what it shows when each metric has a value."""
    metrics = Metrics(CollectorRegistry(), ())
    for one in vars(metrics).values():
        if isinstance(one, Family):
            one.labels(*one.label_names)
    found: dict[str, frozenset[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found[sample.name] = frozenset(sample.labels)
    return found


def vllm_metrics() -> set[str]:
    """The name of every series of vLLM."""
    found: set[str] = set()
    for line in VLLM_LIST.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, kind = line.split()
            found.update(_series(name, kind))
    return found


def _series(name: str, kind: str) -> list[str]:
    if kind == "histogram":
        return [f"{name}_bucket", f"{name}_sum", f"{name}_count"]
    return [f"{name}_total"] if kind == "counter" else [name]


def vllm_source() -> Path | None:
    """The module of the installed vLLM that defines its metrics."""
    return next(VLLM_SOURCE.glob("python3*/site-packages/vllm/v1/metrics/loggers.py"), None)


def defined_in(source: Path) -> set[tuple[str, str]]:
    """Name and kind of every metric that vLLM's module makes."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    made = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            kind = _BY_CLASS.get(call.func.attr)
            names = [
                k.value.value for k in call.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)
            ]
            if kind and names:
                made.add((str(names[0]), kind))
    if any(
        isinstance(node, ast.Constant) and node.value == "vllm:cache_config_info" for node in ast.walk(tree)
    ):
        made.add(("vllm:cache_config_info", "gauge"))  # its name is a variable there
    return made


def selectors(expression: str) -> list[VectorSelector]:
    """Every selector of a PromQL expression. Raises ValueError for what does not parse."""
    found: list[VectorSelector] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)

    promql.walk(promql.parse(expression), visit)
    return found


def labels_named(expression: str) -> Iterator[tuple[str, str]]:
    """Metric and label of every matcher in an expression."""
    for selector in selectors(expression):
        for matcher in selector.matchers.matchers:
            yield selector.name or "", matcher.name


def filled(expression: str) -> str:
    """A dashboard's query with Grafana's variables given: everything, over five minutes."""
    values = {
        "$__rate_interval": "5m",
        "$__range": "1h",
        "$role": ".*",
        "$model": ".*",
        "$variant": ".*",
        "$replica_hour": "1",
    }
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    if "$" in expression:
        raise ValueError(f"has a variable that nobody fills: {expression}")
    return expression
