"""The dashboards' expressions, asked of a real Prometheus that scraped a real server and a real client's process."""

import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.metrics import EngineCollector
from engrampool_client.metrics import ClientCollector
from engrampool_server.telemetry.metrics import Metrics
from server_fixtures import lacking

ROOT = Path(__file__).parents[2]
SCRAPE_CONFIG = ROOT / "deploy/prometheus/prometheus.yml"
DASHBOARDS = {
    name: json.loads((ROOT / f"deploy/grafana/dashboards/{name}.json").read_text())
    for name in ("overview", "client", "engine")
}
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


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """What `condition` returns once that is true."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.wait(0.02)
    return found


@dataclass
class Prometheus:
    """A running server. url: its base."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer; fails, with the server's own text, for an error."""
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{path} {parameters}: {error.code} {error.read().decode()}")

    def query(self, expr: str) -> list[dict[str, Any]]:
        return self.get("query", query=expr)["result"]

    def query_range(self, expr: str) -> list[dict[str, Any]]:
        now = time.time()
        return self.get("query_range", query=expr, start=now - 10, end=now, step=1)["result"]


def require(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        lacking(f"{program} is not installed (Debian: apt-get install prometheus)")
    return found


@pytest.fixture(scope="module")
def prometheus(server, client_process, tmp_path_factory) -> Iterator[Prometheus]:
    """With the project's scrape config, pointed at the server and the client, and hurried."""
    program = require("prometheus")
    directory = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(SCRAPE_CONFIG.read_text())
    config["global"] |= {"scrape_interval": "250ms", "scrape_timeout": "250ms"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [server.metrics_address, client_process.metrics_address]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    for rules in config["rule_files"]:
        shutil.copy(SCRAPE_CONFIG.with_name(rules), directory)
    log = directory / "log"
    command = [
        program,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:

            def address() -> "re.Match[str] | None":
                assert process.poll() is None, f"prometheus ended: {log.read_text()[-2000:]}"
                return re.search(r'"Listening on" address=(\S+)', log.read_text())

            running = Prometheus(f"http://{until(address, 'prometheus listens')[1]}")
            until(lambda: "Server is ready" in log.read_text(), "prometheus is ready")
            yield running
        finally:
            process.terminate()


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


def exposed_names(dashboard: str) -> set[str]:
    names = set()
    families = {
        "overview": Metrics().registry.collect,
        "client": ClientCollector().describe,
        "engine": EngineCollector("small", EngineCounts([1])).describe,
    }
    for family in families[dashboard]():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + ending for ending in endings}
    return names


def test_prometheus_loads_the_alerts(prometheus):
    groups = yaml.safe_load(SCRAPE_CONFIG.with_name("alerts.yml").read_text())["groups"]
    loaded = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    assert loaded == {rule["alert"] for group in groups for rule in group["rules"]}


@pytest.mark.parametrize(("dashboard", "panel", "target"), TARGETS)
def test_an_expression_answers(scraped, variables, dashboard, panel, target):
    expr = substitute(target["expr"], **variables[dashboard])
    assert target["instant"] != target["range"]

    def answer() -> list[dict[str, Any]] | None:
        """Of a moment in which the last scrape was answered in time, or there is nothing."""
        series = scraped.query(expr) if target["instant"] else scraped.query_range(expr)
        samples = [float(value) for one in series for _, value in one.get("values", [one.get("value")])]
        return series if any(math.isfinite(sample) for sample in samples) else None

    series = until(answer, f"{panel['title']}: data for {expr}")
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    for step in panel.get("transformations", []):
        if step["id"] == "filterFieldsByName":
            shown |= set(step["options"]["include"]["names"])
    for one in series:
        assert shown <= one["metric"].keys(), f"{panel['title']}: a label shown is not in the answer of {expr}"


@pytest.mark.parametrize(("dashboard", "panel", "target"), TARGETS)
def test_an_expression_names_metrics_of_the_registry(dashboard, panel, target):
    parsed = promql_parser.parse(substitute(target["expr"], instance="i", model="m"))
    named: list[str | None] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            named.append(node.name)

    promql_parser.walk(parsed, visit)
    assert named
    assert set(named) <= exposed_names(dashboard) | OF_PROMETHEUS


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
