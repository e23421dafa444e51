"""The client's side of the direct lane: against a real server, and against peers that say what no server says."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certificates import Authority
from direct_peers import NUMBER, SERVED, TIMES, Frame, Tls, exchange, numbered, peer, rows_frame, whole_answer
from engrampool_client import BatchError, Client, DeadlineError, PoolError, ProtocolError, RejectedError
from engrampool_client.config import ClientConfig
from engrampool_client.errors import OverloadedError, StepCancelledError
from engrampool_client.lanes import connection as lane
from engrampool_client.lanes import dial, native
from engrampool_client.lanes.compiled import CompiledConnection
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto import frames, wire
from engrampool_proto.kernels import receive
from engrampool_proto.v1 import pool_pb2
from engrampool_server.config import ServerConfig
from exchanges import exchange_of
from server_fixtures import LIMIT_S, Running, eventually, expected, pack, running

# Row ids of a lookup that is no small one, for these have a way of their own.
LARGE = np.ones(128, np.int64)

pytestmark = pytest.mark.usefixtures("patient")
MIB = 1 << 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("direct") / "small")


@pytest.fixture(scope="module")
def server(packed: Path, compiled: None) -> Iterator[Running]:
    with running(packed, stream_chunk_bytes=64 << 10) as run:
        yield run


def answered(server: Running, method: str) -> float:
    return server.scrape().get(f'engrampool_lookup_seconds_count{{method="{method}",model="small"}}', 0)


def answered_so_far(server: Running, method: str) -> float:
    """As `answered`, once all is counted that was asked before: that may be a little later than its answer."""

    def idle() -> bool:
        found = server.scrape()
        return not found["engrampool_direct_connections"] and not found["engrampool_in_flight_bytes"]

    eventually(idle, "nobody asks")
    return answered(server, method)


@pytest.fixture(
    scope="module",
    params=[("off", False), ("on", False), ("on", True)],
    ids=["by Python", "by kernels", "inside TLS"],
    autouse=True,
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Answers are received by Python, and by kernels, and by these inside TLS, beside gRPC inside TLS."""
    kernels, secured = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ClientConfig.__init__.__kwdefaults__, "compiled", kernels)
        if kernels == "on":
            patch.setitem(peer.__wrapped__.__kwdefaults__, "kind", CompiledConnection)
        if secured:
            tls = Tls(Authority(tmp_path_factory.mktemp("authority")))
            patch.setitem(peer.__wrapped__.__kwdefaults__, "tls", tls)
            patch.setitem(ClientConfig.__init__.__kwdefaults__, "tls_ca", str(tls.ca))
            for name, file in tls.settings.items():
                patch.setitem(ServerConfig.__init__.__kwdefaults__, name, str(file))
        yield


