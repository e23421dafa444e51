"""Servers that are away, silent or slow cost a step what was agreed, and rows are right or marked."""

import re
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from engrampool_client import Client, DeadlineError, OverloadedError, UnavailableError
from engrampool_client.pool.endpoint import Endpoint
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import (
    LIMIT_S,
    GatherGate,
    at_work,
    breaker_of,
    direct_of,
    eventually,
    lasting_address,
    pack,
    serve_thread,
)

pytestmark = pytest.mark.usefixtures("patient")
TOKENS = np.arange(500, dtype=np.int32)
LANES = ["off", "auto"]


def wanted(client: Client, tokens=TOKENS) -> dict[int, np.ndarray]:
    return {n: synthetic_rows(client.spec.table(n), ids) for n, ids in client.spec.hash(TokenBatch.of(tokens)).items()}


def wait_until_closed(client: Client) -> None:
    """Until the breaker's own probe was answered."""
    eventually(lambda: not breaker_of(client)["probing"], "a probe is answered")
    assert not client.breaker_open


@pytest.fixture(scope="module")
def silent(packed):
    """A server that answers nothing while it is frozen."""
    with serve_process(packed, workers=1) as server:
        yield server


@pytest.mark.parametrize("direct", LANES)
def test_a_silent_server_is_masked_then_known_then_back(silent, direct, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.endpoint._PROBE_TIMEOUT_S", 0.1)
    with Client(silent.address, direct=direct, on_failure="mask", breaker_failures=3, attach="off") as client:
        with silent.frozen():
            misses = 0
            # A deadline that passed before anything was sent does not count: how often that happens is the machine's.
            while not client.breaker_open:
                step = client.prefetch(TOKENS, timeout_s=0.05)
                assert not step.rows(1).any()
                assert not step.valid(1).any()
                assert not step.valid(14).any()
                misses += 1
                # Who settled it counts it, maybe after this thread was woken.
                masked = {1: 500 * misses, 14: 500 * misses}
                eventually(lambda masked=masked: client.stats.masked_tokens == masked, "it is counted")
            assert misses >= 3
            # Now a step with a long deadline costs none of it.
            step = client.prefetch(TOKENS, timeout_s=3600)
            assert not step.valid(1).any()
            assert isinstance(step.error, UnavailableError)
            assert step.error.reason == "breaker-open"
            assert re.search(r"failed \d+ lookups in a row", str(step.error))
            monkeypatch.setattr("engrampool_client.pool.endpoint._PROBE_TIMEOUT_S", LIMIT_S)
        wait_until_closed(client)
        step = client.prefetch(TOKENS)
        assert step.valid(1).all()
        for layer, rows in wanted(client).items():
            assert np.array_equal(step.rows(layer), rows)
        assert client.stats.breaker_opened == 1


@pytest.mark.parametrize("direct", LANES)
def test_deadlines_that_pass_before_anything_is_sent_say_nothing_of_the_server(server, direct):
    with Client(server, direct=direct, breaker_failures=1, attach="off") as client:
        client.lookup(TOKENS[:5])
        connections = direct_of(client)
        for _ in range(5):
            with pytest.raises(DeadlineError):
                client.lookup(TOKENS[:5], timeout_s=1e-9)
            with pytest.raises(DeadlineError):
                client.prefetch(TOKENS[:5], timeout_s=1e-9).rows(1)
        eventually(lambda: at_work(client) == (0, 0, 0), "nobody is at work")
        assert breaker_of(client) == {"open": False, "why_open": None, "failures": 0, "probing": False}
        assert direct_of(client) == connections
        client.lookup(TOKENS[:5])


@pytest.mark.parametrize("direct", LANES)
def test_deadlines_too_short_for_what_is_asked_do_not_open_the_breaker(tmp_path, direct, monkeypatch):
    gate = GatherGate(monkeypatch)  # large lookups take as long as they like, small ones no time
    monkeypatch.setattr("engrampool_client.pool.endpoint._PROBE_TIMEOUT_S", LIMIT_S)
    with (
        serve_thread(pack(tmp_path / "small"), gather_threads=8) as address,
        Client(address, direct=direct, breaker_failures=3, attach="off", dedupe=False) as client,
    ):
        for _ in range(10):  # of which, on a busy machine, some pass before anything is sent
            with pytest.raises(DeadlineError):
                client.lookup_rows({2: np.arange(2000)}, timeout_s=0.02)
        eventually(lambda: not breaker_of(client)["probing"], "it was probed")
        assert breaker_of(client)["failures"] == 0  # as it has answered
        assert client.stats.breaker_opened == 0
        assert client.lookup_rows({2: np.arange(3)})[2].shape == (3, 264)
        gate.open.set()


def test_a_client_closes_at_once_while_a_silent_server_is_probed(silent, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.endpoint._PROBE_TIMEOUT_S", 3600.0)
    probing, probe = threading.Event(), Endpoint._probe

    def probed(endpoint: Endpoint) -> None:
        probing.set()
        probe(endpoint)

    monkeypatch.setattr(Endpoint, "_probe", probed)
    client = Client(silent.address, breaker_failures=1, attach="off")
    closer = threading.Thread(target=client.close)
    with silent.frozen():
        while not probing.wait(0.05):  # a deadline that passed before anything was sent has nobody probe it
            with pytest.raises(DeadlineError):
                client.lookup(TOKENS, timeout_s=0.05)
        closer.start()
        closer.join(LIMIT_S)
        assert not closer.is_alive()


@pytest.mark.parametrize("direct", LANES)
def test_a_dead_server_opens_the_breaker_and_raises_where_asked_to(packed, direct):
    listen = lasting_address()
    with connected(packed, listen, direct=direct, retry_s=0, breaker_failures=2) as (client, server):
        client.lookup(TOKENS)
        server.process.kill()
        server.process.wait()
        for _ in range(2):
            with pytest.raises(UnavailableError):
                client.lookup(TOKENS)
        assert client.breaker_open
        with pytest.raises(UnavailableError) as caught:
            client.prefetch(TOKENS, timeout_s=3600).rows(1)
        assert caught.value.reason == "breaker-open"
        with serve_thread(packed, listen=listen):
            wait_until_closed(client)
            assert client.lookup(TOKENS)[1].shape == (500, 24, 264)


@contextmanager
def connected(packed, listen, **settings):
    with (
        serve_process(packed, listen=listen, workers=1) as server,
        Client(listen, attach="off", **settings) as client,
    ):
        yield client, server


def test_cached_tokens_stay_valid_when_the_server_is_gone(packed):
    known, unknown = np.arange(40, dtype=np.int32), np.arange(1000, 1040, dtype=np.int32)
    with (
        serve_process(packed, workers=1) as server,
        Client(server.address, on_failure="mask", cache_bytes=8 << 20, retry_s=0, attach="off") as client,
    ):
        client.lookup(known)
        server.process.kill()
        server.process.wait()
        tokens = np.concatenate([known, unknown])
        bounds = np.array([0, 40, 80], np.int32)
        rows = wanted(client, known)
        for _ in range(5):  # with the breaker closed, and open
            out = {14: np.full((80, 24, 264), 7, np.uint8)}
            step = client.prefetch(tokens, bounds, out=out)
            for layer in (1, 14):
                assert step.valid(layer).tolist() == [True] * 40 + [False] * 40
                assert np.array_equal(step.rows(layer)[:40], rows[layer])
                assert not step.rows(layer)[40:].any()
            assert step.rows(14) is out[14]
        assert client.breaker_open
        # What is cached whole needs no server, and is no failure.
        step = client.prefetch(known)
        assert step.valid(1).all()
        assert step.error is None


def test_masked_rows_in_the_callers_arrays_are_zero(packed):
    with (
        serve_process(packed, workers=1) as server,
        Client(server.address, on_failure="mask", retry_s=0, attach="off") as client,
    ):
        server.process.kill()
        server.process.wait()
        out = {
            1: np.full((500, 24, 264), 7, np.uint8),
            14: {"values": np.full((500, 24, 256), 7, np.uint8), "scales": np.full((500, 24, 8), 7, np.uint8)},
        }
        step = client.prefetch(TOKENS, out=out)
        assert not step.valid(1).any()
        step.wait()
        assert not out[1].any()
        assert not out[14]["values"].any()
        assert not out[14]["scales"].any()
        ids = client.spec.hash(TokenBatch.of(TOKENS))
        step = client.prefetch_rows({1: ids[1], 14: ids[14].reshape(-1)})
        assert step.valid(1).shape == (500,)
        assert step.valid(14).shape == (500 * 24,)
        assert not step.rows(14).any()


def test_nothing_is_written_after_the_deadline(server):
    with Client(server, on_failure="mask", attach="off") as client:
        out = {layer: np.empty((500, 24, 264), np.uint8) for layer in (1, 14)}
        for _ in range(30):
            # Sometimes in time, sometimes not: what was settled then stays.
            step = client.prefetch(TOKENS, out=out, timeout_s=0.003)
            settled = {layer: (step.rows(layer).copy(), step.valid(layer).copy()) for layer in (1, 14)}
            client.lookup(TOKENS[:100])
            for layer, rows in wanted(client).items():
                seen, valid = settled[layer]
                assert np.array_equal(out[layer], seen)
                assert np.array_equal(seen[valid], rows[valid])
                assert not seen[~valid].any()


def test_prefetch_refuses_what_would_not_fit_in_memory(silent):
    step_bytes = 500 * 48 * 264
    with Client(silent.address, max_pending_bytes=3 * step_bytes, attach="off") as client, silent.frozen():
        steps = [client.prefetch(TOKENS, timeout_s=60) for _ in range(3)]
        assert client.stats.in_flight == 3
        with pytest.raises(OverloadedError, match="max_pending_bytes") as caught:
            client.prefetch(TOKENS)
        assert caught.value.reason == "client-full"
        steps[2].cancel()
        client.prefetch(TOKENS).cancel()
        for step in steps:
            step.cancel()
        assert client.stats.pending_bytes == 0
        assert client.stats.in_flight == 0
        # A step larger than the bound is let in alone: it could never be otherwise.
        with pytest.raises(DeadlineError):
            client.prefetch(np.tile(TOKENS, 4), timeout_s=0.01).rows(1)


def test_steps_for_later_are_overtaken(packed, monkeypatch):
    gate = GatherGate(monkeypatch)
    with serve_thread(packed) as address, Client(address, max_steps=1, attach="off", timeout_s=60.0) as client:
        order, steps = [], [client.prefetch(TOKENS, layers=[14])]
        gate.wait_begun(1)  # it has the only place
        for name in ("later", "later too", "now"):
            step = client.prefetch(TOKENS, layers=[1], ahead=name != "now")
            step.add_callback(lambda _, layer, name=name: order.append(name))
            steps.append(step)
        eventually(lambda: at_work(client) == (0, 3, 1), "the last one waits for a place, too")
        gate.open.set()
        for step in steps:
            step.wait(60)
        assert order == ["now", "later", "later too"]
