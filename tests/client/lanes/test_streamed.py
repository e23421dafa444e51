"""A small step over gRPC: begun and received in threads of the caller's, one layer after the other."""

import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from engrampool_client import Client, DeadlineError, ForkedError, StepCancelledError, UnavailableError
from engrampool_client.lookup.step import Step
from engrampool_client.testing import ServerProcess, serve_process
from forks import child, expected
from interrupts import Interrupt
from server_fixtures import LIMIT_S, at_work, eventually, running

TOKENS = np.arange(64, dtype=np.int32)
OTHERS = TOKENS + 100


@pytest.fixture(scope="module")
def server(packed) -> Iterator[ServerProcess]:
    with serve_process(packed, workers=1) as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[Client]:
    with Client(server.address, attach="off", direct="off", max_steps=2) as client:
        client.prefetch(TOKENS).wait()  # from here on there is a thread for deadlines
        yield client


def right(client: Client, step: Step, tokens=TOKENS) -> bool:
    wanted = expected(client.spec, tokens)
    return all(np.array_equal(step.rows(layer), wanted[layer]) for layer in step.layers)


def connection_of(client: Client):
    (endpoint,) = client._shards._open.values()
    return endpoint._lanes[0]._connection


def at_rest(client: Client) -> None:
    """Nothing is left of any step, and lookups go on."""
    eventually(lambda: at_work(client) == (0, 0, 0) and not client.stats.pending_bytes, "nothing is left")
    eventually(lambda: client._versions.current.uses == 0, "the version was left")
    assert right(client, client.prefetch(TOKENS))
    assert client.stats.in_flight == 0


@pytest.fixture
def nobody_helps(monkeypatch) -> None:
    """No thread of the client's comes for rows by itself."""
    monkeypatch.setattr("engrampool_client.lookup.sent._ALONE_S", 600.0)


@pytest.mark.parametrize("given_out", [False, True])
def test_a_layer_waits_for_no_later_ones_rows(client, nobody_helps, given_out):
    out = {layer: np.zeros((64, 24, 264), np.uint8) for layer in (1, 14)} if given_out else None
    step = client.prefetch(TOKENS, out=out, timeout_s=600.0)
    assert step.delivery.receiver is not None
    rows = step.rows(1)
    assert list(step.delivery.rows) == [1]
    assert right(client, step)
    assert out is None or rows is out[1]
    assert step.times is not None
    assert 0 < step.arrived_s[1] < step.arrived_s[14] == step.elapsed_s
    at_rest(client)


def test_one_lookup_is_one_call_and_its_end_is_taken_in(packed):
    with running(packed) as run, Client(run.address, attach="off", direct="off") as client:
        for _ in range(40):
            assert right(client, client.prefetch(TOKENS))
        name = f'{{method="LookupStream",model="{client.spec.name}"}}'
        eventually(lambda: run.scrape()[f"engrampool_lookup_seconds_count{name}"] == 40, "each is counted once")
        assert client.stats.bytes["wire"] == client.stats.steps["ok"] * 2 * 64 * 24 * 264
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
        eventually(lambda: len(connection_of(client).streams) < 40, "ends are taken in, some at a time")


def test_a_wait_that_is_timed_settles_nothing_and_the_rows_come(client, server, nobody_helps):
    with server.frozen():
        step = client.prefetch(TOKENS, timeout_s=LIMIT_S)
        begin = time.monotonic()
        for wait in (partial(step.rows, 1, 0.02), partial(step.wait, 0.02), partial(step.rows, 14, 0.02)):
            with pytest.raises(DeadlineError, match=r"within 0\.02 s"):
                wait()
        assert time.monotonic() - begin < 1.0
        assert not step.done()
    assert right(client, step)
    at_rest(client)


def test_who_waits_takes_over_from_one_who_waited_for_less(client, server, nobody_helps):
    """Whoever receives, and whoever was asked to: no rows wait for somebody who is gone."""
    step = client.prefetch(TOKENS, timeout_s=600.0)
    with suppress(DeadlineError):
        step.rows(1, 0.0)
    for layer in (1, 14):
        assert np.array_equal(step.rows(layer, LIMIT_S), expected(client.spec, TOKENS)[layer])
    at_rest(client)


def test_two_threads_wait_for_two_layers_of_one_step(client, server):
    with server.frozen():
        step, found = client.prefetch(TOKENS, timeout_s=LIMIT_S), {}
        threads = [
            threading.Thread(target=lambda layer=layer: found.update({layer: step.rows(layer)})) for layer in (14, 1)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: not step.delivery.receiver.free, "one of them receives")
    for thread in threads:
        thread.join(LIMIT_S)
    assert all(np.array_equal(found[layer], rows) for layer, rows in expected(client.spec, TOKENS).items())
    at_rest(client)


@pytest.mark.parametrize("waits", [False, True], ids=["nobody waits", "somebody waits"])
@pytest.mark.parametrize("way", ["deadline", "cancelled", "dropped", "closed"])
def test_a_step_ends_whether_or_not_somebody_waits(server, way, waits):
    with Client(server.address, attach="off", direct="off", max_steps=1) as client:
        client.prefetch(TOKENS).wait()
        with server.frozen():
            step = client.prefetch(TOKENS, timeout_s=0.3 if way == "deadline" else 600.0)
            failures: list[object] = []
            delivery, condition = step.delivery, partial(step.delivery.settled, 1)

            def wait() -> None:
                delivery.wait_for(condition, None)
                failures.append(delivery.error)

            waiter = threading.Thread(target=wait)
            if waits:
                waiter.start()
                eventually(lambda: delivery.ended or not delivery.receiver.free, "it receives")
            begin = time.monotonic()
            if way == "cancelled":
                step.cancel()
            elif way == "closed":
                client.close()
            elif way == "dropped":
                del step
                gc.collect()
            else:
                eventually(lambda: delivery.ended, "its deadline")
            assert delivery.ended
            if waits:
                waiter.join(LIMIT_S)
                assert isinstance(failures[0], DeadlineError if way == "deadline" else StepCancelledError)
            assert time.monotonic() - begin < 5.0
            eventually(lambda: at_work(client) == (0, 0, 0), "the place is free")
            eventually(lambda: (client.stats.pending_bytes, client.stats.in_flight) == (0, 0), "it is counted")
            eventually(lambda: client._versions.current.uses == 0, "the version was left")
        if way != "closed":
            at_rest(client)


