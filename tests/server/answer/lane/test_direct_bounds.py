"""Callers of the direct lane that begin and do not end, do not read, or come in numbers: what each may take is bounded,
and others notice nothing.
"""

import socket
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from direct_callers import Caller, be_patient, caller, way_in
from engrampool_proto import frames, wire
from engrampool_proto.kernels import serve
from engrampool_server.answer.lane import answers, connection, connection_limits, direct
from engrampool_server.answer.lane.handles import Handles
from engrampool_server.answer.lane.resources import Resources
from engrampool_server.answer.lookups import Lookups
from engrampool_server.memory.tables import LoadedTable
from server_fixtures import RawPool, Running, eventually, expected, joined, pack, running, version_of

MIB = 1 << 20
# One peer may have 8 MiB.
LIMITS = {"max_answer_bytes": 16 * MIB, "max_in_flight_bytes": 16 * MIB}
MANY = np.tile(np.arange(6500), 9)  # 14.7 MiB: more than the system keeps on the way
PATIENCE_S = 0.2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("bounds") / "small")


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest, packed: Path) -> Iterator[Running]:
    with running(packed, event_loop=request.param, **LIMITS) as run:
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
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_patience(monkeypatch)


def lose_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of connections that are made from now on."""
    for module in (connection, answers):
        monkeypatch.setattr(module, "PATIENCE_S", PATIENCE_S)


@pytest.fixture(autouse=True)
def nothing_left(server: Running) -> Iterator[None]:
    """Whatever the test did: afterwards no bytes are in flight and no connection is open."""
    yield
    eventually(lambda: in_flight(server) == (0, 0), "nothing in flight")
    eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "no connection")


def in_flight(server: Running) -> tuple[float, int]:
    """Bytes, as Prometheus sees them and as they are."""
    return server.scrape()["engrampool_in_flight_bytes"], server.server.lookups.in_flight.total


def cut(server: Running, reason: str) -> float:
    return server.scrape().get(f'engrampool_direct_cut_total{{reason="{reason}"}}', 0)


def still_good(lane: Caller, pool: RawPool) -> None:
    lane.ask(pool.by_ids((2, [5])))
    assert joined(lane.answer()) == {2: expected(2, [5])}


# --- requests that begin


@pytest.mark.parametrize(
    ("nbytes", "sent", "counted"),
    [
        (100, -31, 0),
        (100, 1, 0),
        (100, 99, 0),
        (MIB // 2, 70_000, MIB // 2 + 32),
        (6 * MIB, 70_000, MIB),
        (6 * MIB, 2 * MIB, 4 * MIB),
    ],
)
@pytest.mark.parametrize("kind", [frames.LOOKUP, frames.REQUEST])
def test_a_request_that_does_not_end_is_counted_and_cut_off(server, pool, monkeypatch, kind, nbytes, sent, counted):
    before = cut(server, "slow-request")
    start = frames.HEADER.pack(kind, 0, 1, 0, nbytes)
    begun = (start + bytes(nbytes))[: len(start) + sent]
    with caller(server) as other:
        with caller(server) as lane:
            lane.socket.sendall(begun)
            eventually(lambda: in_flight(server) == (counted, counted), "what it may bring is counted")
            still_good(other, pool)
        eventually(lambda: in_flight(server) == (0, 0), "it is given back when it leaves")
        lose_patience(monkeypatch)
        with caller(server) as lane:
            lane.socket.sendall(begun)
            assert lane.ended()
            eventually(lambda: in_flight(server) == (0, 0), "it is given back when it is cut off")
        still_good(other, pool)
    assert cut(server, "slow-request") == before + 1


@pytest.mark.usefixtures("impatient")
def test_a_request_that_trickles_is_cut_off(server):
    before = cut(server, "slow-request")
    with caller(server) as lane:
        lane.socket.sendall(frames.request_start(1, 0, 10_000_000))
        lane.socket.settimeout(PATIENCE_S / 10)
        while cut(server, "slow-request") == before:
            try:
                lane.socket.sendall(b"x")
                if not lane.socket.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        eventually(lambda: cut(server, "slow-request") == before + 1, "cut off")


def test_a_request_that_goes_on_may_take_its_time(server, pool, monkeypatch):
    request = pool.by_ids((2, np.tile(np.arange(6500), 4)), dtype=np.uint64)
    whole = frames.request_start(0, 0, len(request)) + request
    monkeypatch.setattr(connection, "PATIENCE_S", 0.01)
    monkeypatch.setattr(connection, "PROGRESS_BYTES", 0)  # however little comes, it goes on
    with caller(server) as lane:
        (served,) = server.server.direct.connections
        for stop in (100_000, 150_000):
            lane.socket.sendall(whole[served.received : stop])
            eventually(lambda stop=stop: served.received == stop, "so much has come")
            time.sleep(0.05)  # the caller's own pause
        lane.socket.sendall(whole[150_000:])
        assert joined(lane.answer()) == {2: expected(2, np.tile(np.arange(6500), 4))}
        time.sleep(0.05)  # and between two requests it may be silent for as long as it likes
        still_good(lane, pool)


def test_a_request_that_goes_on_is_not_cut_off_as_it_is_given_more_room(server, pool, monkeypatch):
    request = pool.by_ids((2, np.tile(np.arange(6500), 4)))
    whole = frames.request_start(0, 0, len(request)) + request
    monkeypatch.setattr(connection, "PROGRESS_BYTES", 1)
    with caller(server) as lane:
        (served,) = server.server.direct.connections
        for start, stop in ((0, 60_000), (60_000, 61_000)):
            lane.socket.sendall(whole[start:stop])
            eventually(lambda stop=stop: served.received == stop, "so much has come")
        # As if its time had come since: at its next byte it is looked at, and goes on.
        served._state[[serve.ARRIVED, serve.DUE]] -= round(1.1 * connection.PATIENCE_S * 1e9)
        lane.socket.sendall(whole[61_000:61_001])
        eventually(lambda: served._state[serve.DUE] > time.monotonic_ns(), "it goes on")
        lane.socket.sendall(whole[61_001 : 64 << 10])
        eventually(lambda: in_flight(server)[1] == frames.padded(len(whole)), "there is more room")
        time.sleep(0.1)  # the caller's own pause
        lane.socket.sendall(whole[64 << 10 :])
        assert joined(lane.answer()) == {2: expected(2, np.tile(np.arange(6500), 4))}


def test_the_time_of_a_request_does_not_begin_with_the_one_before_it(server, pool):
    # The first one's last bytes and the next one's first come in one word.
    first, second = pool.by_ids((2, MANY)), pool.by_ids((2, [5]))
    first += bytes([0x78, 0]) * (not len(first) % 8)  # a field that nobody knows
    with caller(server) as lane:
        starts = frames.request_start(0, 0, len(first)), frames.request_start(1, 0, len(second))
        lane.socket.sendall(starts[0] + first + starts[1] + second)
        time.sleep(0.5)  # the caller's own pause, in which the first answer does not end
        begin = time.monotonic_ns()
        assert joined(lane.answer()) == {2: expected(2, MANY)}
        lane.number = 1
        answer = lane.answer()
        assert wire.parse_response(answer[-1]).times.total_us * 1000 <= time.monotonic_ns() - begin
        assert joined(answer) == {2: expected(2, [5])}


def test_who_leaves_with_a_request_for_which_there_was_no_room_was_not_slow(server):
    before = cut(server, "slow-request")
    start, held = frames.request_start(0, 0, 7 * MIB), 3 * MIB + 32
    with caller(server) as first:
        first.socket.sendall(frames.request_start(0, 0, 3 * MIB) + bytes(3 * MIB - 1))
        eventually(lambda: in_flight(server)[1] == held, "all of it is counted")
        with caller(server) as second:
            second.socket.sendall(start + bytes(2 * MIB))
            eventually(lambda: in_flight(server)[1] == held + 4 * MIB, "what it may bring is counted")
            second.socket.sendall(bytes(3 * MIB))
            eventually(lambda: in_flight(server)[1] == held, "there is no room for it")
        eventually(lambda: server.scrape()["engrampool_direct_connections"] == 1, "it has left")
    assert cut(server, "slow-request") == before


def test_a_request_for_which_there_is_no_room_is_refused_and_the_next_one_is_not(server, pool):

    def but_one(nbytes: int) -> bytes:
        return frames.request_start(0, 0, nbytes) + bytes(nbytes - 1)

    with caller(server) as first, caller(server) as second, caller(server, "127.0.0.2") as other:
        first.socket.sendall(but_one(3 * MIB))
        eventually(lambda: in_flight(server)[1] == 3 * MIB + 32, "all of it is counted")
        second.socket.sendall(but_one(7 * MIB) + b"x")
        code, reason, text = second.refusal()
        assert (code, reason) == (8, "peer-share")
        assert "for 127.0.0.1" in text
        still_good(second, pool)
        # Others have room for as much.
        other.socket.sendall(but_one(6 * MIB) + b"x")
        assert other.refusal()[1] == "malformed-message"
        still_good(other, pool)


def test_a_hello_that_does_not_end_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(connection, "HELLO_S", PATIENCE_S)
    before = cut(server, "no-hello")
    with Caller(way_in(server)) as silent, Caller(way_in(server)) as half:
        half.socket.sendall(frames.frame(frames.HELLO, half.ticket)[:-1])
        assert silent.ended()
        assert half.ended()
    assert cut(server, "no-hello") == before + 2


def test_who_goes_on_sending_after_a_refusal_for_good_is_not_listened_to_for_long(server, monkeypatch):
    monkeypatch.setattr(connection, "_LINGER_S", PATIENCE_S)
    with caller(server) as lane:
        # Of whoever sends without a pause there is more each time.
        monkeypatch.setattr(connection, "receive_into", lambda _, buffer, start, stop, *more: stop - start)
        lane.socket.sendall(frames.frame(99))
        assert lane.refusal()[1] == "malformed-message"
        eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "closed")


# --- answers that are not read


@pytest.mark.parametrize("timeout_us", [0, 10**12, 2**64 - 1])
def test_who_reads_nothing_holds_little_and_is_cut_off(server, pool, monkeypatch, timeout_us):
    before = cut(server, "unread-answer")
    with caller(server, "127.0.0.2") as other:
        with caller(server) as lane:
            lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lane.ask(pool.by_ids((2, MANY)), timeout_us)
            lane.exactly(100)
            assert in_flight(server)[1] <= 5 * MIB  # of 14.7: two pieces, and the request
            other.ask(pool.by_ids((2, MANY[::-1])))
            assert joined(other.answer()) == {2: expected(2, MANY[::-1])}
        lose_patience(monkeypatch)
        monkeypatch.setattr(connection, "PROGRESS_BYTES", 0)  # but for its request, of several parts
        while cut(server, "unread-answer") == before:
            so_far = cut(server, "slow-request")
            with caller(server) as lane:
                lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                # On a machine that is busy this thread may pause in the midst of a request, which is asked again then.
                with suppress(ConnectionError):
                    lane.ask(pool.by_ids((2, MANY)), timeout_us)
                eventually(lambda: server.scrape()["engrampool_direct_connections"] == 1, "cut off")
                eventually(lambda: in_flight(server) == (0, 0), "nothing is in flight")
            eventually(
                lambda total=before + so_far: cut(server, "unread-answer") + cut(server, "slow-request") > total,
                "counted",
            )
        assert cut(server, "unread-answer") == before + 1
        still_good(other, pool)


def test_who_never_reads_is_cut_off_at_its_deadline(server, pool):
    code = 'engrampool_direct_lookups_total{code="CANCELLED"}'
    before = server.scrape().get(code, 0)
    with caller(server) as lane:
        lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lane.ask(pool.by_ids((2, MANY)), timeout_us=1_000_000)
        while lane.is_refused():  # of a machine that is busy: its time was over before work began
            assert lane.refusal()[1] == "deadline"
            lane.ask(pool.by_ids((2, MANY)), timeout_us=1_000_000)
        eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "cut off")
        eventually(lambda: server.scrape().get(code, 0) == before + 1, "it is counted")


def test_who_only_asks_and_never_reads_refusals_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(answers, "PATIENCE_S", PATIENCE_S)  # of whoever sends requests there is no end
    keep_alive = direct.keep_alive

    def holds_little(accepted: socket.socket) -> None:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
        keep_alive(accepted)

    monkeypatch.setattr(direct, "keep_alive", holds_little)
    before = cut(server, "unread-answer")
    with caller(server) as lane:
        lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):
            while cut(server, "unread-answer") == before:
                lane.socket.sendall(2000 * (frames.request_start(0, 0, 1) + b"\xff"))
        eventually(lambda: cut(server, "unread-answer") == before + 1, "cut off")


@pytest.mark.usefixtures("impatient")
def test_who_shuts_its_half_and_reads_nothing_is_cut_off(server, pool, monkeypatch):
    monkeypatch.setattr(connection, "PROGRESS_BYTES", 0)  # its request, of several parts, may take its time
    with caller(server) as lane:
        lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lane.ask(pool.by_ids((2, MANY)))
        lane.exactly(100)
        with suppress(OSError):  # cut off already
            lane.socket.shutdown(socket.SHUT_WR)
        eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "cut off")


# --- connections


def test_strangers_stand_in_the_way_of_their_own_peer_only(server, pool, monkeypatch):
    monkeypatch.setattr(connection_limits, "STRANGERS", 4)
    monkeypatch.setattr(connection_limits, "GRACE_S", 600.0)
    monkeypatch.setattr(connection, "HELLO_S", 600.0)
    where, elsewhere = way_in(server), way_in(server)
    with Caller(where) as mine, Caller(elsewhere, "127.0.0.2") as other:
        eventually(lambda: server.scrape()["engrampool_direct_connections"] == 2, "both have come")
        strangers = [Caller(where) for _ in range(8)]
        told = [stranger.refusal()[1] for stranger in strangers[3:]]
        assert told == ["too-many-connections"] * 5
        still_good(mine.hello(), pool)
        # Those that had their time go for those that come.
        monkeypatch.setattr(connection_limits, "GRACE_S", 0.0)
        before = cut(server, "stranger")
        late = [Caller(where) for _ in range(5)]
        assert all(stranger.ended() for stranger in strangers[:3])
        still_good(other.hello(), pool)
        still_good(mine, pool)
        eventually(lambda: cut(server, "stranger") == before + 4, "they are counted")
        for one in (*strangers, *late):
            one.socket.close()


def test_a_peer_may_open_no_more_connections_than_it_leaves_free(server, pool, monkeypatch):
    monkeypatch.setattr(server.server.direct.connections, "most", 8)
    let_in = [Caller(way_in(server)).hello() for _ in range(4)]
    with Caller(way_in(server)) as more:
        assert more.refusal()[:2] == (8, "too-many-connections")
        assert more.ended()
    with caller(server, "127.0.0.2") as other:
        still_good(other, pool)
        for lane in let_in:
            still_good(lane, pool)
            lane.socket.close()
    assert server.scrape()['engrampool_refused_total{reason="too-many-connections"}'] > 0


def test_who_vanishes_at_any_point_leaves_nothing(server, pool):
    request = pool.by_ids((2, np.arange(6500)))
    steps: list[Callable[[Caller], None]] = [
        lambda lane: None,
        lambda lane: lane.socket.sendall(frames.frame(frames.HELLO, lane.ticket)[:20]),
        lambda lane: lane.socket.sendall(frames.frame(frames.HELLO, lane.ticket)),
        lambda lane: lane.hello().socket.sendall(frames.request_start(0, 0, 2 * MIB) + bytes(MIB)),
        lambda lane: lane.hello().socket.sendall(frames.request_start(0, 0, len(request)) + request),
        lambda lane: lane.hello().ask(pool.by_ids((2, MANY))),
    ]
    for step in steps:
        for half in (False, True):
            with Caller(way_in(server)) as lane:
                step(lane)
                if half:
                    lane.socket.shutdown(socket.SHUT_WR)


def test_the_memory_of_a_large_answer_goes_with_it(server, pool, monkeypatch):
    take, taken = Resources.take_buffer, []

    def noted(resources: Resources, nbytes: int) -> np.ndarray:
        buffer = take(resources, nbytes)
        taken.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(Resources, "take_buffer", noted)
    with caller(server) as lane:
        for _ in range(2):
            lane.ask(pool.by_ids((2, MANY)))
            assert joined(lane.answer()) == {2: expected(2, MANY)}
        still_good(lane, pool)
        assert len(taken) >= 2
        eventually(lambda: all(buffer() is None for buffer in taken), "all of it is free")


# --- what goes wrong here


def _no_memory(*_: object) -> Any:
    raise MemoryError


BROKEN = {
    "message-check": (Lookups, "check"),
    "message-resolve": (LoadedTable, "check"),
    "message-buffer": (Resources, "take_buffer"),
    "message-gather": (LoadedTable, "gather"),
    "handle-register": (Handles, "register"),
    "handle-request": (Handles, "request"),
}


@pytest.mark.parametrize("ids", [[1, 2], MANY], ids=["small", "large"])
@pytest.mark.parametrize("where", BROKEN)
def test_what_goes_wrong_ends_one_connection_and_gives_its_bytes_back(server, pool, monkeypatch, where, ids):
    before = cut(server, "failed")
    with caller(server) as lane, caller(server) as other:
        still_good(lane, pool)
        with monkeypatch.context() as broken:
            broken.setattr(Caller, "by_handle", where.startswith("handle"))
            broken.setattr(*BROKEN[where], _no_memory)
            # By the last, rows that are not there are asked for, which the loop leaves to Python.
            lane.ask(pool.by_ids((2, [*ids, 6500] if where == "handle-request" else ids)))
            assert lane.ended()
        eventually(lambda: in_flight(server) == (0, 0), "nothing is in flight")
        still_good(other, pool)
    assert cut(server, "failed") == before + 1
