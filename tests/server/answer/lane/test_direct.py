"""The direct lane of a real server, asked in raw frames: answers, refusals, hostile and vanishing callers."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_callers import Caller, be_patient, caller, lookup_frame, way_in
from engrampool_proto import frames, wire
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from server_fixtures import (
    LIMIT_S,
    RawPool,
    Running,
    eventually,
    expected,
    joined,
    pack,
    running,
    version_of,
)

KIB, MIB = 1 << 10, 1 << 20
ROOMY = {"max_answer_bytes": 200 * MIB, "max_in_flight_bytes": 200 * MIB}
MANY = np.tile(np.arange(4100), 2)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("direct") / "small")


INLINE = {"event_loop": "uvloop"}
THREADS = {"event_loop": "asyncio", "gather_threads": 2, "direct_spin_s": 0.002}


@pytest.fixture(scope="module", params=[INLINE, THREADS], ids=["inline", "threads"])
def server(request: pytest.FixtureRequest, packed: Path) -> Iterator[Running]:
    limits = {"max_rows_per_request": 20_000, "max_answer_bytes": 5 * MIB, "stream_chunk_bytes": 64 * KIB}
    with running(packed, **request.param, **limits) as run:
        yield run


@pytest.fixture(scope="module")
def pool(server: Running, packed: Path) -> Iterator[RawPool]:
    with RawPool(server.address, version_of(packed)) as client:
        yield client


@pytest.fixture(autouse=True, params=[False, True], ids=["message", "handle"])
def by_handle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether callers ask for rows by handles, which a loop without Python answers, or by messages."""
    be_patient(monkeypatch)
    monkeypatch.setattr(Caller, "by_handle", request.param)


@pytest.fixture
def nothing_left(server: Running) -> Iterator[None]:
    """Whatever the test did: afterwards no bytes are in flight and no connection is open."""
    yield
    eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
    eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "no connection")


# --- answers


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_rows_are_those_of_a_stream_however_many(server, pool, dtype):
    with caller(server) as lane:
        for count in (0, 1, 7, 300, 5000):
            rng = np.random.default_rng(count)
            wide, narrow = rng.integers(0, 6500, count), rng.integers(0, 4100, count)
            for tables in [((9, narrow), (2, wide)), ((9, narrow),), ((2, wide), (9, []))]:
                lane.ask(pool.by_ids(*tables, dtype=dtype))
                answer = joined(lane.answer())
                assert list(answer.items()) == [(layer, expected(layer, ids)) for layer, ids in sorted(tables)]
                assert answer == joined(pool.stream(pool.by_ids(*tables, dtype=dtype)))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("count", [3, 2000])
def test_the_server_hashes_on_this_lane_too(server, pool, count):
    batch = TokenBatch.of(np.arange(count, dtype=np.int32) % 1000)
    with caller(server) as lane:
        for layers in [(), (9,)]:
            lane.ask(pool.by_tokens(batch, *layers))
            assert joined(lane.answer()) == joined(pool.stream(pool.by_tokens(batch, *layers)))


@pytest.mark.usefixtures("nothing_left")
def test_lookups_of_this_lane_are_counted(server, pool):
    before = server.scrape()
    with caller(server) as lane:
        for ids in ([1, 2], MANY):
            lane.ask(pool.by_ids((2, ids)))
            lane.answer()
        eventually(lambda: server.scrape()["engrampool_direct_connections"] == 1, "it is the only one")
    name = 'engrampool_lookup_seconds_count{method="Direct",model="small"}'
    rows = 'engrampool_lookup_rows_total{layer="2",model="small"}'
    ok = 'engrampool_direct_lookups_total{code="OK"}'

    def risen(key: str) -> float:
        return server.scrape().get(key, 0) - before.get(key, 0)

    # Counted once the answer is on its way.
    eventually(lambda: (risen(name), risen(rows), risen(ok)) == (2, 2 + len(MANY), 2), "both are counted")


@pytest.mark.usefixtures("nothing_left")
def test_several_callers_at_once_get_their_own_rows(server, pool):
    failures = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            with caller(server) as lane:
                for _ in range(10):
                    ids = rng.integers(0, 6500, rng.choice([1, 50, 9000]))
                    lane.ask(pool.by_ids((2, ids)))
                    assert joined(lane.answer()) == {2: expected(2, ids)}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- refusals