class Held:
    """Has the receiving of large rows stand still once the first of them came, until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.go_on = threading.Event(), threading.Event()
        received, take = lane.Connection._received, receive.take

        def held(connection: lane.Connection, places: list[memoryview], deadline: float, flags: int = 0) -> int:
            if self.came.is_set() or sum(map(len, places)) < MIB:
                return received(connection, places, deadline, flags)
            count = received(connection, [places[0][:100_000]], deadline, flags)
            self.came.set()
            assert self.go_on.wait(LIMIT_S)
            return count

        def held_without_python(fd: int, buffer: Any, state: Any, layers: Any, number: Any, *until: int) -> int:
            if self.came.is_set() or layers[:, receive.BYTES].sum() < MIB:
                return take(fd, buffer, state, layers, number, *until)
            while not layers[0, receive.HAVE]:
                got = take(fd, buffer, state, layers, number, 0, 0)
            self.came.set()
            assert self.go_on.wait(LIMIT_S)
            return got

        monkeypatch.setattr(lane.Connection, "_received", held)
        monkeypatch.setattr(receive, "take", held_without_python)


# --- a real server


@pytest.mark.parametrize("count", [0, 1, 24, 1500, 20_000])
@pytest.mark.parametrize("given_out", [False, True])
def test_rows_are_those_of_grpc_wherever_they_are_to_lie(server, count, given_out):
    rng = np.random.default_rng(count)
    ids = {2: rng.integers(0, 6500, (count, 2)), 9: rng.integers(0, 4100, count)}
    out = {2: np.zeros((count, 2, 264), np.uint8), 9: np.zeros((count, 42), np.uint8)} if given_out else None
    before = answered_so_far(server, "Direct")
    with Client(server.address) as client, Client(server.address, direct="off") as grpc_only:
        step = client.prefetch_rows(ids, out=out)
        step.wait(LIMIT_S)
        for layer, wanted in grpc_only.lookup_rows(ids).items():
            rows = step.rows(layer)
            assert rows.tobytes() == wanted.tobytes() == expected(layer, ids[layer].reshape(-1))
            assert rows.shape == wanted.shape
            if out is not None:
                assert rows is out[layer]
        assert step.times is not None
        with pytest.raises(BatchError):
            client.lookup_rows({2: np.array([6500])})
    eventually(lambda: answered(server, "Direct") == before + 1, "one lookup on the lane")


@pytest.mark.parametrize("hashing", ["local", "server"])
def test_tokens_too(server, hashing):
    tokens = np.arange(900, dtype=np.int32)
    with Client(server.address, hashing=hashing) as client, Client(server.address, direct="off") as grpc_only:
        wanted = grpc_only.lookup(tokens)
        assert all(np.array_equal(rows, wanted[layer]) for layer, rows in client.lookup(tokens).items())


def test_a_refusal_is_raised_and_the_lane_stays_good(server):
    before = answered_so_far(server, "Direct")
    with Client(server.address) as client:
        object.__setattr__(client.served, "version", "another")
        with pytest.raises(PoolError) as raised:
            client.lookup_rows({2: np.array([1])})
        assert (type(raised.value).__name__, raised.value.reason) == ("UnknownVersionError", "unknown-version")
        object.__setattr__(client.served, "version", server_version(server))
        client.lookup_rows({2: np.array([1])})
    eventually(lambda: answered(server, "Direct") == before + 1, "on the lane again")


def server_version(server: Running) -> str:
    with Client(server.address, direct="off") as client:
        return client.version


def test_threads_have_connections_of_their_own(server):
    before = answered_so_far(server, "Direct")
    wanted = {seed: np.random.default_rng(seed).integers(0, 6500, 3000) for seed in range(3)}
    with Client(server.address) as client:

        def work(seed: int) -> None:
            for _ in range(20):
                assert client.lookup_rows({2: wanted[seed]})[2].tobytes() == expected(2, wanted[seed])

        threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # While one more connection was being opened, lookups went over gRPC.
        eventually(lambda: answered(server, "Direct") > before, "some went by the lane")
        assert server.scrape()["engrampool_direct_connections"] >= 1
    eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "closed")


def test_over_a_unix_socket(packed, tmp_path):
    with running(packed, direct=f"unix:{tmp_path / 'lane'}") as run, Client(run.address) as client:
        ids = np.arange(6000)
        assert client.lookup_rows({2: ids})[2].tobytes() == expected(2, ids)
        eventually(lambda: answered(run, "Direct") == 1, "on the lane")
    assert not (tmp_path / "lane").exists()


def test_where_either_side_has_it_off_lookups_go_over_grpc(server, packed):
    with running(packed, direct="off") as run, Client(run.address) as client:
        client.lookup_rows({2: np.array([1])})
        eventually(lambda: answered(run, "Lookup") == 1, "over gRPC")
    with pytest.raises(ValueError, match="direct must be 'auto' or 'off', not 'on'"):
        Client(server.address, direct="on")


def test_a_lane_that_cannot_be_entered_costs_nothing_but_a_moment(packed, monkeypatch):
    for module in (dial, lane):
        monkeypatch.setattr(module, "OPEN_TIMEOUT_S", 0.2)
    connect, tries = NativeLane._connect, []

    def tried(made: NativeLane) -> None:
        tries.append(threading.current_thread())
        connect(made)

    monkeypatch.setattr(NativeLane, "_connect", tried)
    with running(packed) as run:
        admission = run.server.shared.admission
        admission.port = 1  # nobody listens there
        with Client(run.address) as client:
            assert client.lookup_rows({2: np.array([1])})[2].tobytes() == expected(2, [1])
        with socket.create_server(("127.0.0.1", 0)) as silent:
            admission.port = silent.getsockname()[1]
            tries.clear()
            with Client(run.address) as client:
                for _ in range(5):
                    client.lookup_rows({2: np.array([1])})
            assert tries.count(threading.current_thread()) == 1  # as it was made: no lookup waits for another try
        eventually(lambda: answered(run, "Lookup") == 6, "over gRPC")
        assert answered(run, "Direct") == 0


def test_a_connection_that_breaks_is_replaced(packed):
    with running(packed) as run, Client(run.address) as client:
        client.lookup_rows({2: np.array([1])})
        for connection in list(run.server.direct.connections):
            run._loop.call_soon_threadsafe(connection.abort)
        eventually(lambda: not run.server.direct.connections, "aborted")
        assert client.lookup_rows({2: np.array([2])})[2].tobytes() == expected(2, [2])
        eventually(lambda: answered(run, "Lookup") == 1, "over gRPC")

        def on_the_lane() -> bool:
            client.lookup_rows({2: np.array([3])})
            return answered(run, "Direct") >= 3

        eventually(on_the_lane, "on the lane again")


def test_in_mid_answer_too_and_the_rows_are_right(packed, monkeypatch):
    ids, held = np.tile(np.arange(6500), 40), Held(monkeypatch)
    with running(packed) as run, Client(run.address, connections=1) as client:
        out = np.zeros((len(ids), 264), np.uint8)
        step = client.prefetch_rows({2: ids}, out={2: out}, timeout_s=2 * LIMIT_S)
        assert held.came.wait(LIMIT_S)
        (connection,) = run.server.direct.connections
        connection.abort()
        eventually(lambda: connection not in run.server.direct.connections, "aborted")
        held.go_on.set()
        step.wait()
        assert out.tobytes() == expected(2, ids)


def test_a_cancelled_step_writes_nothing_any_more(packed, monkeypatch):
    ids, receiving = np.tile(np.arange(6500), 40), Held(monkeypatch)
    with running(packed) as run, Client(run.address, connections=1) as client:
        out = np.zeros((len(ids), 264), np.uint8)
        step = client.prefetch_rows({2: ids}, out={2: out}, timeout_s=2 * LIMIT_S)
        assert receiving.came.wait(LIMIT_S)
        assert out[0].any()
        step.delivery.on_cancel(receiving.go_on.set)
        step.cancel()
        held = out.copy()
        with pytest.raises(StepCancelledError):
            step.rows(2)
        assert client.lookup_rows({2: np.array([7])})[2].tobytes() == expected(2, [7])
        assert np.array_equal(out, held)
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "the server stopped, too")


# --- peers that are no server of ours


def ask(made: NativeLane, exchange: Exchange, timeout_s: float = LIMIT_S, spin_s: float = 0.0) -> bool:
    request = made.ask(exchange, time.monotonic() + timeout_s, spin_s=spin_s)
    return request is not None and request.receive()


@given(
    count=st.sampled_from([1, 20, 3000, 30_000]),
    cuts=st.sets(st.integers(1, 30_000), max_size=5),
    splits=st.sets(st.integers(1, 200_000), max_size=6),
    out=st.booleans(),
    spin_s=st.sampled_from([0.0, 1e-3]),
)
def test_an_answer_may_come_in_any_pieces(count, cuts, splits, out, spin_s):
    wanted, sent = whole_answer(count, cuts)
    bounds = sorted({0, len(sent)} | {split for split in splits if split < len(sent)})

    def reply(connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer = numbered(sent, number)
        for start, stop in pairwise(bounds):
            connection.sendall(answer[start:stop])

    with peer(reply) as made:
        taken = exchange(count, out)
        assert ask(made, taken, spin_s=spin_s)
        assert taken.times == TIMES
        assert {layer: taken.delivery.rows[layer].tobytes() for layer in (2, 9)} == wanted


def test_an_answer_may_be_split_at_every_byte():
    wanted, sent = whole_answer(5, {2})

    def reply(cut: int) -> Callable[[socket.socket, int], None]:
        def send(connection: socket.socket, number: int) -> None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answer = numbered(sent, number)
            connection.sendall(answer[:cut])
            connection.sendall(answer[cut:])

        return send

    with peer(*map(reply, range(1, len(sent)))) as made:
        for cut in range(1, len(sent)):
            taken = exchange(5)
            assert ask(made, taken, spin_s=cut % 2 * 1e-3)
            assert {layer: taken.delivery.rows[layer].tobytes() for layer in (2, 9)} == wanted


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (frames.HEADER.pack(frames.ROWS, 2, NUMBER, 0, 2**63), "do not follow"),
        (frames.HEADER.pack(frames.REFUSED, 0, NUMBER, 0, 9000), "has 9000 bytes"),
        (frames.frame(77, number=NUMBER), "kind 77"),
        (frames.frame(frames.READY, number=NUMBER), "kind 16"),
        (frames.HEADER.pack(frames.END, 0, NUMBER, 0, 9000), "kind 18 and 9000 bytes"),
        (frames.frame(frames.END, number=NUMBER), "kind 18 and 0 bytes"),
        (frames.end(NUMBER, TIMES), "rows of layer 2"),
        (rows_frame(3, 0, b"abc"), "layer 3, which was not asked for"),
        (rows_frame(2, 1, b"abc"), "do not follow"),
        (rows_frame(2, 0, b"abc" * 6), "do not follow"),
        (frames.frame(frames.REFUSED, b"\xff", NUMBER), "a refusal cannot be read"),
        (frames.frame(frames.REFUSED, b"\xff"), "a refusal cannot be read"),
        (frames.frame(frames.REFUSED, b"", NUMBER + 1), "another request"),
        (frames.end(0, TIMES), "another request"),
    ],
)
def test_what_no_server_says_is_a_protocol_error(sent, text):
    with peer(sent) as made:
        with pytest.raises(ProtocolError, match=text):
            ask(made, exchange(5))
        assert not ask(made, exchange(5))  # the connection is gone


@pytest.mark.parametrize("count", [1, 50, 60_000])  # short answers and a long one
@pytest.mark.parametrize("right", [0, 1, 2])  # frames before the first with another number
@pytest.mark.parametrize("at_once", [True, False])
def test_rows_of_another_request_are_never_taken(count, right, at_once):
    wanted, sent = whole_answer(count, set())
    cut = right * (frames.HEADER.size + 3 * count)

    def reply(connection: socket.socket, number: int) -> None:
        pieces = numbered(sent[:cut], number), numbered(sent[cut:], number + 1)
        for piece in [b"".join(pieces)] if at_once else pieces:
            connection.sendall(piece)

    with peer(reply) as made:
        taken = exchange(count, out=True)
        out = {layer: taken.landing.array(layer) for layer in (2, 9)}
        with pytest.raises(ProtocolError, match="another request"):
            ask(made, taken)
        assert not made.open
        taken.delivery.end(None)
        for layer in (2, 9)[right:]:
            assert not out[layer].any()
            assert layer not in taken.delivery.rows
        assert all(taken.delivery.rows[layer].tobytes() == wanted[layer] for layer in taken.delivery.rows)


def test_a_refusal_of_everything_is_one_of_what_is_under_way_and_ends_the_connection():
    refusal = pool_pb2.Refusal(code=8, reason="too-many-connections", text="one too many").SerializeToString()
    with peer(frames.frame(frames.REFUSED, refusal)) as made:
        with pytest.raises(OverloadedError, match="one too many"):
            ask(made, exchange(5))
        assert not made.open


def ids_of(body: bytes, layers: int, dtype: type) -> list[list[int]]:
    """The ids of a LOOKUP, by layer; nothing is left over."""
    counts, at, found = np.frombuffer(body, "<u8", layers), 8 * layers, []
    for count in counts.tolist():
        ids = np.frombuffer(body, dtype, count, at)
        padding = -ids.nbytes % 8
        at += ids.nbytes + padding
        assert body[at - padding : at] == bytes(padding)
        found.append(ids.tolist())
    assert at == len(body)
    return found


@pytest.mark.parametrize("count", [0, 1, 3, 24, 300_000])  # the last more than the system takes at once
@pytest.mark.parametrize("wide", [False, True])
def test_ids_go_as_they_lie_in_memory(count, wide):
    asked = np.random.default_rng(count).integers(0, 50, (2, count)).astype(np.uint64 if wide else np.uint32)
    asked[1].flags.writeable = False  # as those of a caller's may be
    ids = {2: asked[0], 9: asked[1, ::-1]}
    came: list[Frame] = []
    wanted, sent = whole_answer(count, set())
    with peer(sent, came=came) as made:
        taken = exchange(count)
        taken = Exchange.of_ids(SERVED, ids, taken.landing)
        assert ask(made, taken)
        assert {layer: taken.delivery.rows[layer].tobytes() for layer in (2, 9)} == wanted
    (registered, lookup) = came
    assert registered[:4] == (frames.REGISTER, 0, 0, 0)
    named = wire.parse_request(registered[4])
    assert (named.model, named.version, named.layers, named.tables) == ("m", "v", (2, 9), ())
    assert lookup[0] == frames.LOOKUP
    assert 0 < lookup[3] <= LIMIT_S * 1e6
    assert ids_of(lookup[4], 2, asked.dtype) == [ids[2].tolist(), ids[9].tolist()]


def test_what_is_asked_for_is_registered_once_and_the_oldest_gives_way():
    refusal = frames.frame(frames.REFUSED, pool_pb2.Refusal(code=3, text="no").SerializeToString(), NUMBER)
    versions = [*range(frames.MAX_HANDLES), 0, frames.MAX_HANDLES, 1, 0]
    came: list[Frame] = []
    with peer(*[refusal] * len(versions), came=came) as made:
        for version in versions:
            served = replace(SERVED, version=f"v{version}")
            with pytest.raises(RejectedError):
                ask(made, exchange_of(served, {2: [1], 9: [2]}))
    registered = [
        (which, wire.parse_request(body).version) for kind, which, *_, body in came if kind == frames.REGISTER
    ]
    first = [(handle, f"v{handle}") for handle in range(frames.MAX_HANDLES)]
    assert registered == [*first, (0, "v64"), (1, "v0")]
    asked = [(which, number) for kind, which, number, *_ in came if kind == frames.LOOKUP]
    assert [which for which, _ in asked] == [*range(frames.MAX_HANDLES), 0, 0, 1, 1]
    numbers = {number for _, number in asked}
    assert len(numbers) == len(asked)
    assert 0 not in numbers


def test_a_broken_answer_goes_on_over_grpc_with_what_is_missing():
    wanted, sent = whole_answer(5, set())
    end_of_layer_2 = frames.HEADER.size + 15
    for cut in (0, 1, 20, 40, end_of_layer_2 - 1):
        with peer(sent[:cut] or (lambda *_: None)) as made:
            taken = exchange(5)
            assert not ask(made, taken)
            assert taken.answer_bytes == 30
    with peer(sent[: end_of_layer_2 + 5]) as made:
        taken = exchange(5)
        assert not ask(made, taken)
        assert taken.answer_bytes == 15
        assert taken.delivery.rows[2].tobytes() == wanted[2]
    with peer(sent[:-1]) as made:
        taken = exchange(5)
        assert ask(made, taken)  # only the end was lost
        assert {layer: taken.delivery.rows[layer].tobytes() for layer in (2, 9)} == wanted


def test_a_refusal_is_typed_and_the_connection_is_used_again():
    refusal = pool_pb2.Refusal(code=3, reason="too-many-rows", text="split it").SerializeToString()
    _, sent = whole_answer(5, set())
    with peer(frames.frame(frames.REFUSED, refusal, NUMBER), sent) as made:
        with pytest.raises(RejectedError, match="split it") as raised:
            ask(made, exchange(5))
        assert raised.value.reason == "too-many-rows"
        assert ask(made, exchange(5))


def sent_at(begin: float, made: NativeLane, timeout_s: float, spin_s: float = 0.0) -> native.NativeRequest:
    """A request that has so long from `begin` on: the clock stands still until it is sent."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (native, lane):
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: begin))
        return made.ask(exchange(3000), begin + timeout_s, spin_s=spin_s)


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_a_peer_that_falls_silent_is_waited_for_until_the_deadline(cut):
    _, sent = whole_answer(3000, set())
    with peer(sent[:cut] or (lambda *_: None), b"") as made:
        begin = time.monotonic()
        request = sent_at(begin, made, 0.2, spin_s=1e-3)
        with pytest.raises(DeadlineError):
            request.receive()
        assert 0.19 < time.monotonic() - begin < LIMIT_S


