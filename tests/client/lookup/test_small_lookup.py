"""`lookup` of a small batch: sent and received in its caller's thread, and what ends it."""

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from engrampool_client import BatchError, Client, DeadlineError, PoolError, StepCancelledError
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.work import Lookup
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.hashing import TokenBatch
from forks import FEW, child, expected
from interrupts import Interrupt
from server_fixtures import LIMIT_S, at_work, eventually

# Their rows are more than fits into the client's own memory for small answers.
MANY = np.arange(64, dtype=np.int32)
Ask = Callable[..., dict[int, np.ndarray]]


@pytest.fixture(scope="module")
def server(packed) -> Iterator[ServerProcess]:
    with serve_process(packed, workers=1) as server:
        yield server


@pytest.fixture(params=[{}, {"on_failure": "mask"}], ids=["", "masks"])
def client(server, request) -> Iterator[Client]:
    with Client(server.address, attach="off", max_steps=1, **request.param) as client:
        client.prefetch(FEW).wait()  # from here on there is a thread for deadlines
        eventually(lambda: client.direct, "the lane is there")
        yield client


@pytest.fixture(params=["tokens", "ids"])
def ask(client, request) -> Ask:
    """By tokens, or by their row ids."""
    if request.param == "tokens":
        return client.lookup

    def by_ids(tokens: np.ndarray, **settings) -> dict[int, np.ndarray]:
        return client.lookup_rows(client.spec.hash(TokenBatch.of(tokens)), **settings)

    return by_ids


def at_rest(client: Client) -> None:
    eventually(lambda: at_work(client) == (0, 0, 0) and not client.stats.pending_bytes, "nothing is left")
    assert client.stats.in_flight == 0
    assert client._versions.current.uses == 0


def in_other_threads(client: Client) -> int:
    return client._lookups.workers._started


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_it_is_the_callers_thread_that_asks_and_receives_and_counts_once(client, ask, tokens):
    wanted, stats = expected(client.spec, tokens), client.stats
    out = {layer: np.zeros_like(rows) for layer, rows in wanted.items()}
    eventually(lambda: client._shards.sends == 0, "a connection is idle")
    before, counted = in_other_threads(client), (stats.begun, stats.steps["ok"], stats.bytes["wire"])
    waits = {layer: sum(stats.waits[layer].counts) for layer in wanted}
    found, into = ask(tokens), ask(tokens, out=out)
    assert in_other_threads(client) == before
    for layer, rows in wanted.items():
        assert np.array_equal(found[layer], rows)
        assert not found[layer].flags.writeable
        assert into[layer] is out[layer]
        assert np.array_equal(out[layer], rows)
        assert sum(stats.waits[layer].counts) == waits[layer] + 2
    nbytes = 2 * sum(rows.nbytes for rows in wanted.values())
    assert (stats.begun, stats.steps["ok"], stats.bytes["wire"]) == (
        counted[0] + 2,
        counted[1] + 2,
        counted[2] + nbytes,
    )
    assert client.stats.retries == 0
    at_rest(client)


def test_its_deadline_ends_it_and_costs_no_connection(client, ask, server, monkeypatch):
    monkeypatch.setattr("engrampool_client.lookup.sent._PASS_OVER_S", 60.0)
    (endpoint,) = client._shards.sets[0].replicas
    wanted, opened = expected(client.spec, FEW), endpoint.direct_opened
    out = {layer: np.ones_like(rows) for layer, rows in wanted.items()}
    masks = client._config.on_failure == "mask"
    with server.frozen():
        if masks:
            assert not any(rows.any() for rows in ask(FEW, timeout_s=0.05, out=out).values())
        else:
            with pytest.raises(DeadlineError):
                ask(FEW, timeout_s=0.05, out=out)
    assert client.stats.steps["masked" if masks else "failed"] == 1
    eventually(lambda: client._shards.sends == 0, "its answer was passed over")
    assert all((rows == (0 if masks else 1)).all() for rows in out.values())
    assert endpoint.direct_opened == opened
    at_rest(client)


