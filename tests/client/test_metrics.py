"""What Prometheus is told of a client, against what happened."""

import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from engrampool_client import Client
from engrampool_client.metrics import ClientCollector, register
from engrampool_client.stats import HOPS, WAIT_BOUNDS_S
from server_fixtures import eventually, serve_thread

pytestmark = pytest.mark.usefixtures("patient")
ROW = 24 * 264  # bytes of one token's rows of one layer


def samples(registry) -> dict[tuple[str, frozenset], float]:
    """(name without its prefix, labels) -> value."""
    return {
        (sample.name.removeprefix("engrampool_client_"), frozenset(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def value(registry, name, **labels) -> float:
    return samples(registry)[name, frozenset(labels.items())]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_lookups_are_counted(server, spec, registry):
    tokens = np.arange(200, dtype=np.int32)
    with Client(server, cache_bytes=16 << 20, attach="off") as client:
        collector = register(client, registry=registry)
        client.lookup(tokens)
        client.lookup(tokens)
        client.prefetch(tokens[:2], layers=[14]).wait()  # nobody takes the rows of this one
        model = {"model": spec.name}
        # Who settles a step counts it, maybe after whoever waits was woken.
        eventually(lambda: value(registry, "steps_total", **model, outcome="ok") == 3, "it is counted")
        assert value(registry, "in_flight_steps", **model) == 0
        assert value(registry, "pending_bytes", **model) == 0
        wire, cache, duplicate = (
            value(registry, "rows_bytes_total", **model, source=source) for source in ("wire", "cache", "duplicate")
        )
        assert wire + cache + duplicate == 2 * 2 * 200 * ROW + 2 * ROW
        assert cache >= 2 * 200 * ROW
        assert wire > 0
        hits, misses = (value(registry, f"cache_{name}_total", **model) for name in ("hits", "misses"))
        assert (hits, misses) == (client.cache.hits, client.cache.misses)
        assert hits > misses > 0
        held = value(registry, "cache_bytes", **model)
        assert client.cache.filled * client.cache.entry_bytes < held
        assert held < value(registry, "cache_capacity_bytes", **model) <= 16 << 20
        assert value(registry, "attached", **model) == 0
        assert value(registry, "breaker_open", **model) == 0
        assert value(registry, "masked_tokens_total", **model, layer="1") == 0
        info = {"version": client.version, "spec_digest": spec.digest}
        (found,) = [labels for name, labels in samples(registry) if name == "info"]
        assert info.items() <= dict(found).items()
        # What is registered stays as it is when the client is closed, until it is taken out.
    assert value(registry, "steps_total", **model, outcome="ok") == 3
    registry.unregister(collector)
    assert samples(registry) == {}


def test_waits_are_a_cumulative_histogram_of_each_layer(server, spec, registry):
    with Client(server) as client:
        register(client, registry=registry)
        for seconds in (0.0, 30e-6, 30e-6, 0.07, 5.0):
            client.stats.waited(14, seconds)
        found = samples(registry)
        buckets = {
            dict(labels)["le"]: count
            for (name, labels), count in found.items()
            if name == "wait_seconds_bucket" and ("layer", "14") in labels
        }
        bounds = [float(le) for le in buckets]
        assert bounds == [*WAIT_BOUNDS_S, float("inf")]
        assert list(buckets.values()) == [
            1 if bound < 50e-6 else 3 if bound < 0.1 else 4 if bound < float("inf") else 5 for bound in bounds
        ]
        assert value(registry, "wait_seconds_count", model=spec.name, layer="14") == 5
        assert value(registry, "wait_seconds_sum", model=spec.name, layer="14") == pytest.approx(5.07006)
        assert value(registry, "wait_seconds_count", model=spec.name, layer="1") == 0


def test_failures_hints_and_masked_tokens_are_counted(packed, spec, registry):
    failing = {"on_failure": "mask", "breaker_failures": 1, "retry_s": 0, "attach": "off", "direct": "off"}
    model = {"model": spec.name}

    def hinted() -> dict[str, float]:
        fates = ("asked", "dropped", "failed", "used", "wasted")
        return {fate: value(registry, "hint_bytes_total", **model, fate=fate) for fate in fates}

    with serve_thread(packed) as address:
        client = Client(address, **failing, cache_bytes=1 << 20, max_steps=1)
        register(client, registry=registry)
        step = client.prefetch(np.arange(5, dtype=np.int32))
        step.wait()  # else the hint may have to give its place to it
        assert step.hint([[7, 8]])
        eventually(lambda: not client.stats.pending_hint_bytes, "the hint has ended")
        client.prefetch(np.arange(50, 55, dtype=np.int32)).wait()
        assert hinted() == {"asked": 2 * 2 * ROW, "dropped": 0, "failed": 0, "used": 0, "wasted": 0}
        client.prefetch([7], None, [[4, 3, 2]]).wait()
        assert hinted()["used"] == 2 * ROW
        assert value(registry, "pending_hint_bytes", **model) == 0
        assert value(registry, "breaker_open", **model) == 0
    with client:
        step = client.prefetch(np.arange(100, 107, dtype=np.int32), layers=[14])
        assert not step.valid(14).any()
        eventually(lambda: value(registry, "steps_total", **model, outcome="masked") == 1, "it is counted")
        assert value(registry, "masked_tokens_total", **model, layer="14") == 7
        assert value(registry, "masked_tokens_total", **model, layer="1") == 0
        assert value(registry, "breaker_opened_total", **model) == 1
        assert value(registry, "breaker_open", **model) == 1
        assert value(registry, "retries_total", **model) == 0
        client.stats.retried()
        assert value(registry, "retries_total", **model) == 1


def test_a_client_without_a_cache_shows_none(server, registry):
    with Client(server) as client:
        register(client, registry=registry)
        names = {name for name, _ in samples(registry)}
    assert not [name for name in names if "cache" in name or "hint" in name]
    assert "steps_total" in names


def test_two_models_share_a_collector_and_a_name_is_taken_once(server, other_packed, registry):
    with serve_thread(other_packed) as other, Client(server) as one, Client(other) as two, Client(server) as again:
        register(one, two, registry=registry)
        two.lookup([1, 2])
        assert value(registry, "steps_total", model=one.spec.name, outcome="ok") == 0
        assert value(registry, "steps_total", model=two.spec.name, outcome="ok") == 1
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            register(again, registry=registry)
        with pytest.raises(ValueError, match="must be of different models"):
            ClientCollector(one, again)


def test_what_is_exposed_is_read_by_both_parsers(server, registry):
    with Client(server, cache_bytes=1 << 20) as client:
        register(client, registry=registry)
        client.lookup([1, 2, 3])
        running, thread = start_http_server(0, "127.0.0.1", registry=registry)
        try:
            url = f"http://127.0.0.1:{running.server_port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                plain = {family.name for family in text_string_to_metric_families(response.read().decode())}
            accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
            with urllib.request.urlopen(urllib.request.Request(url, headers=accept), timeout=10) as response:
                strict = {family.name for family in open_metrics(response.read().decode())}
        finally:
            running.shutdown()
            running.server_close()
            thread.join()
    assert plain == strict
    assert all(name.startswith("engrampool_client_") for name in plain)
    assert len(plain) == 25


def test_the_client_itself_does_without_prometheus():
    code = "import sys, engrampool_client; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Each goes another way: small over the direct lane, large; over gRPC in one message, begun by the caller, in several.
WAYS = [("auto", 20), ("auto", 3000), ("off", 5), ("off", 40), ("off", 3000)]


@pytest.mark.parametrize(("direct", "tokens"), WAYS)
def test_every_answer_is_counted_by_hop_and_server(server, spec, registry, direct, tokens):
    batch = np.arange(tokens, dtype=np.int32) % 1000
    with Client(server, attach="off", direct=direct, connections=1) as client:
        register(client, registry=registry)
        eventually(lambda: client.direct == (direct == "auto"), "the direct lane is there")
        begin = time.perf_counter()
        for _ in range(3):
            client.lookup(batch)
        took_s = time.perf_counter() - begin
        found = samples(registry)

    def hop(name: str) -> tuple[float, float]:
        key = frozenset({"model": spec.name, "hop": name}.items())
        return found["hop_seconds_count", key], found["hop_seconds_sum", key]

    # Who looks up waits for the answer. The client's caller may come late on a machine that stood still.
    assert [hop(name)[0] for name in ("client", "queue", "gather", "send")] == [3, 3, 3, 3]
    assert hop("network")[0] <= 3
    assert 0 < sum(hop(name)[1] for name in HOPS) < took_s
    of_server = {
        dict(labels)["hop"]: (dict(labels)["shard"], dict(labels)["server"], count)
        for (name, labels), count in found.items()
        if name == "server_seconds_count"
    }
    assert of_server == {name: ("all", server, hop(name)[0]) for name in HOPS if name != "client"}


def test_a_shard_is_called_as_its_servers_call_it_in_whatever_order_they_are_named(packed, spec, registry):
    with ExitStack() as stack:
        shards = {stack.enter_context(serve_thread(packed, shard=name)): name for name in ("1/3", "2/3", "0/3")}
        client = stack.enter_context(Client(list(shards), attach="off"))
        register(client, registry=registry)
        found = {
            (dict(labels)["server"], dict(labels)["shard"])
            for name, labels in samples(registry)
            if name == "server_seconds_count"
        }
    assert found == set(shards.items())


def test_what_lay_in_a_cache_has_no_hops(server, spec, registry):
    with Client(server, cache_bytes=16 << 20, attach="off") as client:
        register(client, registry=registry)
        client.lookup([1, 2, 3])
        before = samples(registry)
        client.lookup([1, 2, 3])
        after = samples(registry)
    hops = {key for key in before if key[0] in ("hop_seconds_count", "server_seconds_count")}
    assert {after[key] - before[key] for key in hops} == {0}