def drips(connection: socket.socket, number: int) -> None:
    """Sends an answer byte by byte, until nobody wants it."""
    _, sent = whole_answer(3000, set())
    for at in range(len(sent)):
        connection.sendall(numbered(sent, number)[at : at + 1])
        time.sleep(0.01)


def says_nothing(connection: socket.socket, number: int) -> None:
    """Sends frames of no rows, until nobody wants them."""
    while True:
        connection.sendall(numbered(rows_frame(2, 0, b""), number) * 1000)


@pytest.mark.parametrize("says", [drips, says_nothing])
def test_a_peer_that_is_never_silent_and_never_done_has_until_the_deadline(says):
    def until_it_is_cut_off(connection: socket.socket, number: int) -> None:
        connection.settimeout(LIMIT_S)
        with suppress(ConnectionError):
            says(connection, number)

    with peer(until_it_is_cut_off) as made:
        begin = time.monotonic()
        request = sent_at(begin, made, 1.0)
        with pytest.raises(DeadlineError):
            request.receive()
        assert time.monotonic() - begin < LIMIT_S
        assert not made.open


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_a_peer_that_is_silent_for_too_long_is_left_for_grpc_before_the_deadline(cut, monkeypatch):
    monkeypatch.setattr(lane, "_SILENCE_S", 0.2)
    monkeypatch.setattr(native, "_FIRST_PAUSE_S", LIMIT_S)
    _, sent = whole_answer(3000, set())
    with peer(sent[:cut] or (lambda *_: None), b"") as made:
        assert ask(made, exchange(3000), timeout_s=3600, spin_s=1e-3) is False
        assert not made.open