@pytest.mark.usefixtures("nothing_left")
def test_refusals_are_those_of_grpc_and_the_connection_stays_good(server, pool, packed):
    requests = [
        b"\xff",
        pool.by_ids((2, [6500])),
        pool.by_ids((3, [1])),
        pool.by_ids((2, np.zeros(20_001))),
        pool.by_ids((2, np.zeros(20_000))),
        pool.by_ids((2, [1]), model="other"),
        pool.by_ids((2, [1]), version="other"),
        pool.by_ids((2, [*MANY, 6500])),
    ]
    with caller(server) as lane:
        for request in requests:
            with pytest.raises(grpc.RpcError) as raised:
                list(pool.stream(request))
            status, metadata = raised.value.code(), dict(raised.value.trailing_metadata())
            lane.ask(request)
            assert lane.refusal() == (status.value[0], metadata["engrampool-reason"], raised.value.details())
        lane.ask(pool.by_ids((2, [5])))
        assert joined(lane.answer()) == {2: expected(2, [5])}


@pytest.mark.usefixtures("nothing_left")
def test_a_passed_deadline_is_refused_before_work(server, pool):
    request = pool.by_ids((2, [1]))
    with caller(server) as lane:
        (served,) = server.server.direct.connections
        lane.register(0, "small", pool.version, 2)
        for sent in (
            frames.request_start(0, 1, len(request)) + request,
            lookup_frame(0, 0, np.array([1], np.uint32), timeout_us=1),
        ):
            lane.socket.sendall(sent[:40])
            eventually(lambda: served.received == 40, "it has begun to come")
            lane.socket.sendall(sent[40:])
            assert lane.refusal() == (4, "deadline", "the deadline passed before work began")
        lane.ask(request)
        lane.answer()


@pytest.mark.usefixtures("nothing_left")
def test_tickets_admit_once_and_only_if_they_were_issued(server):
    where = way_in(server)
    assert where.host == ""
    assert where.valid_ms == 10_000
    with Caller(where) as first, Caller(where) as second, Caller(where) as third:
        first.hello()
        third.ticket = bytes(36)
        for other in (second, third):
            other.socket.sendall(frames.frame(frames.HELLO, other.ticket))
            assert other.refusal()[:2] == (16, "bad-ticket")
            assert other.ended()


HELLO = frames.frame(frames.HELLO, b"x" * 36)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\0\0\x01",
        frames.HEADER.pack(frames.HELLO, 0, 0, 0, 2**64 - 1),
        frames.HEADER.pack(frames.HELLO, 0, 0, 0, 65),
        frames.request_start(1, 0, 3) + b"abc",
    ],
)
def test_strangers_who_do_not_say_hello_are_told_so_and_cut_off(server, sent):
    with Caller(way_in(server)) as lane:
        lane.socket.sendall(sent)
        assert lane.refusal()[1] == "malformed-message"
        assert lane.ended()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (frames.request_start(0, 0, 0xFFFFFFF0), "too-many-rows"),
        (frames.request_start(0, 0, 2**64 - 1), "too-many-rows"),
        (frames.HEADER.pack(frames.LOOKUP, 0, 0, 0, 2**63), "too-many-rows"),
        (frames.HEADER.pack(frames.READY, 0, 0, 0, 0), "malformed-message"),
        (frames.HEADER.pack(frames.REGISTER, 0, 0, 0, 2**63), "malformed-message"),
        (frames.HEADER.pack(frames.REGISTER, 0, 0, 0, 1 << 16), "malformed-message"),
        (frames.HEADER.pack(frames.REGISTER, 0, 0, 0, 1) + b"\xff", "malformed-message"),
        (frames.register(64, "small", "", [2]), "malformed-message"),
        (frames.register(0, "small", "", []), "malformed-message"),
        (frames.register(0, "small", "", [9, 2]), "malformed-message"),
        (HELLO, "malformed-message"),
    ],
)
def test_frames_out_of_place_end_the_connection(server, sent, reason):
    with caller(server) as lane:
        lane.socket.sendall(sent)
        assert lane.refusal()[1] == reason
        assert lane.ended()


