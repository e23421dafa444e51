"""A real server under load: bytes in flight, deadlines, cancelled and failed calls, many clients at once."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from direct_callers import be_patient, caller
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.hashing import TokenBatch
from engrampool_server.answer import pool_service
from engrampool_server.answer.in_flight import InFlight
from engrampool_server.answer.lookups import Limits, Lookups
from engrampool_server.answer.pool_service import PoolService
from engrampool_server.answer.statistics import Statistics
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.table_loader import load
from engrampool_server.memory.tables import LoadedTable
from engrampool_server.telemetry.metrics import Metrics
from server_fixtures import (
    LIMIT_S,
    SPEC,
    VOCAB,
    GatherGate,
    RawPool,
    Running,
    eventually,
    expected,
    joined,
    pack,
    refusal,
    rows_of,
    running,
    version_of,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("service") / "small")


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Running]:
    limits = {"max_rows_per_request": 20_000, "max_answer_bytes": 4 * MIB, "stream_chunk_bytes": 64 * KIB}
    with running(packed, **limits) as run:
        yield run


ROOM = 2 * MIB
MANY = np.arange(2000)  # 528 000 bytes of layer 2: gathered by a thread


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[GatherGate]:
    """Every large gather waits for it. Made before the servers of a test, so that they stop after it opened."""
    gate = GatherGate(monkeypatch, 500)
    yield gate
    gate.open.set()


@pytest.fixture
def narrow(packed: Path, gate: GatherGate) -> Iterator[tuple[Running, RawPool]]:
    """A server of one gather thread and room for 2 MiB in flight, half of it for one peer."""
    limits = {"max_answer_bytes": MIB, "max_in_flight_bytes": ROOM, "gather_threads": 1}
    with running(packed, **limits) as run, RawPool(run.address, version_of(packed)) as pool:
        yield run, pool
        gate.open.set()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is given up, however long a machine that is busy lets a caller stand still."""
    be_patient(monkeypatch)
    monkeypatch.setattr(pool_service, "PATIENCE_S", 600.0)