def test_closing_ends_it(client, ask, server):
    failures: list[BaseException] = []

    def run() -> None:
        try:
            ask(FEW, timeout_s=600.0)
        except PoolError as error:
            failures.append(error)

    waiter = threading.Thread(target=run)
    with server.frozen():
        waiter.start()
        eventually(lambda: client.stats.in_flight == 1, "it waits")
        client.close()
        waiter.join(LIMIT_S)
    # Who came just before it was sent finds the client closed.
    assert isinstance(failures[0], PoolError)
    assert (client.stats.pending_bytes, client.stats.in_flight) == (0, 0)
    eventually(lambda: client._versions.current.uses == 0, "the version was left")
    with pytest.raises(PoolError, match="closed"):
        ask(FEW)


def lost(*_: object) -> Came:
    """As of a connection that broke."""
    return Came.NOTHING


def test_what_does_not_come_so_is_asked_for_in_the_same_thread(client, ask, server, monkeypatch):
    """Though all places of the client's threads are taken, by a step that waits for a server."""
    monkeypatch.setattr("engrampool_client.lanes.small.SmallRequest.ready", lost)
    where, run = [], Lookup.run

    def noted(lookup: Lookup, spin_s: float) -> None:
        where.append(threading.get_ident())
        run(lookup, spin_s)

    monkeypatch.setattr(Lookup, "run", noted)
    eventually(lambda: client._shards.sends == 0, "a connection is idle")
    found, wanted = ask(FEW), expected(client.spec, FEW)
    assert all(np.array_equal(found[layer], wanted[layer]) for layer in wanted)
    assert where == [threading.get_ident()]
    assert in_other_threads(client) == 0
    at_rest(client)


def test_what_cannot_be_is_said_as_ever(client):
    begun = client.stats.begun
    with pytest.raises(BatchError):
        client.lookup(np.array([client.spec.vocab_size], np.int32))
    with pytest.raises(BatchError):
        client.lookup_rows({1: np.array([-1])})
    assert client.stats.begun == begun + 2
    at_rest(client)


def test_a_child_of_a_fork_takes_nothing_of_a_lookup_that_was_sent(client, server):
    found: list[dict[int, np.ndarray]] = []
    waiter = threading.Thread(target=lambda: found.append(client.lookup(FEW, timeout_s=600.0)))
    with server.frozen():
        waiter.start()
        eventually(lambda: client.stats.in_flight == 1, "it waits")

        def run() -> bytes:
            gc.collect()
            return b"good" if client.stats.in_flight == 0 else b"pending"

        assert child(run) == b"good"
    waiter.join(LIMIT_S)
    assert np.array_equal(found[0][14], expected(client.spec, FEW)[14])
    at_rest(client)


@pytest.mark.parametrize("breaks", [False, True], ids=["", "and its connection breaks"])
def test_ctrl_c_at_any_line_leaves_nothing_behind(server, breaks, monkeypatch, request):
    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    out = {layer: np.zeros_like(rows) for layer, rows in expected_of(server).items()}
    with Client(server.address, attach="off", max_steps=1) as client:
        client.prefetch(FEW).wait()
        for at in itertools.count(0, 2):
            with monkeypatch.context() as patch:
                if breaks:
                    patch.setattr("engrampool_client.lanes.small.SmallRequest.ready", lost)
                eventually(lambda: client._shards.sends == 0, "a connection is idle")
                interrupt = Interrupt(at)
                with suppress(KeyboardInterrupt, StepCancelledError), interrupt:
                    client.lookup(FEW, out=out)
            # Its arrays are the caller's again.
            wanted = expected(client.spec, FEW)
            given = {layer: rows.copy() for layer, rows in out.items()}
            gc.collect()  # a connection that was lost makes room for another
            eventually(lambda: client.lookup(FEW) and client._shards.sends == 0, f"after {interrupt.where}")
            assert all(np.array_equal(out[layer], given[layer]) for layer in wanted), interrupt.where
            eventually(lambda: at_work(client) == (0, 0, 0), f"after {interrupt.where}")
            assert client.stats.in_flight == 0, interrupt.where
            if not interrupt.raised:
                break


def expected_of(server: ServerProcess) -> dict[int, np.ndarray]:
    with Client(server.address) as client:
        return expected(client.spec, FEW)
