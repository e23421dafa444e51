"""One shard of a real cluster is made slow, and found by the dashboards alone: which one, and at which hop."""

import json
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from engrampool_client import Client
from engrampool_client.metrics import register
from engrampool_client.testing import serve_process
from prometheus_process import SCRAPE_CONFIG, Prometheus, running_prometheus, until
from server_fixtures import PATIENCE

DASHBOARDS = Path(__file__).parents[2] / "deploy/grafana/dashboards"
SHARDS, PLANTED = 3, 1
# Far more than a lookup takes on any machine that tests run on.
SLOW_S = 0.15
# As if memory were slow: rows are copied by Python's own call, which every lookup over gRPC comes to.
SLOW_MEMORY = f"""
import time
from engrampool_server.memory.tables import LoadedTable
gather = LoadedTable.gather
def slow(self, ids, out):
    time.sleep({SLOW_S})
    return gather(self, ids, out)
LoadedTable.gather = slow
"""


class SlowWay:
    """Passes on what comes to its address, as late as a far machine would have it."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._others: dict[socket.socket, socket.socket] = {}
        self._late: list[tuple[float, socket.socket, bytes]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for one in [self._listener, *self._others]:
            one.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(0.01):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._take(key.fileobj)
            while self._late and self._late[0][0] <= time.monotonic():
                _, other, data = self._late.pop(0)
                try:
                    other.sendall(data) if data else other.shutdown(socket.SHUT_WR)
                except OSError:  # it has ended
                    continue

    def _accept(self) -> None:
        caller, _ = self._listener.accept()
        server = socket.create_connection(self._server)
        for one, other in ((caller, server), (server, caller)):
            self._others[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _take(self, source: socket.socket) -> None:
        try:
            data = source.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(source)
        # Half of the time each way.
        self._late.append((time.monotonic() + SLOW_S / 2, self._others[source], data))


def expression(dashboard: str, title: str, at: int = 0) -> str:
    """Of a panel, for all that there is."""
    panels = json.loads((DASHBOARDS / f"{dashboard}.json").read_text())["panels"]
    (panel,) = [panel for panel in panels if panel["title"] == title]
    text = panel["targets"][at]["expr"].replace("$__rate_interval", "1m")
    return re.sub(r"\$(instance|model)", ".*", text)


def highest(prometheus: Prometheus, expr: str) -> dict[str, str] | None:
    """The labels of the series that stands out: three times as high as any other."""
    found = sorted(((float(one["value"][1]), one["metric"]) for one in prometheus.query(expr)), key=lambda one: -one[0])
    if len(found) < 2 or not found[0][0] > 3 * found[1][0]:
        return None
    return found[0][1]


@contextmanager
def cluster(packed: Path, fault: str, directory: Path, stack: ExitStack) -> Iterator[tuple[list[str], list[str]]]:
    """Servers of three shards, over gRPC alone, one with a fault: addresses as clients know them, and of metrics."""
    (directory / "sitecustomize.py").write_text(SLOW_MEMORY)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    servers = []
    for shard in range(SHARDS):
        environ = {"PYTHONPATH": path} if (fault, shard) == ("gather", PLANTED) else {}
        settings = {"shard": f"{shard}/{SHARDS}", "workers": 1, "direct": "off", "attach": "off"}
        servers.append(stack.enter_context(serve_process(packed, environ=environ, **settings)))
    addresses = [one.address for one in servers]
    if fault == "network":
        way = SlowWay(addresses[PLANTED])
        stack.callback(way.close)
        addresses[PLANTED] = way.address
    yield addresses, [one.metrics_address for one in servers]


@pytest.mark.parametrize("fault", ["gather", "network"])
def test_a_slow_shard_is_found_by_the_dashboards_alone(packed, fault, tmp_path):
    with ExitStack() as stack:
        addresses, metrics = stack.enter_context(cluster(packed, fault, tmp_path, stack))
        client = stack.enter_context(Client(addresses, **PATIENCE))
        registry = CollectorRegistry()
        register(client, registry=registry)
        shown, thread = start_http_server(0, "127.0.0.1", registry=registry)
        stack.callback(thread.join)
        stack.callback(shown.server_close)
        stack.callback(shown.shutdown)
        targets = [*metrics, f"127.0.0.1:{shown.server_port}"]
        directory = tmp_path / "prometheus"
        directory.mkdir()
        prometheus = stack.enter_context(running_prometheus(directory, targets))
        tokens = np.arange(8, dtype=np.int32)
        slow = f"{PLANTED}/{SHARDS}"

        def found(dashboard: str, title: str, **labels: str) -> None:
            """The series that stands out on a panel is this one. Lookups go on until there is one."""

            def seen() -> bool:
                client.lookup(tokens)
                highest_of = highest(prometheus, expression(dashboard, title))
                return highest_of is not None and labels.items() <= highest_of.items()

            until(seen, f"{title}: {labels}")

        found("client", "Mean by hop", hop=fault)
        found("client", "Mean by shard", shard=slow)
        found("shard", "Answer by shard", shard=slow)
        found("shard", "Hops by shard", shard=slow, hop=fault)
        found("shard", "Hops by server", server=addresses[PLANTED], hop=fault)
        if fault == "gather":
            found("shard", "Lookup p99 by server", instance=metrics[PLANTED])
        # The alert's expression has it, and nothing else; it fires after some minutes of that.
        rules = yaml.safe_load(SCRAPE_CONFIG.with_name("alerts.yml").read_text())
        (alert,) = [
            rule for group in rules["groups"] for rule in group["rules"] if rule["alert"] == "EngrampoolShardSlow"
        ]
        wanted = [{"model": client.spec.name, "shard": slow, "server": addresses[PLANTED]}]

        def alerted() -> bool:
            client.lookup(tokens)
            return [one["metric"] for one in prometheus.query(alert["expr"])] == wanted

        until(alerted, "the alert's expression")