def in_flight(run: Running) -> float:
    return run.scrape()["engrampool_in_flight_bytes"]


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_in_flight_are_bounded_and_given_back(narrow, gate, stream):
    run, pool = narrow
    message = pool.by_ids((2, MANY))
    first = ThreadPoolExecutor(1)
    held = first.submit(lambda: joined(pool.stream(message)) if stream else rows_of(pool.lookup(message)))
    gate.wait_begun(1)
    assert in_flight(run) == 528_000
    for call in (pool.lookup, pool.stream):
        code, reason, text = refusal(lambda call=call: call(message))
        assert (code, reason) == (EXHAUSTED, "peer-share")
        assert f"528000 bytes are in flight, of {ROOM}; 528000 of them are for 127.0.0.1" in text
    # What still fits is answered meanwhile.
    assert rows_of(pool.lookup(pool.by_ids((2, [5])))) == {2: expected(2, [5])}
    gate.open.set()
    assert held.result(LIMIT_S) == {2: expected(2, MANY)}
    first.shutdown()
    eventually(lambda: in_flight(run) == 0, "nothing in flight")
    assert rows_of(pool.lookup(message)) == {2: expected(2, MANY)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_call_gives_its_bytes_back(narrow, gate, stream):
    run, pool = narrow
    message = pool.by_ids((2, MANY))
    call = pool.stream(message) if stream else pool.lookup.future(message)
    gate.wait_begun(1)
    assert in_flight(run) == 528_000
    call.cancel()
    eventually(lambda: in_flight(run) == 0, "nothing in flight")
    gate.open.set()
    assert rows_of(pool.lookup(message)) == {2: expected(2, MANY)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_call_gives_its_bytes_back(narrow, stream):
    run, pool = narrow
    message = pool.by_ids((2, [*MANY, 6500]))
    code, _, text = refusal(lambda: pool.stream(message) if stream else pool.lookup(message))
    assert code == INVALID
    assert "row id 6500 at position 2000" in text
    eventually(lambda: in_flight(run) == 0, "nothing in flight")


def test_no_work_starts_after_the_deadline(narrow, gate):
    run, pool = narrow
    message = pool.by_ids((2, MANY[:1500]))
    first = pool.lookup.future(message)
    gate.wait_begun(1)  # the only thread is taken

    def waits() -> grpc.Future | None:
        """A late call, once it waits for the thread; None if its deadline passed before, on a machine that is busy."""
        late = pool.lookup.future(pool.by_ids((2, MANY[:1501])), timeout=3)
        eventually(lambda: late.done() or in_flight(run) == 3001 * 264, "it waits, or is over")
        return None if late.done() else late

    late = eventually(waits, "it waits for the thread")
    code, _, _ = refusal(late.result)
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: in_flight(run) == 1500 * 264, "the late call is over")
    gate.open.set()
    assert rows_of(first.result(LIMIT_S)) == {2: expected(2, MANY[:1500])}
    assert rows_of(pool.lookup(message)) == {2: expected(2, MANY[:1500])}  # the thread takes work in order
    assert gate.begun == 2


class LateContext:
    """A call whose deadline passed while it waited, before gRPC got to cancelling it."""

    def __init__(self) -> None:
        self.ended = None

    def time_remaining(self):
        return 0.0

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def add_done_callback(self, callback):
        self.ended = callback

    async def abort(self, code, text, metadata):
        self.status = (code, metadata)
        raise EngrampoolError(text)


@pytest.mark.parametrize("ids", [[1], MANY])
@pytest.mark.parametrize("stream", [False, True])
def test_a_passed_deadline_is_refused_as_such(packed, ids, stream):
    async def ask():
        metrics, context = Metrics(), LateContext()
        lookups = Lookups(Limits(10_000, MIB, MIB), InFlight(2 * MIB), metrics, 1)
        service = PoolService(lookups, None, False, Statistics(metrics.registry.collect, lookups.threads))
        with PackedModel.open(packed) as model:
            lookups.add(load(model, "anon", False, 1, threading.Event(), lambda _: None))
        lookups.ready = True
        with RawPool("127.0.0.1:1", version_of(packed)) as unused:
            message = unused.by_ids((2, ids))
        try:
            if stream:
                async for _ in service.handlers()["LookupStream"].unary_stream(message, context):
                    raise AssertionError("a row was read")
            else:
                await service.handlers()["Lookup"].unary_unary(message, context)
        finally:
            context.ended(context)
            lookups.close()
            assert metrics.registry.get_sample_value("engrampool_refused_total", {"reason": "deadline"}) == 1
            assert metrics.registry.get_sample_value("engrampool_in_flight_bytes") == 0
            assert context.status == (grpc.StatusCode.DEADLINE_EXCEEDED, (("engrampool-reason", "deadline"),))

    with pytest.raises(EngrampoolError, match="deadline passed before work began"):
        asyncio.run(ask())


# --- callers that do not read, or take too much


@pytest.fixture
def wide(packed: Path) -> Iterator[tuple[Running, RawPool]]:
    """A server of small messages, with room for 32 MiB in flight."""
    limits = {"max_answer_bytes": 32 * MIB, "max_in_flight_bytes": 32 * MIB, "stream_chunk_bytes": 256 * KIB}
    with running(packed, **limits) as run, RawPool(run.address, version_of(packed)) as pool:
        yield run, pool


@pytest.fixture(scope="module")
def tight(packed: Path) -> Iterator[RawPool]:
    """A server of which one caller may hold 512 KiB."""
    limits = {"max_answer_bytes": MIB, "max_in_flight_bytes": MIB}
    with running(packed, **limits) as run, RawPool(run.address, version_of(packed)) as pool:
        yield pool


BULK = np.tile(np.arange(6500), 18)  # 30.9 MiB, more than any window


def test_a_stream_that_is_not_read_holds_little_and_is_ended(wide, monkeypatch):
    run, pool = wide
    monkeypatch.setattr(pool_service, "PATIENCE_S", 0.2)
    over, given_up, give_up = threading.Event(), set(), PoolService._give_up

    def later(service: PoolService, call: asyncio.Task, *about: Any) -> None:
        """Until then nobody is given up: not the one who does read, either, by a machine that is busy."""
        if not over.is_set():
            asyncio.get_running_loop().call_later(0.01, later, service, call, *about)
        elif not call.done() and call not in given_up:
            given_up.add(call)
            give_up(service, call, *about)

    monkeypatch.setattr(PoolService, "_give_up", later)
    message = pool.by_ids((2, BULK))
    call = pool.stream(message)
    next(call)
    assert in_flight(run) <= MIB + len(message)
    with RawPool(run.address, pool.version) as other:
        # All that it asks for, of the same peer, too.
        assert joined(other.stream(other.by_ids((2, BULK[::-1])))) == {2: expected(2, BULK[::-1])}
        eventually(lambda: in_flight(run) <= MIB + len(message), "that one is over")
        over.set()
        # Of what was not read one message is left; it is gRPC's.
        eventually(lambda: 0 < in_flight(run) < 300 * KIB, "it was given up")
    code, reason, _ = refusal(lambda: call)
    assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "unread-answer")
    eventually(lambda: in_flight(run) == 0, "nothing in flight")
    assert run.scrape()['engrampool_refused_total{reason="unread-answer"}'] == 1


