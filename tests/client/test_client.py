"""Both clients against a real server: the same bytes, the same errors."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import (
    AsyncClient,
    BatchError,
    Client,
    DeadlineError,
    PoolError,
    RejectedError,
    SpecError,
    StepCancelledError,
)
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import GatherGate, direct_of, eventually, serve_thread

VOCAB = 129280
# The blocking client's ways to a server.
LANES = {"grpc": "off", "direct": "auto"}


class Blocking:
    """AsyncClient with Client's face, so that one test holds both to the same behaviour."""

    def __init__(self, target, **settings):
        self._loop = asyncio.new_event_loop()
        self._client = self._call(AsyncClient.connect(target, **settings))
        self.spec, self.served = self._client.spec, self._client.served

    def _call(self, awaitable):
        return self._loop.run_until_complete(awaitable)

    def lookup(self, *arguments, **settings):
        return self._call(self._client.lookup(*arguments, **settings))

    def lookup_rows(self, *arguments, **settings):
        return self._call(self._client.lookup_rows(*arguments, **settings))

    def close(self):
        self._call(self._client.close())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


@contextmanager
def connected(kind: str, target: str, **settings) -> Iterator[Client | Blocking]:
    client = Blocking(target, **settings) if kind == "asyncio" else Client(target, direct=LANES[kind], **settings)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module", params=[*LANES, "asyncio"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["local", "server"])
def pool(request, kind, server) -> Iterator[Client | Blocking]:
    with connected(kind, server, hashing=request.param) as client:
        yield client


@pytest.fixture(scope="module", params=LANES.values(), ids=list(LANES))
def client(request, server) -> Iterator[Client]:
    with Client(server, direct=request.param) as client:
        yield client


def expected(spec, batch: TokenBatch) -> dict[int, np.ndarray]:
    return {layer: synthetic_rows(spec.table(layer), ids) for layer, ids in spec.hash(batch).items()}


def assert_rows(found, wanted) -> None:
    assert list(found) == list(wanted)
    for layer, rows in found.items():
        assert rows.dtype == np.uint8
        assert rows.shape == wanted[layer].shape
        assert np.array_equal(rows, wanted[layer])


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.int32)


@pytest.mark.parametrize("count", [0, 1, 64, 500])  # 500 tokens come as a stream
def test_rows_of_one_sequence(pool, count):
    tokens = tokens_of(count)
    assert_rows(pool.lookup(tokens), expected(pool.spec, TokenBatch.of(tokens)))


@given(data=st.data())
def test_any_batch(pool, data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    total, width = sum(lengths), data.draw(st.integers(0, 3))
    ids = st.integers(0, VOCAB - 1)
    tokens = np.array(data.draw(st.lists(ids, min_size=total, max_size=total)), np.int32)
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    size = len(lengths) * width
    lookback = np.array(data.draw(st.lists(st.integers(-1, VOCAB - 1), min_size=size, max_size=size)), np.int32)
    dead = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), np.bool_)
    lookback_dead = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), np.bool_)
    shape = (len(lengths), width)
    arrays = (tokens, bounds, lookback.reshape(shape), dead, lookback_dead.reshape(shape))
    assert_rows(pool.lookup(*arrays), expected(pool.spec, TokenBatch(*arrays)))


def test_chunks_give_what_the_whole_gives(pool):
    tokens = tokens_of(50)
    whole = pool.lookup(tokens)
    for start, stop in ((0, 1), (1, 3), (3, 20), (20, 50)):
        lookback = np.array([[tokens[start - back] if start >= back else -1 for back in (1, 2, 3)]], np.int32)
        part = pool.lookup(tokens[start:stop], np.array([0, stop - start], np.int32), lookback)
        assert_rows(part, {layer: rows[start:stop] for layer, rows in whole.items()})


def test_layers_asked_for_come_in_order_of_the_model(pool):
    rows = pool.lookup([5, 6], layers=[14, 1, 14])
    assert list(rows) == [1, 14]
    assert_rows(pool.lookup([5, 6], layers=[14]), {14: rows[14]})


def test_rows_by_id_keep_the_shape_of_the_ids(pool):
    table = pool.spec.table(14)
    ids = np.random.default_rng(1).integers(0, table.num_rows, (3, 4, 5))
    for dtype in (np.int64, np.uint32, np.uint64, np.int32):
        rows = pool.lookup_rows({14: ids.astype(dtype)})
        assert_rows(rows, {14: synthetic_rows(table, ids.astype(np.uint64))})
    assert pool.lookup_rows({1: np.empty((0, 24), np.int64)})[1].shape == (0, 24, 264)


def test_rows_are_read_only(pool):
    for count in (1, 500):
        rows = pool.lookup(tokens_of(count))[1]
        with pytest.raises(ValueError, match="read-only"):
            rows[0] = 0