def test_a_deadline_that_a_silent_server_lets_pass_counts_once(server):
    with Client(server.address, attach="off", direct="off", breaker_failures=2) as client:
        client.prefetch(TOKENS).wait()
        with server.frozen():
            for count in (1, 2):
                with pytest.raises(DeadlineError):
                    client.prefetch(TOKENS, timeout_s=0.2).rows(1)
                (endpoint,) = client._shards._open.values()
                assert endpoint.breaker.failures == count
            eventually(lambda: client._shards.breaker_open, "it opens")
            assert client._shards.sends is None
        eventually(lambda: not client._shards.breaker_open, "it answers again")
        at_rest(client)


@pytest.mark.parametrize("look", ["callback", "done", "amended", "nobody"])
def test_who_is_told_or_looks_need_not_wait(client, look):
    step, told = client.prefetch(TOKENS, timeout_s=600.0), []
    if look == "callback":
        step.add_callback(lambda _, layer: told.append(layer))
        eventually(lambda: len(told) == 2, "told")
        assert told == [1, 14]
    elif look == "done":
        eventually(step.done, "done")
    elif look == "amended":
        assert right(client, client.amend(step, OTHERS), OTHERS)
    else:
        eventually(lambda: len(step.delivery.rows) == 2, "a thread receives it")
    at_rest(client)


def test_a_refusal_is_found_out_by_whoever_asks_again(packed):
    with running(packed) as run, Client(run.address, attach="off", direct="off") as client:
        run.server.lookups.ready = False
        with pytest.raises(UnavailableError, match="still loading") as refused:
            client.prefetch(TOKENS).rows(1)
        assert refused.value.reason == "loading"
        run.server.lookups.ready = True
        at_rest(client)


def test_a_server_that_is_replaced_is_asked_again(packed):
    patient = {"retry_s": LIMIT_S, "timeout_s": LIMIT_S}
    with (
        serve_process(packed, workers=1) as server,
        Client(server.address, attach="off", direct="off", **patient) as client,
    ):
        client.prefetch(TOKENS).wait()
        with server.frozen():
            step = client.prefetch(TOKENS)
            for pid in server.worker_pids().values():
                os.kill(pid, signal.SIGKILL)
        assert right(client, step)
        at_rest(client)


def test_a_child_of_a_fork_takes_nothing_of_a_step_that_was_sent(client):
    step = client.prefetch(TOKENS)

    def run() -> bytes:
        with pytest.raises(ForkedError):
            step.rows(1)
        gc.collect()
        return b"good" if step.done() else b"not done"

    assert child(run) == b"good"
    assert right(client, step)
    at_rest(client)


@pytest.mark.parametrize("first", range(5))
def test_ctrl_c_at_any_line_of_prefetch_and_rows_leaves_nothing_behind(client, first, request):
    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    for at in itertools.count(first, 5):
        interrupt, step = Interrupt(at), None
        with suppress(KeyboardInterrupt), interrupt:
            step = client.prefetch(TOKENS)
            step.rows(1)
            step.rows(14)
        if step is not None:
            with suppress(StepCancelledError):
                assert right(client, step), interrupt.where
        del step
        gc.collect()
        eventually(lambda: at_work(client) == (0, 0, 0) and not client.stats.pending_bytes, f"after {interrupt.where}")
        assert right(client, client.prefetch(OTHERS), OTHERS), interrupt.where
        assert client.stats.in_flight == 0, interrupt.where
        if not interrupt.raised:
            break


def test_what_was_given_up_is_received_all_the_same_and_bounded(client):
    """To cancel a call leaves something behind in gRPC until the connection ends."""
    connection = connection_of(client)
    for _ in range(200):
        client.prefetch(TOKENS).cancel()
        assert len(connection.streams) - len(connection.ending) <= 64
        assert len(connection.streams) <= 128
    eventually(lambda: len(connection.streams) == len(connection.ending) < 16, "all have come")
    assert not any(stream.cancelled() for stream in connection.streams)
    at_rest(client)


def test_after_many_at_once_steps_are_begun_by_their_callers_as_before(client, nobody_helps):
    """Calls that are over, whose ends nobody has taken in yet, take no place from others."""
    (endpoint,) = client._shards._open.values()
    steps = []
    while endpoint.sends is not None:
        steps.append(client.prefetch(TOKENS, timeout_s=600.0))
        assert len(steps) < 1000
    assert all(right(client, step) for step in steps)
    assert endpoint.sends is not None
    assert right(client, client.prefetch(OTHERS), OTHERS)
    at_rest(client)


def test_ctrl_c_as_a_call_was_begun_leaves_its_place_to_others(client, monkeypatch):
    connection, before = connection_of(client), len(connection_of(client).ending)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("engrampool_client.lanes.streamed.Exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.prefetch(OTHERS)
    assert len(connection.ending) == before + 1
    at_rest(client)
