"""The rules: alerts fired by promtool, about metrics that there are, and explained; and what is recorded for them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.metrics import EngineCollector
from engrampool_client.metrics import ClientCollector
from engrampool_server.telemetry.metrics import Metrics
from prometheus_process import exposed, selectors
from server_fixtures import lacking

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/alerts.yml"
RECORDING = RULES.with_name("recording.yml")
CASES = Path(__file__).with_name("alerts.test.yml")
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
RECORDED_GROUPS = yaml.safe_load(RECORDING.read_text())["groups"]
RECORDED = {rule["record"]: rule for group in RECORDED_GROUPS for rule in group["rules"]}
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
EACH = pytest.mark.parametrize("alert", ALERTS)


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        lacking("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_promtool_knows_the_rules(promtool):
    done = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES, RECORDING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should(promtool):
    done = run(promtool, "test", "rules", CASES)
    assert done.returncode == 0, done.stdout + done.stderr


@EACH
def test_an_alert_was_seen_to_fire_and_not_to(alert):
    cases = [
        bool(case.get("exp_alerts"))
        for group in yaml.safe_load(CASES.read_text())["tests"]
        for case in group.get("alert_rule_test", [])
        if case["alertname"] == alert
    ]
    assert set(cases) == {True, False}


@EACH
def test_promtool_misses_an_alert_that_never_fires(alert, promtool, tmp_path):
    """So the cases do hold each of them."""
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == alert:
                rule["expr"] = "vector(1) > 2"
    cases = yaml.safe_load(CASES.read_text()) | {"rule_files": ["rules.yml", str(RECORDING)]}
    # Those about others only take time.
    cases["tests"] = [
        case for case in cases["tests"] if any(one["alertname"] == alert for one in case.get("alert_rule_test", []))
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases))
    done = run(promtool, "test", "rules", tmp_path / "cases.yml")
    assert done.returncode == 1
    assert f"alertname: {alert}" in done.stdout + done.stderr


@pytest.mark.parametrize("rule", [*ALERTS, *RECORDED])
def test_a_rule_asks_for_metrics_that_there_are(rule):
    names = {"up", *(RECORDED if rule in ALERTS else ())}
    engine = EngineCollector("small", EngineCounts([1]))
    for family in [*Metrics().registry.collect(), *ClientCollector().describe(), *engine.describe()]:
        names |= exposed(family)
    asked = {one.name for one in selectors((ALERTS | RECORDED)[rule]["expr"])}
    assert asked
    assert asked <= names


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_tested_and_used(name):
    cases = [
        case["expr"]
        for group in yaml.safe_load(CASES.read_text())["tests"]
        for case in group.get("promql_expr_test", [])
    ]
    assert any(name in expr for expr in cases)
    dashboards = [path.read_text() for path in (ROOT / "deploy/grafana/dashboards").iterdir()]
    assert any(name in text for text in [*(rule["expr"] for rule in ALERTS.values()), *dashboards])


@EACH
def test_an_alert_has_a_runbook(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    text = (ROOT / page).read_text()
    # As GitHub makes anchors.
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert anchor == alert.lower()
    section = text.split(f"### {alert}\n")[1].split("\n#")[0]
    assert len(section.split()) > 15


def test_every_alert_section_is_about_an_alert():
    headings = re.findall(r"^### (Engrampool\w+)$", (ROOT / "docs/OPERATIONS.md").read_text(), re.MULTILINE)
    assert headings == list(ALERTS)


def test_kubernetes_has_the_same_rules():
    rule = yaml.safe_load((ROOT / "deploy/kubernetes/components/monitoring/prometheus-rule.yaml").read_text())
    assert rule["spec"]["groups"] == RECORDED_GROUPS + GROUPS
