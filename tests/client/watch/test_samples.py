"""What two readings of a server's metrics say of the time between, against what was counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from engrampool_client.watch.samples import Between, Samples
from engrampool_proto.v1 import pool_pb2

BOUNDS = (0.001, 0.01, 0.1)


def reading(registry: CollectorRegistry, unix_s: float) -> Samples:
    samples = [one for metric in registry.collect() for one in metric.samples]
    return Samples.read(unix_s, [(one.name, one.labels, one.value) for one in samples])


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_an_answer_of_a_server_is_read():
    sample = pool_pb2.Sample(name="rows_total", labels={"layer": "2", "model": "m"}, value=3)
    other = pool_pb2.Sample(name="rows_total", labels={"layer": "9", "model": "m"}, value=4)
    samples = Samples.of(pool_pb2.StatsResponse(unix_s=7, samples=[sample, other]))
    assert samples.unix_s == 7
    assert samples.sum("rows_total") == 7
    assert samples.sum("rows_total", layer="9") == 4
    assert samples.sum("rows_total", layer="1") is None
    assert samples.sum("bytes_total") is None
    assert samples.by("rows_total", "layer") == {"2": 3, "9": 4}


def test_rates_and_means_are_of_the_time_between(registry):
    rows = Counter("rows", "", ("layer",), registry=registry)
    seconds = Histogram("took_seconds", "", ("method",), registry=registry, buckets=BOUNDS)
    rows.labels("2").inc(1000)
    seconds.labels("Lookup").observe(5.0)
    before = reading(registry, 100.0)
    rows.labels("2").inc(30)
    rows.labels("9").inc(10)  # which began between
    seconds.labels("Lookup").observe(0.002)
    seconds.labels("Lookup").observe(0.004)
    between = Between(before, reading(registry, 102.0))
    assert between.grew("rows_total", "layer") == {"2": 30, "9": 10}
    assert between.rate("rows_total") == 20
    assert between.rate("rows_total", layer="9") == 5
    assert between.mean_s("took_seconds") == {"": pytest.approx(0.003)}
    assert between.mean_s("took_seconds", "method") == {"Lookup": pytest.approx(0.003)}
    assert between.mean_s("took_seconds", method="Direct") == {}


def test_a_counter_that_began_again_is_counted_from_nothing():
    before = Samples.read(1.0, [("rows_total", {}, 1000.0)])
    after = Samples.read(2.0, [("rows_total", {}, 7.0)])
    assert Between(before, after).rate("rows_total") == 7


def test_without_time_between_there_is_no_rate():
    samples = Samples.read(1.0, [("rows_total", {}, 1000.0)])
    between = Between(samples, samples)
    assert between.rate("rows_total") is None
    assert between.quantile_s("took_seconds", 0.5) == {}


@given(
    st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=60),
    st.lists(st.floats(1e-5, 0.5), max_size=20),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_quantile_is_in_the_bucket_of_the_true_one(observed, earlier, quantile):
    registry = CollectorRegistry()
    seconds = Histogram("took_seconds", "", ("layer",), registry=registry, buckets=BOUNDS)
    for one in earlier:
        seconds.labels("1").observe(one)
    before = reading(registry, 1.0)
    for one in observed:
        seconds.labels("1").observe(one)
    found = Between(before, reading(registry, 2.0)).quantile_s("took_seconds", quantile, "layer")["1"]
    # The smallest of them that at least this part of all does not exceed.
    true = sorted(observed)[int(np.ceil(quantile * len(observed))) - 1]
    upper = next((bound for bound in BOUNDS if true <= bound), None)
    lower = max((bound for bound in BOUNDS if bound < true), default=0.0)
    if upper is None:  # beyond all bounds: the last one, as Prometheus has it
        assert found == BOUNDS[-1]
    else:
        assert lower < found <= upper
