"""Slow lookups: told on both sides under one number, and counted by the hop that took most of it."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.wire import ServerTimes
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.slow import SlowLookups
from server_fixtures import PATIENCE, Events, RawPool, eventually, scrape
from small_model import small_spec, write_model


@pytest.fixture
def events() -> Iterator[Events]:
    handler = Events()
    logger = logging.getLogger("engrampool")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_the_hop_that_took_most_is_counted_and_one_of_many_is_told(events, monkeypatch):
    metrics = Metrics()
    slow = SlowLookups(metrics, 0.001)
    assert not slow.over(ServerTimes(0, 0, 1000))
    assert slow.over(ServerTimes(0, 0, 1001))
    for times in (ServerTimes(900, 200, 1200), ServerTimes(0, 2000, 2100), ServerTimes(1, 2, 5000)):
        slow.note("Direct", 0xF00, "10.0.0.7", 24, times)
    (line,) = events.of("slow-lookup")
    assert line == {
        "request": "0000000000000f00",
        "method": "Direct",
        "peer": "10.0.0.7",
        "rows": 24,
        "hop": "queue",
        "queue_ms": 0.9,
        "gather_ms": 0.2,
        "send_ms": 0.1,
        "untold": 0,
    }
    counted = {
        hop: metrics.registry.get_sample_value("engrampool_slow_lookups_total", {"hop": hop})
        for hop in ("queue", "gather", "send")
    }
    assert counted == {"queue": 1, "gather": 1, "send": 1}
    monkeypatch.setattr("engrampool_server.telemetry.told.EVERY_S", 0.0)
    slow._told._next_s = 0.0
    slow.note("Direct", 1, "10.0.0.7", 24, ServerTimes(0, 0, 2000))
    assert events.of("slow-lookup")[-1]["untold"] == 2


def test_nothing_is_slow_where_nobody_said_what_is():
    assert not SlowLookups(Metrics(), 0.0).over(ServerTimes(0, 0, 10**9))


# Each another way: small over the direct lane, by the compiled loop; large; over gRPC in one message, in
# several; tokens that the server hashes, which Python answers on either.
WAYS = [
    ("auto", 20, "local", "Direct"),
    ("auto", 3000, "local", "Direct"),
    ("auto", 20, "server", "Direct"),
    ("off", 5, "local", "Lookup"),
    ("off", 3000, "local", "LookupStream"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    """Each lookup is slow."""
    packed = write_model(tmp_path_factory.mktemp("slow") / "small", small_spec())
    with serve_process(packed, workers=1, slow_lookup_s=1e-6) as running:
        yield running


@pytest.mark.parametrize(("direct", "tokens", "hashing", "method"), WAYS)
def test_both_logs_name_a_slow_lookup_alike(server, caplog, monkeypatch, direct, tokens, hashing, method):
    monkeypatch.setattr("engrampool_client.stats._TOLD_EVERY_S", 0.0)
    settings = {"direct": direct, "hashing": hashing, "connections": 1, "slow_lookup_s": 1e-9}
    with Client(server.address, attach="off", **settings, **PATIENCE) as client:
        eventually(lambda: client.direct == (direct == "auto"), "the direct lane is there")

        numbers = set()

        def told() -> list[dict[str, Any]]:
            """What the server says of them. It tells of one a second, and its log comes a little later."""
            caplog.clear()
            client.lookup(np.arange(tokens, dtype=np.int32) % 1000)
            numbers.update(re.findall(r"slow lookup ([0-9a-f]{16}): ", caplog.text))
            return [line for line in server.said("slow-lookup") if line["request"] in numbers]

        line, *_ = eventually(told, "both tell of one lookup")
    assert line["method"] == method
    assert line["peer"] == "127.0.0.1"
    assert 0 < line["rows"] <= tokens * 24 * 2
    assert line["hop"] in ("queue", "gather", "send")


def test_slow_lookups_are_metrics_of_both(server):
    with Client(server.address, attach="off", slow_lookup_s=1e-9, **PATIENCE) as client:
        client.lookup([1, 2, 3])
        assert sum(client.stats.slow.values()) >= 2  # the wait in the client, and the answer

    def counted() -> float:
        return sum(value for name, value in scrape(server.metrics_address).items() if "slow_lookups" in name)

    eventually(counted, "it is counted")


def test_a_lookup_without_a_number_is_told_as_0(server):
    with Client(server.address, attach="off", **PATIENCE) as client, RawPool(server.address, client.version) as pool:
        (layer, *_) = client.spec.layers
        request = pool.by_ids((layer, [1]), model=client.spec.name)

        def told() -> bool:
            pool.lookup(request)
            return any(line["request"] == "0" * 16 for line in server.said("slow-lookup"))

        eventually(told, "it is told of")
