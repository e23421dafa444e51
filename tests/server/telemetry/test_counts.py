"""Counting in plain numbers comes to what prometheus_client's own counting comes to, whenever it is flushed."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engrampool_server.telemetry.counts import Count, Counted, Level, Times
from engrampool_server.telemetry.metrics import _SECONDS, Metrics

# Those on a bound, just beside one, and anywhere; None flushes.
BOUNDS = st.sampled_from(_SECONDS)
SECONDS = st.one_of(
    BOUNDS,
    BOUNDS.map(lambda bound: math.nextafter(bound, math.inf)),
    BOUNDS.map(lambda bound: math.nextafter(bound, 0)),
    st.floats(-1, 20, allow_nan=False),
    st.sampled_from([0.0, 1e9]),
)
LABELS = st.tuples(st.sampled_from("ab"), st.sampled_from("xy"))


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }
    assert found
    return found


@given(st.lists(st.none() | st.tuples(LABELS, SECONDS), min_size=1))
def test_any_series_of_observations_is_that_of_a_histogram(observed):
    plain, ours = CollectorRegistry(), CollectorRegistry()
    theirs = Histogram("h", "Text.", ("one", "other"), registry=plain, buckets=_SECONDS)
    counted = Counted(ours, Histogram("h", "Text.", ("one", "other"), registry=None, buckets=_SECONDS), Times)
    for what in [(("a", "x"), 1.0), *observed]:
        if what is None:
            counted.flush()
        else:
            labels, seconds = what
            theirs.labels(*labels).observe(seconds)
            counted.labels(*labels).observe(seconds)
    # Sums are of the same numbers in other groups.
    assert samples(ours) == {key: pytest.approx(value, rel=1e-12, abs=1e-12) for key, value in samples(plain).items()}


@given(st.lists(st.none() | st.tuples(LABELS, st.integers(0, 2**40)), min_size=1))
def test_any_series_of_increments_is_that_of_a_counter(counts):
    plain, ours = CollectorRegistry(), CollectorRegistry()
    theirs = Counter("c", "Text.", ("one", "other"), registry=plain)
    counted = Counted(ours, Counter("c", "Text.", ("one", "other"), registry=None), Count)
    for what in [(("a", "x"), 0), *counts]:
        if what is None:
            counted.flush()
        else:
            labels, amount = what
            theirs.labels(*labels).inc(amount)
            counted.labels(*labels).inc(amount)
    assert samples(ours) == samples(plain)


def test_a_level_is_the_last_one_set():
    registry = CollectorRegistry()
    level = Counted(registry, Gauge("g", "Text.", registry=None), Level).labels()
    assert samples(registry) == {("g",): 0}
    for value in (7, 5, 0, 3):
        level.set(value)
        assert samples(registry) == {("g",): value}


def test_what_is_counted_while_others_flush_is_counted_once():
    """The thread that counts waits for nobody, and scrapes come in threads of their own."""
    metrics = Metrics()
    stop = threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            metrics.flush()

    threads = [threading.Thread(target=scrape) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20_000):
        metrics.answered("m", "Lookup", [(1, 3, 792)], 1e-5, 1e-4, 2e-4)
    stop.set()
    for thread in threads:
        thread.join()
    read = metrics.registry.get_sample_value
    assert read("engrampool_lookup_rows_total", {"model": "m", "layer": "1"}) == 60_000
    assert read("engrampool_lookup_bytes_total", {"model": "m", "layer": "1"}) == 20_000 * 792
    of = {"model": "m", "method": "Lookup"}
    assert read("engrampool_lookup_seconds_count", of) == 20_000
    assert read("engrampool_lookup_seconds_bucket", {**of, "le": "0.00025"}) == 20_000
    assert read("engrampool_lookup_seconds_sum", of) == pytest.approx(4.0)


def test_a_scrape_for_some_names_only_has_what_was_counted_too():
    metrics = Metrics()
    metrics.refused.labels("overloaded").inc()
    (family,) = metrics.registry.restricted_registry(["engrampool_refused_total"]).collect()
    assert [sample.value for sample in family.samples] == [1]