def test_a_lane_that_lets_in_and_does_not_answer_is_tried_less_and_less_often(packed, monkeypatch):
    """As through a proxy that passes on how a connection begins, and nothing after."""
    # Far longer than this takes, and as many times longer each as without that.
    monkeypatch.setattr(native, "_FIRST_PAUSE_S", 100.0)
    monkeypatch.setattr(native, "_LONGEST_PAUSE_S", 3000.0)
    with running(packed) as run, Client(run.address, attach="off") as client:
        (endpoint,) = client._shards.sets[0].replicas
        made = endpoint._native
        pauses = []
        with monkeypatch.context() as patch:
            patch.setattr(lane.Connection, "receive", silent)
            for _ in range(4):
                eventually(lambda: made._idle, "a connection was opened")
                assert client.lookup_rows({2: LARGE})[2].tobytes() == expected(2, LARGE)
                assert "does not answer" in endpoint.why_not_direct
                pauses.append(made._pause_s)
                made._not_before = 0.0  # that time is over
                made._want_one()
        assert pauses == [200.0, 400.0, 800.0, 1600.0]
        eventually(lambda: made._idle, "a connection was opened")
        client.lookup_rows({2: LARGE})
        assert made._pause_s == 100.0  # it answered


def silent(*_: object, **__: object) -> None:
    raise lane.SilentError("nothing came")


