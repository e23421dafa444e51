"""A small step is sent, and received, in threads of the caller's: by whom, and what ends it if nobody receives."""

import gc
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import numpy as np
import pytest

from certificates import Authority
from engrampool_client import Client, DeadlineError, ForkedError, PoolError, StepCancelledError
from engrampool_client.config import ClientConfig
from engrampool_client.lookup import sent
from engrampool_client.lookup.step import Step
from engrampool_client.testing import ServerProcess, serve_process
from forks import FEW, child, expected
from interrupts import Interrupt
from server_fixtures import LIMIT_S, at_work, eventually

# Their rows are more than fits into the client's own memory for small answers.
MANY = np.arange(64, dtype=np.int32)


class Servers:
    """All rows of a model, by several servers maybe. address: as a client takes it."""

    def __init__(self, servers: list[ServerProcess]) -> None:
        self._servers = servers
        self.address = [server.address for server in servers]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """They answer nothing."""
        with ExitStack() as stack:
            for server in self._servers:
                stack.enter_context(server.frozen())
            yield


# Shards, and how many servers hold each.
CLUSTERS = {"one server": (1, 1), "three shards": (3, 1), "two shards of two": (2, 2), "one inside TLS": (1, 1, True)}


@pytest.fixture(scope="module", params=CLUSTERS.values(), ids=list(CLUSTERS))
def silent(packed, request, tmp_path_factory) -> Iterator[Servers]:
    """Servers that answer nothing while they are frozen."""
    count, replicas, *tls = request.param
    with ExitStack() as stack:
        secured = {}
        if tls:
            authority = Authority(tmp_path_factory.mktemp("authority"))
            patch, secured = stack.enter_context(pytest.MonkeyPatch.context()), authority.of_server()
            patch.setitem(ClientConfig.__init__.__kwdefaults__, "tls_ca", str(authority.ca))
        whole = {"shard_by": "row"} if count > 1 else {}
        cuts = [{**whole, "shard": f"{at}/{count}"} if count > 1 else {} for at in range(count)] * replicas
        yield Servers([stack.enter_context(serve_process(packed, workers=1, **cut, **secured)) for cut in cuts])


@pytest.fixture(autouse=True)
def only_for_a_reason(monkeypatch):
    """No replica is left for another one as this machine is slow."""
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", LIMIT_S)


# A cache that has fewer entries than a step of FEW asks for of either layer: of some it has nothing.
CACHES = {"no cache": {}, "with a cache": {"cache_bytes": 8 * 2200}}


@pytest.fixture(params=CACHES.values(), ids=list(CACHES))
def cache(request) -> dict[str, int]:
    return request.param


@pytest.fixture
def client(silent, cache) -> Iterator[Client]:
    with Client(silent.address, attach="off", max_steps=2, **cache) as client:
        client.prefetch(FEW).wait()  # from here on there is a thread for deadlines
        eventually(lambda: client.direct, "the lane is there")
        yield client


def right(client: Client, step: Step, tokens=FEW) -> bool:
    wanted = expected(client.spec, tokens)
    return all(np.array_equal(step.rows(layer), wanted[layer]) for layer in step.layers)


def at_rest(client: Client) -> None:
    """Nothing is left of any step: no place, no bytes, no use of a version, and lookups go on."""
    eventually(lambda: at_work(client) == (0, 0, 0) and not client.stats.pending_bytes, "nothing is left")
    eventually(lambda: client._versions.current.uses == 0, "the version was left")
    eventually(lambda: right(client, client.prefetch(FEW)) and client.direct, "the lane is there")


class Threads:
    """Which threads ran a line of Python within it, beside this one, and which were started."""

    def __enter__(self) -> "Threads":
        self.ran: set[str] = set()
        self._before = set(threading.enumerate())
        self._me = threading.get_ident()
        self._frames = self._seen()
        return self

    def __exit__(self, *_) -> None:
        self.started = {thread.name for thread in set(threading.enumerate()) - self._before}
        after = self._seen()
        self.ran = {name for name, at in after.items() if self._frames.get(name) != at}

    def _seen(self) -> dict[str, tuple[int, int]]:
        """Where each other thread of the client's is: those that sleep stay in the same call."""
        frames = sys._current_frames()
        named = {thread.ident: thread.name for thread in threading.enumerate()}
        return {
            named[ident]: (id(frame), frame.f_lasti)
            for ident, frame in frames.items()
            if ident != self._me and named.get(ident, "").startswith("engrampool")
        }