@pytest.mark.parametrize("count", [1, 64, 500])
def test_rows_land_in_the_callers_arrays(pool, count):
    tokens = tokens_of(count)
    wanted = expected(pool.spec, TokenBatch.of(tokens))
    staging = np.zeros((2, 600, 24, 264), np.uint8)
    out = {1: staging[0, 10 : 10 + count], 14: staging[1, :count]}
    found = pool.lookup(tokens, out=out)
    assert found[1] is out[1]
    assert found[14] is out[14]
    assert_rows(out, wanted)
    assert not staging[0, :10].any()
    assert not staging[0, 10 + count :].any()
    # An array for one layer only; the other is the client's own, and cannot be written.
    ids = pool.spec.hash(TokenBatch.of(tokens))
    found = pool.lookup_rows(ids, out={14: out[14]})
    assert_rows(found, wanted)
    assert found[1].flags.writeable is False
    with pytest.raises(BatchError, match="out of layer 1 must be a uint8 array"):
        pool.lookup(tokens, out={1: np.empty((count, 24, 265), np.uint8)})


def test_nothing_is_written_once_a_step_was_given_up(client):
    tokens = tokens_of(6000)
    out = {layer: np.empty((6000, 24, 264), np.uint8) for layer in (1, 14)}
    for _ in range(5):
        for array in out.values():
            array[:] = 0
        step = client.prefetch(tokens, out=out)
        step.rows(1)
        step.cancel()
        seen = out[14].copy()
        client.lookup(tokens_of(100))
        assert np.array_equal(out[14], seen)


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
@pytest.mark.parametrize("connections", [2, 3])
def test_large_lookups_share_connections(server, connections, lane, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.endpoint.SPLIT_ABOVE_BYTES", 100_000)
    with Client(server, connections=connections, direct=lane) as client:
        for count in (0, 1, 7, 8, 500, 1000):
            tokens = tokens_of(count)
            wanted = expected(client.spec, TokenBatch.of(tokens))
            assert_rows(client.lookup(tokens), wanted)
            step = client.prefetch(tokens)
            assert_rows({layer: step.rows(layer) for layer in step.layers}, wanted)
            step.wait()
            assert count == 0 or step.times is not None
        steps = [client.prefetch(tokens_of(1000, seed)) for seed in range(6)]
        steps[1].cancel()
        for seed, step in enumerate(steps):
            if seed != 1:
                step.wait()
                wanted = expected(client.spec, TokenBatch.of(tokens_of(1000, seed)))
                assert_rows({layer: step.rows(layer) for layer in step.layers}, wanted)
        with pytest.raises(BatchError, match="is 129280"):
            client.lookup([VOCAB] * 1000)


@pytest.mark.parametrize(
    ("cores", "direct", "most"), [(1, "auto", 1), (3, "auto", 1), (6, "auto", 3), (64, "auto", 4), (64, "off", 0)]
)
def test_large_lookups_take_more_connections_by_themselves(server, cores, direct, most, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.endpoint.SPLIT_ABOVE_BYTES", 1_000_000)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    with Client(server, direct=direct) as client:
        tokens = tokens_of(1000)
        wanted = expected(client.spec, TokenBatch.of(tokens))

        def all_are_there() -> bool:
            assert_rows(client.lookup(tokens), wanted)
            return direct_of(client)[0] == most

        eventually(all_are_there, "as many connections as pay")
        assert connections_for(client, 8) == 1
        assert connections_for(client, 1000) == max(1, most)
        for _ in range(5):
            assert_rows(client.lookup(tokens), wanted)
        assert direct_of(client) == (most, most)


def connections_for(client: Client, tokens: int) -> int:
    """Over how many a lookup of so many tokens would go now, all their rows being asked for."""
    (endpoint,) = client._shards.sets[0].replicas
    return endpoint.ways(SimpleNamespace(answer_bytes=tokens * 2 * 24 * 264))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((np.array([1, 2**32 + 1]),), r"tokens cannot be made int32: tokens\[1\] is 4294967297"),
        ((np.array([1.0, 2.0]),), "tokens cannot be made int32: they are float64"),
        (([1, 2.5],), "tokens cannot be made int32: they are float64"),
        ((np.array([[1, 2]], np.int32),), r"tokens must be int32 \[\*\]"),
        ((["a"],), "tokens cannot be made int32"),
        (([2**31],), "tokens cannot be made int32"),
        (([1, VOCAB],), r"tokens\[1\] is 129280; this model's token ids are 0 .. 129279"),
        (([1, -1],), r"tokens\[1\] is -1"),
        (([1, 2], [0, 1]), "query_start_loc must run from 0 to the number of tokens"),
        (([1, 2], [0, 2, 1, 2]), "query_start_loc must ascend: entry 2 is 1, after 2 at entry 1"),
        (([1, 2], []), "query_start_loc must run"),
        (([1, 2], [0, 2], [[1, 2, 3, 4]]), "lookback has 4 columns; this model reads 3 tokens back at most"),
        (([1, 2], [0, 2], [[1], [2]]), r"lookback must be int32 \[1, \*\]"),
        (([1, 2], [0, 2], [[VOCAB]]), r"lookback\[0, 0\] is 129280"),
        (([1, 2], [0, 2], [[-2]]), r"lookback\[0, 0\] is -2"),
        (([1, 2], None, None, np.array([True])), r"dead must be bool \[2\]"),
        (([1, 2], None, None, np.array([1, 2])), r"dead cannot be made bool: dead\[1\] is 2"),
        (([1, 2], [0, 2**32 + 2]), r"query_start_loc cannot be made int32: query_start_loc\[1\] is 4294967298"),
        (([1, 2], None, np.array([[2**32 - 1]])), r"lookback cannot be made int32: lookback\[0, 0\] is 4294967295"),
    ],
)
def test_bad_batches_are_refused_with_the_culprit(pool, arguments, text):
    with pytest.raises(BatchError, match=text):
        pool.lookup(*arguments)
    assert pool.lookup([1])[1].shape == (1, 24, 264)  # and nothing else is harmed


