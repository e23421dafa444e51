"""Rows of a large lookup that are received where they belong first, and copied from there to wherever else they do."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from direct_peers import SERVED
from engrampool_client import Client, DeadlineError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange, Route
from engrampool_client.lookup.landing import Landing, Places
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.kernels import receive
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import LIMIT_S, direct_of, eventually
from small_model import small_spec

pytestmark = pytest.mark.usefixtures("patient")
# Of five words: of 600 n-grams of two of them there are 25, of four up to 625. A megabyte a layer all the same.
TOKENS = np.random.default_rng(5).integers(100, 105, 600).astype(np.int32)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engrampool_client.pool.endpoint.SPLIT_ABOVE_BYTES", 100_000)


@pytest.fixture(scope="module")
def wanted() -> dict[int, np.ndarray]:
    spec = small_spec()
    return {layer: synthetic_rows(spec.table(layer), ids) for layer, ids in spec.hash(TokenBatch.of(TOKENS)).items()}


def connected(server: str, connections: int = 1, **settings: Any) -> Client:
    """With as many connections of the direct lane as it is to have."""
    client = Client(server, compiled="on", connections=connections, **settings)

    def all_are_there() -> bool:
        (endpoint,) = client._shards.sets[0].replicas
        endpoint._native.ready(connections)
        return direct_of(client)[0] == connections

    eventually(all_are_there, "the connections are there")
    return client


def fetched_elsewhere(client: Client) -> bool:
    """Whether rows were fetched into memory that they were copied from."""
    return bool(client._lookups._versions.current.planner.scratch._spare)


def arrays() -> dict[int, np.ndarray]:
    return {layer: np.full((600, 24, 264), 0xA5, np.uint8) for layer in (1, 14)}


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("heads", [None, (3, 13)])
@pytest.mark.parametrize("given", ["nothing", "arrays", "segments"])
def test_every_row_is_where_it_belongs(server, wanted, connections, heads, given):
    start, stop = heads or (0, 24)
    with connected(server, connections, heads=heads) as client:
        out: Any = None
        if given == "arrays":
            out = {layer: np.full((600, stop - start, 264), 0xA5, np.uint8) for layer in wanted}
        if given == "segments":
            out = {
                1: {name: np.zeros((600, stop - start, n), np.uint8) for name, n in (("values", 256), ("scales", 8))}
            }
        for _ in range(2):
            step = client.prefetch(TOKENS, out=out)
            for layer, rows in wanted.items():
                assert np.array_equal(step.rows(layer), rows[:, start:stop])
            step.wait()
        assert client.stats.bytes["duplicate"] > 0
        if given == "arrays":
            assert all(np.array_equal(out[layer], rows[:, start:stop]) for layer, rows in wanted.items())
        if given == "segments":
            assert np.array_equal(np.concatenate([out[1]["values"], out[1]["scales"]], -1), wanted[1][:, start:stop])
        assert not fetched_elsewhere(client)


@pytest.mark.parametrize("settings", [{"cache_bytes": 64 << 20}, {"direct": "off"}])
def test_where_the_cache_is_to_have_them_or_they_come_over_grpc_they_are_fetched_first(server, wanted, settings):
    with Client(server, compiled="on", **settings) as client:
        for _ in range(2):  # the second time all are in the cache
            assert all(np.array_equal(rows, wanted[layer]) for layer, rows in client.lookup(TOKENS).items())
        assert fetched_elsewhere(client)
        assert bool(client.stats.bytes["cache"]) == ("cache_bytes" in settings)


Event = Callable[[Any], int | None]


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Event], None]]:
    """Has what an event gives for the layers, once it is not None, be what `take` says the next time."""
    take, events, happened = receive.take, [], []

    def taken(fd: int, buffer: Any, state: Any, layers: Any, *rest: Any) -> int:
        got = events[0](layers) if events and not happened else None
        if got is None:
            return take(fd, buffer, state, layers, *rest)
        happened.append(got)
        return got

    monkeypatch.setattr(receive, "take", taken)
    yield events.append
    assert happened


def lost(layers: Any) -> int:
    """The connection ends when some rows of every layer that is not whole have come."""
    layers[:, receive.HAVE] = np.where(
        layers[:, receive.HAVE] < layers[:, receive.BYTES], layers[:, receive.RUN_BYTES] + 1, layers[:, receive.HAVE]
    )
    return receive.LOST


@pytest.mark.parametrize(("connections", "call"), [(1, 0), (1, 1), (2, 0), (3, 2)])
def test_what_a_lost_connection_leaves_comes_over_grpc(server, wanted, instead, connections, call):
    with connected(server, connections) as client:
        calls = iter(range(10**9))
        instead(lambda layers: lost(layers) if next(calls) == call else None)
        out = arrays()
        step = client.prefetch(TOKENS, out=out)
        step.wait()
        assert all(np.array_equal(step.rows(layer), rows) for layer, rows in wanted.items())
        assert all(np.array_equal(out[layer], rows) for layer, rows in wanted.items())
        assert all(np.array_equal(rows, wanted[layer]) for layer, rows in client.lookup(TOKENS).items())


@pytest.mark.parametrize("warm", [False, True])
def test_where_only_some_rows_came_all_of_the_layer_are_masked(server, wanted, instead, warm, tmp_path):
    if warm:
        with Client(server, compiled="on", cache_bytes=64 << 20) as client:
            client.lookup(TOKENS[:50])
            client.save_cache(tmp_path / "warm")
    with connected(server, on_failure="mask", warm=tmp_path / "warm" if warm else None) as client:
        steps, begun = [], threading.Event()

        def too_late(layers: Any) -> int | None:
            if layers[0, receive.HAVE] < layers[0, receive.BYTES]:
                return None
            assert begun.wait(LIMIT_S)
            steps[0].delivery.give_up(DeadlineError("late"), wait=False)
            lost(layers)
            return receive.LATER

        instead(too_late)
        out = arrays()
        steps.append(step := client.prefetch(TOKENS, out=out))
        begun.set()
        step.wait()
        assert np.array_equal(step.rows(1), wanted[1])
        assert step.valid(1).all()
        valid = step.valid(14)
        assert valid[:50].all() == valid.any() == warm
        assert not valid.all()
        assert np.array_equal(out[14][valid], wanted[14][valid])
        assert not out[14][~valid].any()
        assert isinstance(step.error, DeadlineError)


# --- parts


class Scattered(Landing):
    """Forty rows of layer 2, of which two each lie side by side among others."""

    def __init__(self) -> None:
        super().__init__(Delivery([2]), {2: (40, 3)})
        first = np.random.default_rng(0).permutation(40)[:20] * 2
        self.into = Places(np.zeros((80, 3), np.uint8), first, 2)

    def places(self, layer: int) -> Places:
        return self.into

    def _rows(self, layer: int) -> np.ndarray:
        return self.into.rows


def cut(whole: Exchange, how: str) -> list[Exchange]:
    if how.startswith("split"):
        parts = whole.split(3, between_runs=how == "split between runs")
        sizes, runs = [len(part.asked_tables[0][1]) for part in parts], [part.landing.places(2).run for part in parts]
        assert (sizes, runs) == (
            ([12, 14, 14], [2, 2, 2]) if how == "split between runs" else ([13, 13, 14], [1, 1, 2])
        )
        return parts
    shards = list(whole.spread({2: Route(np.array([0, 20], np.uint64), np.array([0, 1]))}).values())
    return shards if how == "spread" else [part for shard in shards for part in shard.split(2)]


@pytest.mark.parametrize("how", ["split", "split between runs", "spread", "spread and split"])
@pytest.mark.parametrize("one_in", [1, 2, 10])
def test_parts_whose_rows_come_by_place_or_elsewhere_come_together(how, one_in):
    table = np.random.default_rng(1).integers(1, 256, (50, 3), np.uint8)
    ids = np.random.default_rng(2).integers(0, 50, 40).astype(np.uint32)
    landing = Scattered()
    for number, part in enumerate(cut(Exchange.of_ids(SERVED, {2: ids}, landing), how)):
        assert not landing.delivery.rows
        rows = table[part.asked_tables[0][1]]
        if number % one_in:
            part.landing.by_places(2).put(rows)
            part.landing.received(2, rows.nbytes)
        else:
            part.landing.copy_in(2, 0, rows.reshape(-1).data)
        part.landing.hand_over()
    wanted = np.zeros((80, 3), np.uint8)
    wanted[(landing.into.first[:, None] + [0, 1]).reshape(-1)] = table[ids]
    assert np.array_equal(landing.delivery.rows[2], wanted)


def test_a_layer_that_is_asked_for_again_may_come_another_way():
    landing = Scattered()
    landing.by_places(2)
    landing.received(2, 5)
    assert landing.forget_incomplete() == [2]
    assert not landing.placed
    assert landing.have(2) == 0
