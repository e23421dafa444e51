"""A real Prometheus on loopback, with the project's scrape config and rules, and what is asked of it."""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Metric

from server_fixtures import lacking

SCRAPE_CONFIG = Path(__file__).parents[1] / "deploy/prometheus/prometheus.yml"
_ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}


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

    def query_range(self, expr: str, seconds: float = 10.0) -> list[dict[str, Any]]:
        now = time.time()
        return self.get("query_range", query=expr, start=now - seconds, end=now, step=max(1, seconds // 100))["result"]

    def answered(self, expr: str, instant: bool = True) -> list[dict[str, Any]] | None:
        """The series, if any has a finite value."""
        series = self.query(expr) if instant else self.query_range(expr)
        samples = [float(value) for one in series for _, value in one.get("values", [one.get("value")])]
        return series if any(math.isfinite(sample) for sample in samples) else None


def require(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        lacking(f"{program} is not installed (Debian: apt-get install prometheus)")
    return found


@contextmanager
def running_prometheus(directory: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """With the project's scrape config and rules, pointed at these targets, and hurried."""
    program = require("prometheus")
    config = yaml.safe_load(SCRAPE_CONFIG.read_text())
    config["global"] |= {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
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


def selectors(expr: str) -> list[promql_parser.VectorSelector]:
    """Every place of an expression where series are named."""
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def exposed(family: Metric) -> set[str]:
    """The names of a metric's series, but for a counter's _created."""
    return {family.name + ending for ending in _ENDINGS.get(family.type, ("",))}
