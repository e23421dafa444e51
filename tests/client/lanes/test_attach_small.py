"""Small lookups in attached memory: copied in the caller's thread, before `prefetch` returns."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import BatchError, Client, OverloadedError, PoolError, StepCancelledError
from engrampool_client.compute.compiled import CompiledForm
from engrampool_client.lookup.work import Lookup
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.hashing import TokenBatch
from forks import FEW, expected
from interrupts import SMALL_STEPS, Interrupt
from server_fixtures import LIMIT_S, at_work, eventually

TOKENS = np.arange(64, dtype=np.int32)


@pytest.fixture(scope="module")
def server(packed, tmp_path_factory) -> Iterator[ServerProcess]:
    with serve_process(packed, workers=1, memory=f"file:{tmp_path_factory.mktemp('tables')}") as server:
        yield server


@pytest.fixture
def client(server, monkeypatch) -> Iterator[Client]:
    # Wherever the tests' directory lies, what is in it is taken for memory.
    with Client(server.address, max_steps=1) as client:
        eventually(lambda: client.attached, "attached")
        mark(client, in_memory=True)
        yield client


def mark(client: Client, in_memory: bool) -> None:
    """Have its tables lie in memory, or not, whatever the server said."""
    lane = client._shards.sets[0].replicas[0]._attach
    tables = {}
    for layer, table in lane._lease.tables.items():
        offer = type(table.offer)()
        offer.CopyFrom(table.offer)
        offer.in_memory = in_memory
        tables[layer] = replace(table, offer=offer)
    # No answer of the server's changes it while a test runs.
    lane._attach = unavailable
    lane._lease = replace(lane._lease, tables=tables, until=time.monotonic() + 600.0)


def unavailable(_: float) -> None:
    raise OverloadedError("not now")


def ways(client: Client) -> dict[str, Callable[..., dict[int, np.ndarray]]]:
    """A step or a lookup, by tokens or by ids."""

    def step(tokens: np.ndarray, **settings) -> dict[int, np.ndarray]:
        made = client.prefetch(tokens, **settings)
        assert made.delivery.ended
        return {layer: made.rows(layer) for layer in made.layers}

    def ids(tokens: np.ndarray) -> dict[int, np.ndarray]:
        return client.spec.hash(TokenBatch.of(tokens))

    def by_ids(tokens: np.ndarray, **settings) -> dict[int, np.ndarray]:
        made = client.prefetch_rows(ids(tokens), **settings)
        assert made.delivery.ended
        return {layer: made.rows(layer) for layer in made.layers}

    return {
        "step": step,
        "step by ids": by_ids,
        "lookup": client.lookup,
        "lookup by ids": lambda tokens, **settings: client.lookup_rows(ids(tokens), **settings),
    }


def at_rest(client: Client) -> None:
    assert at_work(client) == (0, 0, 0)
    assert (client.stats.in_flight, client.stats.pending_bytes, client._versions.current.uses) == (0, 0, 0)


@pytest.mark.parametrize("way", ["step", "step by ids", "lookup", "lookup by ids"])
@pytest.mark.parametrize("tokens", [FEW, TOKENS], ids=["few", "many"])
def test_rows_are_there_at_once_and_no_thread_of_the_clients_is_asked(client, way, tokens):
    wanted, stats, ask = expected(client.spec, tokens), client.stats, ways(client)[way]
    out = {layer: np.zeros_like(rows) for layer, rows in wanted.items()}
    found, into = ask(tokens), ask(tokens, out=out)
    for layer, rows in wanted.items():
        assert np.array_equal(found[layer], rows)
        assert not found[layer].flags.writeable
        assert into[layer] is out[layer]
        assert np.array_equal(out[layer], rows)
        assert sum(stats.waits[layer].counts) == 2
    assert client._lookups.workers._started == 0
    assert (stats.begun, stats.steps["ok"]) == (2, 2)
    assert stats.bytes["attached"] == 2 * sum(rows.nbytes for rows in wanted.values())
    assert stats.bytes["wire"] == 0
    at_rest(client)


def test_a_step_has_the_time_that_it_took(client):
    step = client.prefetch(TOKENS)
    assert step.times is not None
    assert step.times.total_us == step.times.gather_us
    assert all(step.valid(layer).all() for layer in step.layers)
    told = []
    step.add_callback(lambda _, layer: told.append(layer))
    assert told == [1, 14]


@pytest.mark.parametrize("settings", [{"heads": (4, 12)}, {"cache_bytes": 1 << 20}, {"on_failure": "mask"}], ids=str)
def test_it_is_so_whatever_the_client_is_like(server, settings):
    with Client(server.address, **settings) as client:
        eventually(lambda: client.attached, "attached")
        mark(client, in_memory=True)
        step, columns = client.prefetch(FEW), slice(*settings.get("heads", (None, None)))
        assert step.delivery.ended
        for layer, rows in expected(client.spec, FEW).items():
            assert np.array_equal(step.rows(layer), rows[:, columns])
        assert client._lookups.workers._started == 0


@pytest.mark.parametrize("why", ["no lease", "not in memory", "rows that are not held", "shards"])
def test_what_cannot_be_read_so_goes_another_way(client, server, packed, tmp_path, monkeypatch, why):
    lane = client._shards.sets[0].replicas[0]._attach
    if why == "no lease":
        monkeypatch.setattr(lane, "read", lambda _: None)
    elif why == "not in memory":
        mark(client, in_memory=False)
        monkeypatch.setattr(CompiledForm, "gather_held", None)  # nobody calls it
    elif why == "rows that are not held":
        monkeypatch.setattr(CompiledForm, "gather_held", lambda *_: False)
    else:
        with (
            serve_process(packed, workers=1, shard="0/2", memory=f"file:{tmp_path}") as first,
            serve_process(packed, workers=1, shard="1/2", memory=f"file:{tmp_path}") as second,
            Client([first.address, second.address]) as client,
        ):
            eventually(lambda: client.attached, "attached")
            check(client)
        return
    check(client)


def check(client: Client) -> None:
    wanted = expected(client.spec, FEW)
    for way, ask in {"step": client.prefetch, "lookup": client.lookup}.items():
        found = ask(FEW)
        rows = {layer: found.rows(layer) for layer in found.layers} if way == "step" else found
        assert all(np.array_equal(rows[layer], wanted[layer]) for layer in wanted)
    eventually(lambda: client.stats.in_flight == 0, "both have ended")
    eventually(lambda: client._versions.current.uses == 0, "the version was left")
    assert client.stats.steps["ok"] == 2


def test_what_cannot_be_is_said_as_ever(client):
    for lookup in (client.lookup, lambda tokens: client.prefetch(tokens).rows(1)):
        with pytest.raises(BatchError):
            lookup(np.array([client.spec.vocab_size], np.int32))
    with pytest.raises(BatchError):
        client.lookup_rows({1: np.array([-1])})


@pytest.mark.parametrize("way", ["step", "lookup"])
def test_closing_waits_until_nothing_is_written_any_more(client, monkeypatch, way):
    begun, go_on, over = threading.Event(), threading.Event(), []
    gather = CompiledForm.gather_held

    def slow(*args) -> bool:
        begun.set()
        assert go_on.wait(LIMIT_S)
        over.append(True)
        return gather(*args)

    monkeypatch.setattr(CompiledForm, "gather_held", slow)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            ways(client)[way](FEW)
        except (PoolError, AssertionError) as error:
            failures.append(error)

    asking, closing = threading.Thread(target=ask), threading.Thread(target=client.close)
    asking.start()
    assert begun.wait(LIMIT_S)
    closing.start()
    eventually(client._closing.is_set, "it closes")
    (delivery,) = client._lookups._deadlines._open
    eventually(lambda: delivery.given_up, "it was told")
    assert closing.is_alive()
    go_on.set()
    closing.join(LIMIT_S)
    asking.join(LIMIT_S)
    assert not closing.is_alive()
    assert over
    assert isinstance(failures[0], StepCancelledError)
    assert (client.stats.in_flight, client._versions.current.uses) == (0, 0)


@pytest.mark.parametrize("way", ["step", "lookup"])
@pytest.mark.parametrize("first", range(2))
def test_ctrl_c_at_any_line_leaves_nothing_behind(client, way, first, request):
    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    files = (*SMALL_STEPS, "/attach.py", "/endpoint.py", "/follower.py")
    for at in itertools.count(first, 2):
        interrupt, step = Interrupt(at, files), SimpleNamespace()
        with suppress(KeyboardInterrupt), interrupt:
            step.made = client.prefetch(FEW) if way == "step" else client.lookup(FEW)
        del step
        gc.collect()
        assert (client.stats.in_flight, client.stats.pending_bytes) == (0, 0), interrupt.where
        assert np.array_equal(client.lookup(FEW)[14], expected(client.spec, FEW)[14]), interrupt.where
        assert client.stats.bytes["wire"] == 0, interrupt.where
        if not interrupt.raised:
            break


def test_its_rows_may_be_asked_for_anew_by_who_was_given_up(client, monkeypatch):
    """The first attempt found the lease gone half way: what it wrote is written again."""
    gather, calls, run = CompiledForm.gather_held, [], Lookup.run

    def second_fails(*args) -> bool:
        calls.append(1)
        return gather(*args) and len(calls) != 2

    monkeypatch.setattr(CompiledForm, "gather_held", second_fails)
    monkeypatch.setattr(Lookup, "run", lambda *args: calls.append(2) or run(*args))
    wanted = expected(client.spec, FEW)
    out = {layer: np.zeros_like(rows) for layer, rows in wanted.items()}
    client.lookup(FEW, out=out)
    assert calls == [1, 1, 2]
    assert all(np.array_equal(out[layer], wanted[layer]) for layer in wanted)
    at_rest(client)