# --- with a server


@pytest.mark.parametrize("tokens", [1, 64])
def test_between_prefetch_and_the_last_rows_no_other_thread_runs(client, tokens):
    alone = False
    # Those for deadlines and for servers wake now and then, for reasons of their own; another one helps where this one
    # gets no processor for long, and a connection that lost a hedge is replaced.
    for turn in range(100):
        asked = np.arange(tokens, dtype=np.int32) + 100 * turn
        eventually(lambda: client.direct and at_work(client) == (0, 0, 0), "nobody is at work")
        begin, hedges = time.monotonic(), client.stats.hedges
        with Threads() as seen:
            step = client.prefetch(asked)
            rows = {layer: step.rows(layer) for layer in step.layers}
        if time.monotonic() - begin < sent._ALONE_S and client.stats.hedges == hedges:
            assert {*seen.started, *seen.ran} <= {"engrampool-deadlines", "engrampool-shards"}
        alone = alone or not (seen.started or seen.ran)
        step.wait()
        assert at_work(client) == (0, 0, 0)
        wanted = expected(client.spec, asked)
        assert all(np.array_equal(rows[layer], wanted[layer]) for layer in rows)
        assert step.times is not None
        assert 0 < step.arrived_s[1] <= step.arrived_s[14] == step.elapsed_s
        if alone:
            break
    assert alone
    assert client.stats.steps["ok"] == client.stats.begun


def test_two_threads_wait_for_two_layers_of_one_step(client, silent):
    with silent.frozen():
        step, found = client.prefetch(FEW, timeout_s=LIMIT_S), {}
        threads = [
            threading.Thread(target=lambda layer=layer: found.update({layer: step.rows(layer)})) for layer in (14, 1)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: not step.delivery.receiver.free, "one of them receives")
    for thread in threads:
        thread.join(LIMIT_S)
    wanted = expected(client.spec, FEW)
    assert all(np.array_equal(found[layer], wanted[layer]) for layer in (1, 14))
    at_rest(client)


def test_a_layer_waits_for_no_later_ones_rows(client, monkeypatch):
    monkeypatch.setattr("engrampool_client.lookup.sent._ALONE_S", 600.0)
    for out in (None, {layer: np.zeros((64, 24, 264), np.uint8) for layer in (1, 14)}):
        step = client.prefetch(MANY, out=out)
        rows = step.rows(1)
        assert list(step.delivery.rows) == [1]
        assert not step.delivery.ended
        assert right(client, step, MANY)
        assert step.times is not None
        assert out is None or rows is out[1]
    step = client.prefetch(MANY, timeout_s=600.0)
    step.rows(1)
    step.cancel()
    with pytest.raises(StepCancelledError):
        step.rows(14)
    at_rest(client)


def test_a_wait_that_is_timed_settles_nothing_and_the_rows_come(client, silent):
    with silent.frozen():
        step = client.prefetch(FEW, timeout_s=LIMIT_S)
        begin = time.monotonic()
        for wait in (partial(step.rows, 1, 0.02), partial(step.wait, 0.02)):
            with pytest.raises(DeadlineError, match=r"within 0\.02 s"):
                wait()
        assert time.monotonic() - begin < 1.0
        assert not step.done()
    assert right(client, step)
    at_rest(client)