def test_unknown_layers_and_bad_row_ids(pool):
    with pytest.raises(SpecError, match="has no layer 2; it has 1, 14"):
        pool.lookup([1], layers=[2])
    num_rows = pool.spec.table(1).num_rows
    for ids, text in (
        (np.array([0, num_rows]), f"row id {num_rows} at position 1 of layer 1 is not in"),
        (np.array([-1]), "row id -1 at position 0"),
        (np.array([5, -1], np.int8), "row id -1 at position 1 of layer 1"),
        (np.array([[5, 6], [-32768, 7]], ">i2"), "row id -32768 at position 2 of layer 1"),
        (np.ma.array([5, -1], mask=[False, True]), "row id -1 at position 1 of layer 1"),
        (np.array([0.5]), "must be an integer array; they are float64"),
        (np.array([True]), "must be an integer array; they are bool"),
        ([1, 2], "must be an integer array; they are list"),
    ):
        with pytest.raises(BatchError, match=text):
            pool.lookup_rows({1: ids})
    with pytest.raises(BatchError, match="at least one layer"):
        pool.lookup_rows({})
    with pytest.raises(BatchError, match="at least one layer"):
        pool.lookup([1], layers=[])


def test_a_batch_over_the_servers_limits(kind, packed):
    with serve_thread(packed, max_rows_per_request=480) as address, connected(kind, address) as client:
        assert client.lookup(tokens_of(10))[1].shape == (10, 24, 264)
        with pytest.raises(RejectedError, match="over the server's limits of 480 rows") as caught:
            client.lookup(tokens_of(11))
        assert caught.value.reason == "too-many-rows"


def test_a_deadline_that_cannot_be_met(pool):
    with pytest.raises(DeadlineError):
        pool.lookup(tokens_of(2000), timeout_s=1e-6)


def test_arrays_may_be_overwritten_at_once(client):
    tokens = tokens_of(400)
    wanted = expected(client.spec, TokenBatch.of(tokens.copy()))
    step = client.prefetch(tokens)
    tokens[:] = 0
    assert_rows({layer: step.rows(layer) for layer in step.layers}, wanted)


def test_a_step_tells_its_times(client):
    step = client.prefetch(tokens_of(1000))
    step.wait()
    assert step.done()
    assert step.times is not None
    assert step.elapsed_s is not None
    assert step.times.queue_us + step.times.gather_us <= step.times.total_us + 2  # each was rounded
    assert step.times.total_us / 1e6 <= step.elapsed_s
    assert step.wait_s == {1: 0.0, 14: 0.0}
    step.rows(1)
    assert step.wait_s[1] >= 0
    with pytest.raises(BatchError, match="layer 3 was not asked for"):
        step.rows(3)


def test_many_steps_at_once_each_get_their_own(client):
    batches = [tokens_of(count, seed) for seed, count in enumerate([1, 300, 7, 64, 450, 2, 0, 33] * 3)]
    steps = [client.prefetch(tokens) for tokens in batches]
    for tokens, step in reversed(list(zip(batches, steps, strict=True))):
        assert_rows({layer: step.rows(layer) for layer in step.layers}, expected(client.spec, TokenBatch.of(tokens)))


