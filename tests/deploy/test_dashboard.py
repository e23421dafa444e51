"""The dashboards' expressions, asked of a real Prometheus that scraped a real server and a real client's process."""

import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.metrics import EngineCollector
from engrampool_client.metrics import ClientCollector
from engrampool_server.telemetry.metrics import Metrics
from prometheus_process import SCRAPE_CONFIG, Prometheus, exposed, require, running_prometheus, selectors, until

ROOT = Path(__file__).parents[2]
DASHBOARDS = {
    name: json.loads((ROOT / f"deploy/grafana/dashboards/{name}.json").read_text())
    for name in ("overview", "client", "engine", "shard", "capacity")
}
RULES = [
    rule
    for name in yaml.safe_load(SCRAPE_CONFIG.read_text())["rule_files"]
    for group in yaml.safe_load(SCRAPE_CONFIG.with_name(name).read_text())["groups"]
    for rule in group["rules"]
]
EACH = pytest.mark.parametrize("dashboard", DASHBOARDS)
TARGETS = [
    pytest.param(name, panel, target, id=f"{name}-{panel['title']}-{target['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    for target in panel.get("targets", [])
]
# Prometheus itself writes this one for each target.
OF_PROMETHEUS = {"up"}
RATE_INTERVAL = "1m"


def panels(dashboard: str) -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARDS[dashboard]["panels"] if panel["type"] != "row"]


def variables_of(dashboard: str) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in DASHBOARDS[dashboard]["templating"]["list"]}


def substitute(text: str, **values: str) -> str:
    """`text` as Grafana sends it. Raises KeyError for a variable that the dashboard lacks."""
    known = {"__rate_interval": RATE_INTERVAL, **values}
    return re.sub(r"\$\{?(\w+)\}?", lambda match: known[match[1]], text)


@pytest.fixture(scope="module")
def prometheus(server, cluster, client_process, tmp_path_factory) -> Iterator[Prometheus]:
    targets = [
        server.metrics_address,
        *(one.metrics_address for one in cluster.servers),
        client_process.metrics_address,
    ]
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets) as running:
        yield running


@pytest.fixture(scope="module")
def scraped(prometheus, round_of_lookups, client_process) -> Prometheus:
    """Lookups in one message, streamed, over the direct lane, and refused, have all risen between two scrapes.

    So have a client's hits, hints that were used, and an engine's forwards.
    """
    risen = f"rate(grpc_server_handled_total{{grpc_method=~'Lookup.*'}}[{RATE_INTERVAL}]) > 0"

    def enough() -> bool:
        round_of_lookups()
        client_process.lookups()
        series = prometheus.query(risen)
        direct = prometheus.query(f"rate(engrampool_direct_lookups_total[{RATE_INTERVAL}]) > 0")
        hits = prometheus.query(f"rate(engrampool_client_cache_hits_total[{RATE_INTERVAL}]) > 0")
        engine = prometheus.query(f"rate(engrampool_engine_steps_total[{RATE_INTERVAL}]) > 0")
        used = prometheus.query(f"rate(engrampool_client_hint_bytes_total{{fate='used'}}[{RATE_INTERVAL}]) > 0")
        return (
            direct
            and hits
            and used
            and engine
            and {(s["metric"]["grpc_method"], s["metric"]["grpc_code"]) for s in series}
            == {
                ("Lookup", "OK"),
                ("Lookup", "NOT_FOUND"),
                ("LookupStream", "OK"),
            }
        )

    until(enough, "two scrapes with lookups between them")
    return prometheus


@pytest.fixture(scope="module")
def variables(scraped) -> dict[str, dict[str, str]]:
    """By dashboard: what Grafana offers for each variable, as it stands in a regular expression when all are chosen."""
    return {name: chosen(scraped, name) for name in DASHBOARDS}