def test_deadlines_that_were_too_short_to_be_kept_do_not_end_the_use_of_the_lane(packed, monkeypatch):
    """Else a client whose deadlines only the lane can keep would miss them all, after one that was missed."""
    monkeypatch.setattr(native, "_FIRST_PAUSE_S", 100.0)
    monkeypatch.setattr(native, "_TIME_ENOUGH_S", LIMIT_S)
    with running(packed) as run, Client(run.address, attach="off") as client:
        (endpoint,) = client._shards.sets[0].replicas
        made = endpoint._native

        def miss_one() -> None:
            eventually(lambda: made._idle, "a connection was opened")
            with pytest.raises(DeadlineError):
                client.lookup_rows({2: LARGE})

        with monkeypatch.context() as patch:
            patch.setattr(lane.Connection, "receive", late)
            for _ in range(3):  # on connections that never answered
                miss_one()
            monkeypatch.setattr(native, "_TIME_ENOUGH_S", 0.0)
            miss_one()
        assert "does not answer" in endpoint.why_not_direct
        assert not made._idle


def late(*_: object, **__: object) -> None:
    raise TimeoutError


def test_a_connection_that_was_just_opened_is_not_distrusted_with_one_that_is_older(packed):
    with running(packed) as run, Client(run.address, attach="off") as client:
        made = client._shards.sets[0].replicas[0]._native
        eventually(lambda: made._idle, "a connection was opened")
        old = made._idle.pop()
        old.asked_at = time.monotonic()
        made._want_one()
        eventually(lambda: made._idle, "another was opened")
        new = made._idle[-1]
        made.distrust(old)
        assert new in made._idle