@pytest.mark.parametrize("waits", [False, True], ids=["nobody waits", "somebody waits"])
@pytest.mark.parametrize("way", ["deadline", "cancelled", "dropped", "closed"])
def test_a_step_ends_whether_or_not_somebody_waits(silent, cache, way, waits):
    client = Client(silent.address, attach="off", max_steps=1, **cache)
    with client:
        client.prefetch(FEW).wait()
        eventually(lambda: client.direct, "the lane is there")
        with silent.frozen():
            step = client.prefetch(FEW, timeout_s=0.3 if way == "deadline" else 600.0)
            assert step.delivery.receiver is not None
            failures: list[BaseException] = []
            delivery = step.delivery

            def wait(wait_for=delivery.wait_for, condition=lambda: delivery.settled(1)) -> None:
                wait_for(condition, None)
                failures.append(delivery.error)

            waiter = threading.Thread(target=wait)
            if waits:
                waiter.start()
                receiver = delivery.receiver  # a busy machine may come to the deadline before
                eventually(lambda: delivery.ended or not receiver.free, "it receives")
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
            assert (client.stats.pending_bytes, client.stats.in_flight) == (0, 0)
            eventually(lambda: client._versions.current.uses == 0, "the version was left")
        if way != "closed":
            at_rest(client)


@pytest.mark.parametrize("silent", [(1, 1), (3, 1)], indirect=True)  # of several servers, another is asked
@pytest.mark.parametrize("waits", [False, True], ids=["nobody waits", "somebody waits"])
def test_a_server_that_is_late_costs_no_connection(client, silent, monkeypatch, waits):
    monkeypatch.setattr("engrampool_client.lookup.sent._PASS_OVER_S", 60.0)

    def opened() -> int:
        return sum(one.direct_opened for one in client._shards._open.values())

    before = opened()
    for _ in range(3):
        with silent.frozen():
            step = client.prefetch(FEW, timeout_s=0.05)
            if waits:
                with pytest.raises(DeadlineError):
                    step.rows(14)
            eventually(lambda delivery=step.delivery: delivery.ended, "its deadline")
        assert isinstance(step.delivery.error, DeadlineError)
        eventually(lambda: client._shards.sends == 0, "its answers were passed over")
        assert right(client, client.prefetch(FEW))
    assert opened() == before
    at_rest(client)


def test_a_step_that_nobody_waits_for_is_received_before_its_server_waits_long(client, monkeypatch):
    monkeypatch.setattr("engrampool_client.lookup.sent._ALONE_S", 0.05)
    step = client.prefetch(FEW, timeout_s=600.0)
    eventually(lambda: len(step.delivery.rows) == 2, "a thread receives it")
    assert right(client, step)


@pytest.mark.parametrize("look", ["callback", "done", "amended"])
def test_who_is_told_or_looks_need_not_wait(client, look):
    step, told = client.prefetch(FEW, timeout_s=600.0), []
    if look == "callback":
        step.add_callback(lambda _, layer: told.append(layer))
        eventually(lambda: len(told) == 2, "told")
        assert told == [1, 14]
    elif look == "done":
        eventually(step.done, "done")
        step.add_callback(lambda _, layer: told.append(layer))
        assert told == [1, 14]
    else:
        assert right(client, client.amend(step, FEW + 1), FEW + 1)
    at_rest(client)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_who_asks_again_and_again_without_waiting_gets_the_rows(client, monkeypatch, tokens):
    monkeypatch.setattr("engrampool_client.lookup.sent._ALONE_S", 600.0)
    step, found = client.prefetch(tokens, timeout_s=600.0), {}

    def came(layer: int) -> bool:
        with suppress(DeadlineError):
            found[layer] = step.rows(layer, 0.0)
        return layer in found

    for layer in (1, 14):
        eventually(partial(came, layer), "its rows")
    wanted = expected(client.spec, tokens)
    assert all(np.array_equal(found[layer], wanted[layer]) for layer in found)
    assert at_work(client) == (0, 0, 0)  # no thread of the client's did it


def test_a_server_that_is_frozen_for_long_is_asked_over_another_connection(client, silent):
    with silent.frozen():
        step, found = client.prefetch(FEW, timeout_s=LIMIT_S), []
        waiter = threading.Thread(target=lambda: found.append(step.rows(14)))
        waiter.start()
        # It was silent for too long: another thread goes on, over gRPC.
        eventually(lambda: step.delivery.receiver is None, "handed over")
    waiter.join(LIMIT_S)
    assert np.array_equal(found[0], expected(client.spec, FEW)[14])
    at_rest(client)