def chosen(scraped: Prometheus, dashboard: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, variable in variables_of(dashboard).items():
        if variable["type"] != "query":
            continue
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert match, f"variable {name}: {variable['query']}"
        found = scraped.get(f"label/{match[2]}/values", **{"match[]": substitute(match[1], **values)})
        assert found, f"variable {name} has no values"
        choices = "|".join(map(re.escape, found))
        values[name] = json.dumps(f"({choices})")[1:-1]  # within PromQL's quotes, whose escapes are JSON's
    return values


def test_prometheus_loads_the_rules(prometheus):
    loaded = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    assert loaded == {rule.get("alert") or rule["record"] for rule in RULES}


def test_every_series_that_a_rule_is_made_of_is_there(scraped):
    """An alert's own expression is empty while all is well."""
    for rule in RULES:
        for selector in selectors(rule["expr"]):
            name = selector.name
            until(lambda name=name: scraped.answered(name), f"{rule.get('alert') or rule['record']}: data for {name}")
        if "record" in rule:
            until(lambda rule=rule: scraped.answered(rule["record"]), f"data for {rule['record']}")
            until(lambda rule=rule: scraped.answered(rule["expr"]), f"data for {rule['expr']}")


@pytest.mark.parametrize(("dashboard", "panel", "target"), TARGETS)
def test_an_expression_answers(scraped, variables, dashboard, panel, target):
    expr = substitute(target["expr"], **variables[dashboard])
    assert target["instant"] != target["range"]

    # Of a moment in which the last scrape was answered in time.
    series = until(lambda: scraped.answered(expr, target["instant"]), f"{panel['title']}: data for {expr}")
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    for step in panel.get("transformations", []):
        if step["id"] == "filterFieldsByName":
            shown |= set(step["options"]["include"]["names"])
    for one in series:
        assert shown <= one["metric"].keys(), f"{panel['title']}: a label shown is not in the answer of {expr}"


@pytest.mark.parametrize(("dashboard", "panel", "target"), TARGETS)
def test_an_expression_names_metrics_of_the_registry(dashboard, panel, target):
    named = {one.name for one in selectors(substitute(target["expr"], instance="i", model="m"))}
    assert named
    engine = EngineCollector("small", EngineCounts([1]))
    families = [*Metrics().registry.collect(), *ClientCollector().describe(), *engine.describe()]
    there = {name for family in families for name in exposed(family)}
    assert named <= there | OF_PROMETHEUS | {rule["record"] for rule in RULES if "record" in rule}


@EACH
def test_a_picture_of_a_dashboard_has_every_panel(scraped, tmp_path, dashboard):
    pictures = runpy.run_path(str(ROOT / "docs/dashboards.py"))
    counts = pictures["draw"](scraped, dashboard, tmp_path, 30.0)
    assert counts.keys() == {panel["title"] for panel in panels(dashboard)}
    assert all(counts.values()), counts
    assert (tmp_path / f"{dashboard}.png").read_bytes().startswith(b"\x89PNG")


@EACH
def test_panels_explain_themselves(dashboard):
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len(panel["description"]) > 60, f"{panel['title']}: what to do when it looks bad?"
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        for override in panel["fieldConfig"]["overrides"]:
            pattern = override["matcher"]["options"].strip("/")
            assert any(re.search(pattern, target["legendFormat"]) for target in panel["targets"]), panel["title"]
    titles = [panel["title"] for panel in DASHBOARDS[dashboard]["panels"]]
    assert len(set(titles)) == len(titles)


@EACH
def test_panels_fill_the_grid_without_overlap(dashboard):
    cells: dict[tuple[int, int], str] = {}
    for panel in DASHBOARDS[dashboard]["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                other = cells.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{panel['title']} overlaps {other}"
    height = max(y for _, y in cells) + 1
    assert cells.keys() == {(x, y) for x in range(24) for y in range(height)}


@EACH
def test_a_dashboard_can_be_provisioned(dashboard):
    document = DASHBOARDS[dashboard]
    assert document["uid"] == f"engrampool-{dashboard}"
    assert document["schemaVersion"] >= 39
    assert "id" not in document  # Grafana's own, of one installation
    assert variables_of(dashboard).keys() == {"datasource", "instance", "model"}
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_dashboards_of_the_folder_are_those_tested():
    assert {path.stem for path in (ROOT / "deploy/grafana/dashboards").iterdir()} == set(DASHBOARDS)


def test_promtool_accepts_the_scrape_config():
    done = subprocess.run(
        [require("promtool"), "check", "config", str(SCRAPE_CONFIG)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