def test_nobody_waits_while_a_thread_is_started(monkeypatch):
    """To start one takes long enough for garbage to be collected, by code of anybody's."""
    starting, go_on = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def start(self) -> None:
            starting.set()
            assert go_on.wait(LIMIT_S)
            super().start()

    with peer(lambda _: None) as made:
        made._idle.clear()
        monkeypatch.setattr(native, "threading", SimpleNamespace(Thread=Slow, Lock=threading.Lock))
        asking = threading.Thread(target=made.ask, args=(exchange(1), time.monotonic() + LIMIT_S))
        asking.start()
        assert starting.wait(LIMIT_S)
        assert made.ask(exchange(1), time.monotonic() + LIMIT_S) is None  # at once
        go_on.set()
        asking.join()


def test_the_system_waits_hardly_longer_than_is_left(monkeypatch):
    monkeypatch.setattr(lane, "_SILENCE_S", 2.0)
    with peer(lambda *_: None) as made:
        connection = made._idle[-1]
        monkeypatch.setattr(lane, "time", SimpleNamespace(monotonic=lambda: 0.0))
        for left_s in (2.0, 1.9, 1.82, 1.819, 0.5, 0.46, 3600.0, 0.001):
            connection._allow(left_s)
            assert connection._limit_s <= min(left_s, lane._SILENCE_S) + 0.005
        connection.close()


def test_the_system_looks_after_connections_that_are_idle(server):
    with Client(server.address, attach="off") as client:
        (connection,) = client._shards._sets[0].replicas[0]._native._open
        assert connection._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 10


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("localhost:50051", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:50051", "::1"),
        ("dns:///node-1:50051", "node-1"),
        ("dns://8.8.8.8/node-1:50051", "node-1"),
        ("dns:node-1", "node-1"),
        ("ipv4:10.0.0.1:50051", "10.0.0.1"),
        ("ipv6:[::1]:50051", "::1"),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", ""),
        ("unix:/run/pool", ""),
        ("unix:pool", ""),
        ("unix-abstract:pool", ""),
        ("xds:///pool", ""),
    ],
)
def test_the_host_of_a_target(target, host):
    assert dial.host_of(target) == host