@pytest.mark.usefixtures("nothing_left")
@settings(max_examples=40)
@given(sent=st.binary(min_size=12, max_size=80))
def test_garbage_ends_in_a_refusal_or_in_silence(server, sent):
    with caller(server) as lane:
        lane.socket.sendall(sent)
        lane.socket.shutdown(socket.SHUT_WR)
        data = b""
        try:
            while got := lane.socket.recv(4096):
                data += got
        except ConnectionResetError:
            pass
        assert not data or frames.HEADER.unpack_from(data)[0] == frames.REFUSED


@pytest.mark.usefixtures("nothing_left")
def test_a_request_may_come_in_any_pieces(server, pool):
    request = pool.by_ids((2, [3, 4]))
    whole = frames.request_start(0, 0, len(request)) + request
    looked_up = lookup_frame(0, 0, np.array([3, 4], np.uint32))
    with caller(server) as lane:
        lane.register(0, "small", pool.version, 2)
        for sent in (whole, looked_up):
            for cut in [*range(1, 40, 2), *range(40, len(sent), 17)]:
                lane.socket.sendall(sent[:cut])
                lane.socket.sendall(sent[cut:])
                assert joined(lane.answer()) == {2: expected(2, [3, 4])}
        large = pool.by_ids((2, np.arange(6500)), dtype=np.uint64)
        assert len(large) > 50_000
        start = frames.request_start(0, 0, len(large))
        for byte in (start[:5], start[5:], large):
            lane.socket.sendall(byte)
        assert joined(lane.answer()) == {2: expected(2, np.arange(6500))}


@pytest.mark.usefixtures("nothing_left")
def test_requests_that_come_before_the_answer_to_the_last_are_answered_in_their_order(server, pool):
    wanted = [np.arange(count) % 6500 for count in (1, 3000, 2, 7000, 1, 5)]
    with caller(server) as lane:
        numbers = []
        for ids in wanted:
            lane.ask(pool.by_ids((2, ids)))
            numbers.append(lane.number)
        for number, ids in zip(numbers, wanted, strict=True):
            lane.number = number
            assert joined(lane.answer()) == {2: expected(2, ids)}


# --- callers and servers that leave


@pytest.mark.usefixtures("nothing_left")
def test_a_caller_who_leaves_in_mid_answer_frees_what_was_in_flight(server, pool):
    with caller(server) as lane:
        lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lane.ask(pool.by_ids((2, np.tile(np.arange(6500), 3))))
        lane.exactly(100)
        # Gone with a reset, as a killed process is.
        lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_server_that_stops_ends_the_answer_first(packed):
    with running(packed, **ROOMY, drain_s=LIMIT_S) as run, caller(run) as busy, caller(run) as idle:
        with RawPool(run.address, version_of(packed)) as pool:
            ids = np.tile(np.arange(6500), 60)
            busy.ask(pool.by_ids((2, ids)))
        assert busy.peeks()  # the answer has begun, and is more than the system keeps on the way
        stopping = threading.Thread(target=lambda: run.call(run.server.stop))
        stopping.start()
        assert idle.ended()
        rows = b"".join(wire.parse_response(m).tables[0].rows for m in busy.answer())
        assert rows == expected(2, ids)
        assert busy.ended()
        stopping.join()


def test_a_server_that_may_not_wait_cuts_answers_off(packed):
    with running(packed, **ROOMY, drain_s=0.05) as run, caller(run) as busy:
        with RawPool(run.address, version_of(packed)) as pool:
            busy.ask(pool.by_ids((2, np.tile(np.arange(6500), 60))))
        assert busy.peeks()
        run.call(run.server.stop)
        with pytest.raises((EOFError, ConnectionResetError)):
            busy.answer()


def test_a_server_without_the_lane_says_so(packed):
    with running(packed, direct="off") as run, grpc.insecure_channel(run.address) as channel:
        stub = pool_pb2_grpc.PoolStub(channel)
        assert not stub.Describe(pool_pb2.DescribeRequest(), timeout=LIMIT_S).direct
        with pytest.raises(grpc.RpcError) as raised:
            stub.OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert ("engrampool-reason", "no-direct-lane") in list(raised.value.trailing_metadata())


def test_nobody_is_let_in_while_tables_load(packed):
    with running(packed, load=False) as run, pytest.raises(grpc.RpcError) as raised:
        way_in(run)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