@pytest.mark.parametrize("leaves", ["cancels", "closes"])
def test_a_stream_that_was_given_up_is_over_once_its_caller_leaves(wide, monkeypatch, leaves):
    run, pool = wide
    monkeypatch.setattr(pool_service, "PATIENCE_S", 0.2)
    with RawPool(run.address, pool.version) as other:
        call = other.stream(other.by_ids((2, BULK)))
        next(call)
        eventually(lambda: 0 < in_flight(run) < 300 * KIB, "it was given up")
        if leaves == "cancels":
            call.cancel()
            eventually(lambda: in_flight(run) == 0, "nothing in flight")
    eventually(lambda: in_flight(run) == 0, "nothing in flight")


def test_a_peer_that_takes_all_it_can_leaves_room_for_others(narrow, gate):
    run, pool = narrow
    greedy = pool.lookup.future(pool.by_ids((2, MANY)))
    gate.wait_begun(1)
    code, reason, _ = refusal(lambda: pool.stream(pool.by_ids((2, MANY))))
    assert (code, reason) == (EXHAUSTED, "peer-share")
    # Of another address, over the other lane: one bound for both.
    with caller(run, "127.0.0.2") as other:
        other.ask(pool.by_ids((2, MANY[:300])))
        gate.open.set()
        assert joined(other.answer()) == {2: expected(2, MANY[:300])}
    assert rows_of(greedy.result(LIMIT_S)) == {2: expected(2, MANY)}


def test_an_answer_that_one_caller_may_never_hold_is_to_be_asked_for_in_pieces(tight):
    pool = tight
    ids = np.arange(3800)
    message = pool.by_ids((2, ids))
    code, reason, text = refusal(lambda: pool.lookup(message))
    assert (code, reason) == (INVALID, "too-many-rows")
    assert "LookupStream" in text
    assert joined(pool.stream(message)) == {2: expected(2, ids)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ids", [[1], MANY], ids=["small", "large"])
def test_what_goes_wrong_gives_its_bytes_back(wide, monkeypatch, ids, stream):
    run, pool = wide
    message = pool.by_ids((2, ids))
    for place in ("gather", "check"):
        with monkeypatch.context() as broken:
            broken.setattr(LoadedTable, place, lambda *_: (_ for _ in ()).throw(MemoryError))
            code, _, _ = refusal(lambda: pool.stream(message) if stream else pool.lookup(message))
        assert code is grpc.StatusCode.UNKNOWN
        eventually(lambda: in_flight(run) == 0, "nothing in flight")
    assert rows_of(pool.lookup(message)) == {2: expected(2, ids)}


# --- concurrency


def test_many_clients_at_once_get_their_own_rows(server, packed):
    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        done = 0
        with RawPool(server.address, version_of(packed)) as pool:
            for _ in range(12):
                count = int(rng.choice([1, 30, 3000]))
                ids = [(9, rng.integers(0, 4100, count)), (2, rng.integers(0, 6500, count))]
                wanted = {layer: expected(layer, rows) for layer, rows in ids}
                assert rows_of(pool.lookup(pool.by_ids(*ids))) == wanted
                assert joined(pool.stream(pool.by_ids(*ids, dtype=np.uint64))) == wanted
                tokens = TokenBatch.of(rng.integers(0, VOCAB, 50).astype(np.int32))
                hashed = {layer: expected(layer, rows) for layer, rows in SPEC.hash(tokens).items()}
                assert rows_of(pool.lookup(pool.by_tokens(tokens))) == hashed
                assert refusal(lambda: pool.lookup(pool.by_ids((2, [7000]))))[1] == "bad-batch"
                done += 1
        return done

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(work, range(6))) == [12] * 6
    eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
