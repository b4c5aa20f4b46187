"""The rules: each alert fires when it should, not otherwise, says so in words, and has a page to read on."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.metric_names import (
    ROOT,
    RULES,
    SCRAPED,
    VLLM_LIST,
    defined_in,
    gateway_metrics,
    labels_named,
    selectors,
    vllm_metrics,
    vllm_source,
)

CASES = Path(__file__).with_name("rules")
RUNBOOKS = ROOT / "docs" / "runbooks"
GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
EVERY = [rule for group in GROUPS for rule in group["rules"]]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in EVERY if "alert" in rule}
RECORDS: dict[str, dict[str, Any]] = {rule["record"]: rule for rule in EVERY if "record" in rule}
NAMES = [rule.get("alert") or rule["record"] for rule in EVERY]


def promtool(*arguments: str) -> str:
    """What it says. Fails with that if it is not content; skips without promtool."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; tests/servers.sh installs it where it may")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_rules() -> None:
    assert f"{len(EVERY)} rules found" in promtool("check", "rules", str(RULES))


@pytest.mark.parametrize("alert", ALERTS)
def test_it_fires_when_it_should_and_not_otherwise(alert: str) -> None:
    promtool("test", "rules", str(CASES / f"{alert}.yaml"))


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_case_that_fires_and_one_that_is_healthy(alert: str) -> None:
    case = yaml.safe_load((CASES / f"{alert}.yaml").read_text(encoding="utf-8"))
    assert [(CASES / path).resolve() for path in case["rule_files"]] == [RULES]
    asked = [one for test in case["tests"] for one in test["alert_rule_test"]]
    assert {one["alertname"] for one in asked} == {alert}
    assert {bool(one["exp_alerts"]) for one in asked} == {True, False}


def test_there_is_no_case_of_an_alert_that_is_gone() -> None:
    assert {path.stem for path in CASES.glob("*.yaml")} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_what_and_where_to_read_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{alert}.md"


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_runbook(alert: str) -> None:
    text = (RUNBOOKS / f"{alert}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {alert}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["What it means", "What is wrong", "What to do", "When to trust it"]
    assert f"[{alert}]({alert}.md)" in (RUNBOOKS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_a_runbook_asks_for_metrics_that_exist(page: Path) -> None:
    """Its PromQL parses, and each series in it is exported or recorded."""
    assert page.stem == "README" or page.stem in ALERTS
    for block in re.findall(r"```promql\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for query in block.strip().splitlines():
            check_names(query.partition(" # ")[0])


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_a_rule_reads_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    check_names(rule["expr"])


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_is_read(name: str) -> None:
    """By an alert or a dashboard; one that nobody reads costs and serves nobody."""
    readers = [rule["expr"] for rule in EVERY]
    readers += [path.read_text(encoding="utf-8") for path in (RULES.parent / "dashboards").glob("*.json")]
    assert any(name in text for text in readers)


def test_no_metric_has_a_label_that_prometheus_adds() -> None:
    """It would be renamed to ``exported_…`` when it is scraped, and no rule would find it."""
    assert {name for name, labels in gateway_metrics().items() if labels & SCRAPED} == set()


def check_names(expression: str) -> None:
    """Every series of an expression exists, and has the labels that it is selected by."""
    ours, engines = gateway_metrics(), vllm_metrics()
    for selector in selectors(expression):
        known = selector.name in ours or selector.name in engines or selector.name in RECORDS
        assert known or selector.name == "up", f"nobody exports {selector.name}: {expression}"
    for metric, label in labels_named(expression):
        if metric in ours:
            assert label in ours[metric] | SCRAPED, f"{metric} has no label {label}: {expression}"


def test_the_list_of_engine_metrics_is_the_engines() -> None:
    source = vllm_source()
    if source is None:
        pytest.skip("vLLM is not installed here; `make setup` installs it")
    lines = VLLM_LIST.read_text(encoding="utf-8").splitlines()
    listed = {tuple(line.split()) for line in lines if not line.startswith("#")}
    assert listed == defined_in(source)


def test_a_metric_that_nobody_exports_is_noticed() -> None:
    with pytest.raises(AssertionError, match="nobody exports tiercel_moods_total"):
        check_names("rate(tiercel_moods_total[5m])")
    with pytest.raises(AssertionError, match="has no label mood"):
        check_names('rate(tiercel_requests_total{mood="good"}[5m])')