def test_what_was_asked_for_is_asked_for_again_whatever_was_written_over_it_since(client, silent):
    given = MANY.copy(), np.arange(len(MANY) + 1, dtype=np.int32), np.zeros((len(MANY), 3), np.int32)
    wanted = client.lookup(*given)
    eventually(lambda: client._shards.sends == 0, "the lane is there")
    with silent.frozen():
        step = client.prefetch(*given, timeout_s=LIMIT_S)
        assert step.delivery.receiver is not None
        for array in given:
            array[:] = 1
        for endpoint in client._shards._open.values():
            for connection in list(endpoint._native._open):
                connection.shut()
    assert all(np.array_equal(step.rows(layer), wanted[layer]) for layer in step.layers)
    at_rest(client)


def test_what_cannot_be_is_said_by_rows(client):
    step = client.prefetch(np.array([10**7], np.int32))
    with pytest.raises(PoolError.__base__, match=r"tokens\[0\] is 10000000"):
        step.rows(1)
    at_rest(client)


def test_a_child_of_a_fork_takes_nothing_of_a_step_that_was_sent(client):
    step = client.prefetch(FEW)

    def run() -> bytes:
        with pytest.raises(ForkedError):
            step.rows(1)
        return b"good" if step.done() else b"not done"

    assert child(run) == b"good"
    assert right(client, step)
    assert client.stats.retries == 0
    at_rest(client)


@pytest.mark.parametrize("first", range(5))
def test_ctrl_c_at_any_line_of_prefetch_and_rows_leaves_nothing_behind(client, first, request):
    gc.collect()  # or a step that an earlier test left is what is interrupted
    gc.freeze()  # to collect garbage takes long with all the rest
    request.addfinalizer(gc.unfreeze)
    for at in itertools.count(first, 5):
        interrupt, step = Interrupt(at), None
        with suppress(KeyboardInterrupt), interrupt:
            step = client.prefetch(FEW)
            step.rows(1)
            step.rows(14)
        if step is not None:  # who is interrupted as he waits may wait again
            with suppress(StepCancelledError):
                assert right(client, step), interrupt.where
        del step
        gc.collect()
        eventually(lambda: at_work(client) == (0, 0, 0) and not client.stats.pending_bytes, f"after {interrupt.where}")
        # A connection that was lost is replaced when one is wanted.
        eventually(lambda: client.lookup(FEW) and client.direct, f"after {interrupt.where}")
        assert client.stats.in_flight == 0, interrupt.where
        if not interrupt.raised:
            break


def test_a_step_that_the_cache_has_is_done_at_once_and_wakes_no_thread(silent):
    with Client(silent.address, attach="off", cache_bytes=1 << 20) as client:
        wanted = expected(client.spec, FEW)
        client.lookup(FEW)
        with silent.frozen(), Threads() as seen:
            step = client.prefetch(FEW, timeout_s=600.0)
            assert step.done()
        assert not {
            name for name in {*seen.started, *seen.ran} if name.startswith("engrampool-") and name[11:].isdecimal()
        }
        assert all(np.array_equal(step.rows(layer), wanted[layer]) for layer in (1, 14))
        assert client._versions.current.uses == 0
        # What it lacks is asked for by a thread.
        assert right(client, client.prefetch(FEW + 100), FEW + 100)
        client.close()
        with pytest.raises(PoolError, match="closed"):
            client.prefetch(FEW + 200)
        assert client._versions.current.uses == 0


def test_a_step_that_is_read_from_memory_is_planned_once(packed, tmp_path):
    # The server is a process of its own: it lets callers of its own user map its tables.
    with (
        serve_process(packed, workers=1, memory=f"file:{tmp_path}") as server,
        Client(server.address, tls_ca=None) as client,
    ):
        eventually(lambda: client.attached, "attached")
        assert client._shards.sends is None
        assert right(client, client.prefetch(FEW))
        assert client.stats.bytes["wire"] == 0
        assert client.stats.bytes["attached"]
