"""The dashboards: what is checked in is what the script writes, and a Grafana could show it."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard
from prometheus_client import CollectorRegistry

from deploy.dashboards import COLUMNS, DASHBOARDS, DIRECTORY, Dashboard, render, text_of
from deploy.dashboards.model import ENGINE
from deploy.engine import WITHOUT_ADAPTER
from gateway.telemetry.metrics import Metrics
from tests.helm.metric_names import filled, selectors
from tests.helm.test_rules import check_names

EACH = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
UNITS = {"short", "s", "percentunit", "reqps", "ops", "bytes"}
"""Grafana's ids of units, as far as they are used here."""


def panels(dashboard: Dashboard) -> list[dict[str, Any]]:
    return [panel for panel in render(dashboard)["panels"] if panel["type"] != "row"]


@EACH
def test_the_file_is_what_the_script_writes(dashboard: Dashboard) -> None:
    text = (DIRECTORY / f"{dashboard.name}.json").read_text(encoding="utf-8")
    assert text == text_of(dashboard), "run: python -m deploy.dashboards"


@EACH
def test_grafanas_own_types_know_every_field(dashboard: Dashboard) -> None:
    """They leave out what they do not know: a field that is misspelt, or in the wrong place."""
    register_default_plugins()
    made = render(dashboard)
    read = json.loads(json.dumps(GrafanaDashboard.from_json(made), cls=JSONEncoder))
    assert lost(made, read) == []


def lost(made: Any, read: Any, place: str = "") -> list[str]:
    """Where ``read`` lacks something of ``made``, or has it otherwise."""
    if isinstance(made, dict) and isinstance(read, dict):
        return [name for key in made for name in lost(made[key], read.get(key), f"{place}.{key}")]
    if isinstance(made, list) and isinstance(read, list) and len(made) == len(read):
        pairs = enumerate(zip(made, read, strict=True))
        return [name for index, pair in pairs for name in lost(*pair, f"{place}[{index}]")]
    return [] if made == read else [place]


def test_there_is_no_file_that_the_script_does_not_write() -> None:
    assert {path.stem for path in DIRECTORY.iterdir()} == {dashboard.name for dashboard in DASHBOARDS}


def test_dashboards_do_not_take_each_others_place() -> None:
    made = [render(dashboard) for dashboard in DASHBOARDS]
    for field in ("uid", "title"):
        assert len({one[field] for one in made}) == len(made)
    for one in made:
        assert len(one["uid"]) <= 40
        assert "tiercel" in one["tags"]
        assert isinstance(one["schemaVersion"], int)


@EACH
def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: Dashboard) -> None:
    every = render(dashboard)["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["y"] >= 0
        assert place["x"] + place["w"] <= COLUMNS
    for one, other in itertools.combinations((panel["gridPos"] for panel in every), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


@EACH
def test_every_panel_says_what_it_shows(dashboard: Dashboard) -> None:
    for panel in panels(dashboard):
        title = panel["title"]
        assert panel["description"].endswith("."), title
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, title
        steps = defaults["thresholds"]["steps"]
        values = [step["value"] for step in steps]
        assert values[0] is None, title
        assert values[1:] == sorted(set(values[1:])), title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0, title
        for target in panel["targets"]:
            assert target["instant"] is not target["range"], title
            legend = target["legendFormat"]
            if panel["type"] != "stat":
                assert legend != "__auto", title
            assert legend.count("{{variant}}") == legend.count("{{model}}:{{variant}}"), title


@EACH
def test_every_query_reads_metrics_that_exist_of_the_chosen_source(dashboard: Dashboard) -> None:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            check_names(filled(target["expr"]))


@EACH
def test_variables_are_declared_before_they_are_used(dashboard: Dashboard) -> None:
    made = render(dashboard)
    declared = [variable["name"] for variable in made["templating"]["list"]]
    assert declared[:4] == ["datasource", "role", "model", "variant"]
    for variable in made["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            series, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
            check_names(filled(series))
            check_names(f'{series.partition("{")[0]}{{{label}=~".*"}}')
    for name in declared[1:]:
        assert f"${name}" in json.dumps(made["panels"]), f"{name} is chosen, and changes nothing"


@EACH
def test_a_choice_of_roles_and_variants_narrows_every_query_that_has_them(dashboard: Dashboard) -> None:
    """A panel that leaves the choice out would show others' figures under a chosen name."""
    whole = (
        *("tiercel_gateway", "tiercel_watch_outcomes_dropped_total", "tiercel_variant_weight_bytes"),
        *("tiercel_quality_dropped", "tiercel_quality_errors", "tiercel_responses"),
        *("tiercel_background_job", "tiercel_event_loop", "tiercel_log_lines", "tiercel_worker"),
    )
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for selector in selectors(filled(target["expr"])):
                name = selector.name or ""
                if "tiercel" in name and not name.startswith(whole) and panel["title"] != "Gateways":
                    chosen = {matcher.name for matcher in selector.matchers.matchers}
                    assert chosen & {"role", "variant"}, (panel["title"], name)
                    assert ("variant" in chosen) <= ("model" in chosen), (panel["title"], name)
                if name.startswith("vllm:"):
                    assert "model_name" in {matcher.name for matcher in selector.matchers.matchers}


def test_one_number_is_not_shown_where_it_would_be_divided_by_nothing() -> None:
    """Without traffic a rate is 0: 0 / 0 is shown as NaN, 1 / 0 as infinite."""
    stats = [panel for each in DASHBOARDS for panel in panels(each) if panel["type"] == "stat"]
    divided = [
        target["expr"]
        for panel in stats
        for target in panel["targets"]
        if " / (" in target["expr"] or " / sum" in target["expr"]
    ]
    assert divided
    assert [query for query in divided if "> 0)" not in query.partition(" / ")[2]] == []


def test_a_model_that_engines_serve_with_adapters_is_chosen_by_its_name() -> None:
    chosen = ENGINE.removeprefix('model_name=~"').removesuffix('"').replace("$model", "(assistant|other)")
    assert re.fullmatch(chosen, "assistant")
    assert re.fullmatch(chosen, f"assistant{WITHOUT_ADAPTER}")
    assert not re.fullmatch(chosen, "assistant-2")


def test_every_metric_has_a_panel() -> None:
    """By itself, or by what the recording rules make of it."""
    rules = (DIRECTORY.parent / "rules.yaml").read_text(encoding="utf-8")
    every = [target["expr"] for each in DASHBOARDS for panel in panels(each) for target in panel["targets"]]
    recorded = {
        rule["record"]: rule["expr"]
        for group in yaml.safe_load(rules)["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    shown = " ".join([*every, *(expr for name, expr in recorded.items() if name in " ".join(every))])
    families = Metrics(CollectorRegistry(), ()).families
    assert {name for name in families if name not in shown} == set()