def test_one_client_in_many_threads(client):
    failures = []

    def work(seed):
        for turn in range(5):
            tokens = tokens_of(40 + turn, 100 * seed + turn)
            try:
                assert_rows(client.lookup(tokens), expected(client.spec, TokenBatch.of(tokens)))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_a_cancelled_step_ends_at_once_and_harms_no_other(packed, monkeypatch, lane):
    gate = GatherGate(monkeypatch)
    one = {"max_steps": 1, "connections": 1, "timeout_s": 60.0}
    with serve_thread(packed) as address, Client(address, direct=lane, **one) as client:
        running = client.prefetch(tokens_of(8000))
        gate.wait_begun(1)  # nothing can come
        waiting = client.prefetch(tokens_of(10))
        after = client.prefetch(tokens_of(10))
        waiting.cancel()
        running.cancel()
        for step in (waiting, running):
            assert step.done()
            step.cancel()  # twice is once
        with pytest.raises(StepCancelledError):
            waiting.rows(1)
        with pytest.raises(StepCancelledError):
            running.wait()
        gate.open.set()
        assert_rows({1: after.rows(1)}, {1: expected(client.spec, TokenBatch.of(tokens_of(10)))[1]})


def test_rows_that_came_before_the_cancel_stay(client):
    step = client.prefetch(tokens_of(50))
    rows = step.rows(1)
    step.cancel()
    assert np.array_equal(step.rows(1), rows)


def test_waiting_no_longer_than_asked(packed, monkeypatch):
    """The wait for one layer has its own bound, beside the lookup's."""
    gate = GatherGate(monkeypatch)
    one = {"max_steps": 1, "connections": 1, "timeout_s": 60.0}
    with serve_thread(packed) as address, Client(address, **one) as client:
        blocker = client.prefetch(tokens_of(500))
        gate.wait_begun(1)  # the only place is taken, so nothing can come
        step = client.prefetch([1])
        try:
            with pytest.raises(DeadlineError, match=r"not there within 0\.01 s"):
                step.rows(1, timeout_s=0.01)
            with pytest.raises(DeadlineError, match=r"not complete within 0\.01 s"):
                step.wait(timeout_s=0.01)
        finally:
            gate.open.set()
        assert step.rows(1).shape == (1, 24, 264)
        assert blocker.rows(1).shape == (500, 24, 264)


def test_a_closed_client_says_so(server):
    client = Client(server)
    client.close()
    client.close()
    with pytest.raises(PoolError, match="the client is closed"):
        client.prefetch([1])


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_closing_ends_every_step(packed, monkeypatch, lane):
    gate = GatherGate(monkeypatch)
    with serve_thread(packed) as address:
        client = Client(address, max_steps=2, direct=lane, timeout_s=60.0)
        steps = [client.prefetch(tokens_of(4000)) for _ in range(6)]
        gate.wait_begun(1)
        client.close()
        gate.open.set()
    for step in steps:
        assert step.done()
    with pytest.raises(StepCancelledError):
        steps[-1].rows(1)


def test_settings_out_of_range(server):
    for settings in (
        {"hashing": "remote"},
        {"timeout_s": 0},
        {"connect_timeout_s": -1},
        {"max_steps": 0},
        {"retry_s": -1},
        {"connections": 0},
    ):
        with pytest.raises(ValueError, match="must be"):
            Client(server, **settings)


def test_asyncio_steps(packed, monkeypatch):
    gate = GatherGate(monkeypatch)
    gate.open.set()

    async def run(address):
        async with await AsyncClient.connect(address, timeout_s=60.0) as client:
            wanted = expected(client.spec, TokenBatch.of(tokens_of(500)))
            step = client.prefetch(tokens_of(500))
            both = await asyncio.gather(step.rows(1), step.rows(1), step.rows(14))
            assert np.array_equal(both[0], wanted[1])
            assert np.array_equal(both[2], wanted[14])

            # Giving up on a wait, by time or by cancelling, leaves the step to others.
            gate.open.clear()
            step = client.prefetch(tokens_of(500))
            with pytest.raises(DeadlineError):
                await step.rows(14, timeout_s=1e-9)
            waiter = asyncio.create_task(step.rows(14))
            await asyncio.sleep(0)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            gate.open.set()
            assert np.array_equal(await step.rows(14), wanted[14])

            gate.open.clear()
            cancelled = client.prefetch(tokens_of(8000))
            cancelled.cancel()
            with pytest.raises(StepCancelledError):
                await cancelled.rows(1)
            assert cancelled.done()
            last = client.prefetch(tokens_of(8000))
        with pytest.raises(StepCancelledError):
            await last.rows(1)
        with pytest.raises(PoolError, match="the client is closed"):
            client.prefetch([1])

    with serve_thread(packed) as address:
        try:
            asyncio.run(run(address))
        finally:
            gate.open.set()
