"""A small request on the direct lane, against peers that are no server of ours: received bit by bit, by any thread."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from direct_peers import NUMBER, TIMES, numbered, peer, rows_frame, whole_answer
from engrampool_client import DeadlineError, ProtocolError
from engrampool_client.errors import StepCancelledError
from engrampool_client.lanes import connection as lane
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lanes.small import SmallRequest
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.small import Small
from engrampool_client.pool.breaker import Breaker
from engrampool_proto import frames
from engrampool_proto.v1 import pool_pb2
from server_fixtures import LIMIT_S

pytestmark = pytest.mark.usefixtures("patient")
GUARD, FILL = 256, 0xA5
LAYERS = (2, 9)
NOBODYS = StepCancelledError("nobody wants it")
# Rows of 3 bytes for each of two layers: an answer that fits into a connection's memory, and two that do not. Frames of
# the last are received where the rows belong, without a copy.
SMALL, LONG, LONGEST = 20, 30_000, 60_000


class Rows:
    """Memory for the rows of both layers, between guards."""

    def __init__(self, count: int) -> None:
        self._blocks = {layer: np.full(2 * GUARD + 3 * count, FILL, np.uint8) for layer in LAYERS}
        self.arrays = {layer: block[GUARD:-GUARD].reshape(count, 3) for layer, block in self._blocks.items()}

    def check(self) -> None:
        """That nothing was written but rows."""
        for block in self._blocks.values():
            assert (block[:GUARD] == FILL).all()
            assert (block[-GUARD:] == FILL).all()

    @property
    def written(self) -> list[int]:
        return [layer for layer, rows in self.arrays.items() if (rows != FILL).any()]


class Asking:
    """A request that was sent, and what became of it. connection: that it is on."""

    def __init__(self, made: NativeLane, count: int) -> None:
        self.lane, self.rows = made, Rows(count)
        self.answered: list[int] = []
        self.late: list[DeadlineError] = []
        taken = made.take()
        assert taken is not None
        self.connection = taken
        ids, counts = np.zeros(frames.padded(4 * count) * len(LAYERS), np.uint8), np.full(len(LAYERS), count)
        small = Small(("m", "v", LAYERS), counts, ids, self.rows.arrays, (), 6 * count)
        assert SmallRequest.send_now(taken, small, LIMIT_S)
        self.request = SmallRequest(
            made, taken, small, lambda nbytes, *_: self.answered.append(nbytes), self.late.append
        )
        self.given: list[int] = []

    def come(self, wait_s: float = 0.0, spin_s: float = 0.0, aside: bool = False) -> Came:
        """What comes within so long, in this thread or in another; the places of layers that are whole are noted."""
        if aside:
            return in_a_thread(lambda: self.come(wait_s, spin_s))
        until = time.monotonic() + wait_s
        while True:
            came: int | Came | None
            try:
                came = self.request.ready(until, spin_s)
                if came is None:
                    came = self.request.take(until, spin_s)
            finally:
                self.rows.check()
            if isinstance(came, Came):
                return came
            self.given.append(came)

    def to_the_end(self) -> Came:
        """All that comes, until it is clear that nothing more does."""
        end = time.monotonic() + LIMIT_S
        while (came := self.come(0.05)) is Came.LATER:
            assert time.monotonic() < end
        return came

    @property
    def given_back(self) -> bool:
        return self.connection in self.lane._idle

    def check_whole(self, wanted: dict[int, bytes]) -> None:
        assert sorted(self.given) == [0, 1]
        assert {layer: rows.tobytes() for layer, rows in self.rows.arrays.items()} == wanted
        assert self.request.times == TIMES
        assert self.answered == [sum(map(len, wanted.values()))]


def in_a_thread(call: Callable[[], Came]) -> Came:
    found: list[Came | BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (got,) = found
    if isinstance(got, BaseException):
        raise got
    return got


class Answerer:
    """The peer's end, by which a test says what is answered, piece by piece. over: the next request is answered."""

    socket: socket.socket
    number: int

    def __init__(self) -> None:
        self.sockets: queue.SimpleQueue[tuple[socket.socket, int]] = queue.SimpleQueue()
        self.over = threading.Event()

    def say(self, sent: bytes, splits: Collection[int] = (), begin: int = 0, end: int | None = None) -> Iterator[None]:
        """Send it, from there to there, in pieces that end there, one after the other."""
        sent = numbered(sent, self.number)[:end]
        bounds = {begin, len(sent)} | {split for split in splits if begin < split < len(sent)}
        for start, stop in pairwise(sorted(bounds)):
            self.socket.sendall(sent[start:stop])
            yield

    def reply(self, connection: socket.socket, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets.put((connection, number))
        assert self.over.wait(LIMIT_S)


@contextmanager
def asked(count: int, again: bool = False) -> Iterator[tuple[Asking, "Answerer"]]:
    """A request of so many rows a layer, and the peer. again: it answers the next one after that as servers do."""
    said = Answerer()
    with peer(said.reply, *[whole_answer(SMALL, set())[1]] * again) as made:
        try:
            asking = Asking(made, count)
            said.socket, said.number = said.sockets.get(timeout=LIMIT_S)
            yield asking, said
        finally:
            said.over.set()


def serves_the_next(asking: Asking) -> None:
    """With rows that are right, on the same connection."""
    wanted, _ = whole_answer(SMALL, set())
    again = Asking(asking.lane, SMALL)
    assert again.connection is asking.connection
    assert again.to_the_end() is Came.ALL
    again.check_whole(wanted)
    again.request.let_go(None)
    assert again.given_back


slices = st.lists(st.tuples(st.sampled_from([0.0, 0.001]), st.booleans()), min_size=1, max_size=6)


@given(
    count=st.sampled_from([1, SMALL, 3000, LONG, LONGEST]),
    cuts=st.sets(st.integers(1, LONGEST), max_size=5),
    splits=st.sets(st.integers(1, 7 * LONGEST), max_size=6),
    near=st.sets(st.integers(1, 200), max_size=3),
    waits=slices,
    spin_s=st.sampled_from([0.0, 1e-3]),
)
def test_an_answer_may_come_in_any_pieces_to_any_threads(count, cuts, splits, near, waits, spin_s):
    wanted, sent = whole_answer(count, cuts)
    splits |= near | {len(sent) - before for before in near}
    with asked(count, again=True) as (asking, said):
        came = Came.LATER
        # An answer may be more than the system takes while nobody receives.
        sender = threading.Thread(target=lambda: list(said.say(sent, splits)))
        sender.start()
        for wait_s, aside in waits:
            if came is Came.LATER:
                came = asking.come(wait_s, spin_s, aside)
        if came is Came.LATER:
            came = asking.to_the_end()
        sender.join()
        assert came is Came.ALL
        asking.check_whole(wanted)
        asking.request.let_go(None)
        assert asking.given_back
        said.over.set()
        serves_the_next(asking)


def test_an_answer_may_be_split_at_every_byte():
    wanted, sent = whole_answer(5, {2})
    for cut in range(1, len(sent)):
        with asked(5) as (asking, said):
            came = Came.LATER
            for _ in said.say(sent, {cut}):
                came = asking.come(aside=bool(cut % 2))
            came = asking.to_the_end() if came is Came.LATER else came
            assert came is Came.ALL
            asking.check_whole(wanted)


refusal = pool_pb2.Refusal(code=3, reason="too-many-rows", text="split it").SerializeToString()
# What may be there before it: nothing, all rows of the first layer, all rows.
GOOD_FRAMES = (0, 1, 2)


def good_frames(count: int, frames_before: int) -> bytes:
    _, sent = whole_answer(count, set())
    return sent[: frames_before * (frames.HEADER.size + 3 * count)]


@given(
    count=st.sampled_from([1, SMALL, 3000, LONG, LONGEST]),
    cut=st.integers(0, 7 * LONGEST),
    splits=st.sets(st.integers(1, 7 * LONGEST), max_size=3),
)
def test_a_connection_that_ends_at_any_byte_brings_nothing_more(count, cut, splits):
    wanted, sent = whole_answer(count, set())
    cut %= len(sent)
    with asked(count) as (asking, said):

        def say() -> None:
            list(said.say(sent, splits, end=cut))
            said.socket.shutdown(socket.SHUT_RDWR)

        sender = threading.Thread(target=say)
        sender.start()
        assert asking.to_the_end() is Came.NOTHING
        sender.join()
        whole = cut // (frames.HEADER.size + 3 * count)
        assert asking.given == list(range(0 if asking.request.small else whole))
        for place in asking.given:
            layer = LAYERS[place]
            assert asking.rows.arrays[layer].tobytes() == wanted[layer]
        if asking.request.small:
            assert not asking.rows.written
        asking.request.let_go(None)
        assert asking.connection not in asking.lane._open
        assert not asking.answered


@pytest.mark.parametrize("count", [SMALL, LONGEST])
@pytest.mark.parametrize("before", GOOD_FRAMES)
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "odd",
    [
        frames.HEADER.pack(frames.ROWS, 9, NUMBER, 0, 2**63),
        frames.HEADER.pack(frames.ROWS, 9, NUMBER, 0, 2**64 - 1),
        frames.HEADER.pack(frames.ROWS, 9, NUMBER, 2**64 - 1, 3),
        frames.HEADER.pack(frames.ROWS, 9, NUMBER, 2**63, 3),
        frames.HEADER.pack(frames.ROWS, 2**32 - 1, NUMBER, 0, 3),
        rows_frame(2, 0, b"") * 100,
        rows_frame(3, 0, b"abc"),
        rows_frame(9, 1, b"abc"),
        rows_frame(9, 0, b"abc" * (LONGEST + 1)),
        frames.frame(77, number=NUMBER),
        frames.frame(frames.READY, number=NUMBER),
        frames.HEADER.pack(frames.END, 0, NUMBER, 0, 9000),
        frames.HEADER.pack(frames.END, 0, NUMBER, 0, 2**64 - 1),
        frames.frame(frames.END, number=NUMBER),
        frames.end(0, TIMES),
        frames.end(NUMBER + 1, TIMES),
        rows_frame(9, 0, b"abc").replace(NUMBER.to_bytes(8, "little"), (NUMBER + 1).to_bytes(8, "little")),
        frames.HEADER.pack(frames.REFUSED, 0, NUMBER, 0, 9000),
        frames.HEADER.pack(frames.REFUSED, 0, 0, 0, 2**63),
        frames.frame(frames.REFUSED, refusal, NUMBER + 1),
    ],
)
def test_what_no_server_says_is_a_protocol_error(count, before, at_once, odd):
    good = good_frames(count, before)
    sent = good + odd + bytes(1000)  # a short answer is not looked at before as much came as it has
    with asked(count) as (asking, said):

        def say() -> None:
            with suppress(ConnectionError):
                list(said.say(sent, () if at_once else {len(good)}))

        sender = threading.Thread(target=say)
        sender.start()
        with pytest.raises(ProtocolError) as raised:
            asking.to_the_end()
        assert len(asking.given) <= before
        for place in set(range(len(LAYERS))) - set(asking.given):
            assert LAYERS[place] not in asking.rows.written
        asking.request.let_go(raised.value)
        assert asking.connection not in asking.lane._open
        sender.join()


@pytest.mark.parametrize("count", [1, SMALL, LONG])
@pytest.mark.parametrize("before", [0, 1])
def test_an_end_before_the_rows_is_a_protocol_error(count, before):
    with asked(count) as (asking, said):
        list(said.say(good_frames(count, before) + frames.end(NUMBER, TIMES)))
        with pytest.raises(ProtocolError):
            asking.to_the_end()
        assert not asking.answered
        asking.request.let_go(ProtocolError("it is none"))
        assert asking.connection not in asking.lane._open


@pytest.mark.parametrize("count", [1, SMALL, LONG])
@pytest.mark.parametrize("before", GOOD_FRAMES)
@pytest.mark.parametrize("cut", [0, 10, frames.HEADER.size, frames.HEADER.size + 5])
def test_a_refusal_is_an_answer_that_brings_nothing_and_the_connection_is_good(count, before, cut):
    good = good_frames(count, before)
    sent = good + frames.frame(frames.REFUSED, refusal, NUMBER)
    with asked(count, again=True) as (asking, said):
        came = Came.LATER
        for _ in said.say(sent, {len(good), len(good) + cut} if cut else ()):
            if cut != frames.HEADER.size and cut != frames.HEADER.size + 5:  # of a body it waits for the rest
                came = asking.come()
        assert (asking.to_the_end() if came is Came.LATER else came) is Came.NOTHING
        assert not asking.answered
        asking.request.let_go(None)
        assert asking.given_back
        said.over.set()
        serves_the_next(asking)


@pytest.mark.parametrize("count", [1, SMALL, LONG])
@pytest.mark.parametrize("before", GOOD_FRAMES)
def test_a_refusal_of_everything_ends_the_connection(count, before):
    sent = good_frames(count, before) + frames.frame(frames.REFUSED, refusal)
    with asked(count) as (asking, said):
        list(said.say(sent))
        assert asking.to_the_end() is Came.NOTHING
        asking.request.let_go(None)
        assert asking.connection not in asking.lane._open


@pytest.mark.parametrize("count", [1, SMALL, LONG])
@pytest.mark.parametrize("cut", [1, 20, frames.HEADER.size, frames.HEADER.size + 5])
@pytest.mark.parametrize("number", [NUMBER, 0])
@pytest.mark.parametrize("ends", [True, False])
def test_a_refusal_that_is_cut_short_brings_nothing(count, cut, number, ends, monkeypatch):
    monkeypatch.setattr(lane, "_SILENCE_S", 0.2)
    with asked(count) as (asking, said):
        list(said.say(frames.frame(frames.REFUSED, refusal, number), end=cut))
        if ends:
            said.socket.shutdown(socket.SHUT_RDWR)
        assert asking.to_the_end() is Came.NOTHING
        assert not asking.rows.written
        asking.request.let_go(None)
        assert asking.connection not in asking.lane._open


@pytest.mark.parametrize("count", [1, SMALL, LONG])
@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_peer_that_is_silent_for_too_long_is_given_up(count, cut, monkeypatch):
    monkeypatch.setattr(lane, "_SILENCE_S", 0.2)
    told = threading.Event()
    with asked(count) as (asking, said):
        asking.lane.silent = told.set
        _, sent = whole_answer(count, set())
        list(said.say(sent, end=cut))
        assert asking.to_the_end() is Came.NOTHING
        assert time.monotonic() - asking.connection.asked_at >= 0.2
        asking.request.let_go(None)
        assert told.is_set()
        assert asking.connection not in asking.lane._open


@pytest.mark.parametrize("count", [3000, LONG])
def test_whoever_waits_comes_back_when_time_is_up_however_little_comes(count):
    """A peer that sends byte by byte, and one that sends more than anybody wants."""
    _, sent = whole_answer(count, set())
    with asked(count) as (asking, said):
        dripping = said.say(sent, range(1, 500))
        for wait_s in (0.0, 0.01, 0.05):
            next(dripping)
            begin = time.monotonic()
            assert asking.come(wait_s) is Came.LATER
            assert wait_s <= time.monotonic() - begin < LIMIT_S


@pytest.mark.parametrize("count", [SMALL, LONG])
@pytest.mark.parametrize("cut", [0, 40, 50])
def test_whoever_waits_comes_back_when_it_is_shut(count, cut):
    _, sent = whole_answer(count, set())
    with asked(count) as (asking, said):
        list(said.say(sent, end=cut))
        timer = threading.Timer(0.05, asking.request.shut)
        timer.start()
        assert asking.come(LIMIT_S) is Came.NOTHING
        timer.join()
        asking.request.let_go(StepCancelledError("it was cancelled"))
        assert asking.connection not in asking.lane._open


def test_one_that_is_over_cannot_be_shut():
    _, sent = whole_answer(SMALL, set())
    with asked(SMALL, again=True) as (asking, said):
        list(said.say(sent))
        assert asking.to_the_end() is Came.ALL
        asking.request.let_go(None)
        asking.request.shut()
        said.over.set()
        serves_the_next(asking)


@pytest.mark.parametrize("came", ["nothing", "a part", "a refusal"])
def test_what_a_deadline_that_passed_says(came):
    """Nothing, where all that came was a refusal that nobody looked at, or the beginning of an answer."""
    _, sent = whole_answer(LONG, set())
    says = {"nothing": b"", "a part": sent[:100], "a refusal": frames.frame(frames.REFUSED, refusal, NUMBER)}[came]
    with asked(LONG) as (asking, said):
        list(said.say(says))
        if says:
            asking.connection._poll.poll(LIMIT_S * 1e3)
        error = DeadlineError("it is too late")
        asking.request.late(error)
        asking.request.let_go(error)
        assert asking.late == ([] if came == "a part" else [error])
        assert asking.connection not in asking.lane._open


@given(
    count=st.sampled_from([1, SMALL, 3000]),
    cuts=st.sets(st.integers(1, 3000), max_size=4),
    cut=st.integers(0, 20_000),
    splits=st.sets(st.integers(1, 20_000), max_size=3),
    calls=st.integers(0, 2),
)
def test_what_nobody_wants_is_passed_over_and_the_connection_is_good(count, cuts, cut, splits, calls):
    """Whatever had come of it by then."""
    _, sent = whole_answer(count, cuts)
    cut %= len(sent)
    with asked(count, again=True) as (asking, said):
        list(said.say(sent, end=cut))
        for _ in range(calls):
            assert asking.come() is Came.LATER
        before = {layer: rows.tobytes() for layer, rows in asking.rows.arrays.items()}
        if len(cuts & set(range(count))) == 0:  # one frame a layer: none is written before all are there
            assert not asking.rows.written
        passing = threading.Thread(target=asking.request.pass_over, args=(time.monotonic() + LIMIT_S, NOBODYS))
        passing.start()
        list(said.say(sent, splits, cut))
        passing.join()
        asking.rows.check()
        assert {layer: rows.tobytes() for layer, rows in asking.rows.arrays.items()} == before
        assert asking.given_back
        said.over.set()
        serves_the_next(asking)


@pytest.mark.parametrize("says", [b"", frames.rows_start(NUMBER, 2, 0, 60), rows_frame(2, 0, b"") * 10])
def test_what_does_not_come_to_an_end_is_passed_over_for_so_long_only(says):
    with asked(SMALL) as (asking, said):
        list(said.say(says))
        begin = time.monotonic()
        asking.request.pass_over(begin + 0.1, NOBODYS)
        assert time.monotonic() - begin < LIMIT_S
        assert asking.connection not in asking.lane._open
        assert not asking.rows.written


def test_an_answer_that_was_taken_in_is_not_waited_for_again():
    """It was just over, as the step was given up."""
    for sent in (whole_answer(SMALL, set())[1], frames.frame(frames.REFUSED, refusal, NUMBER)):
        with asked(SMALL, again=True) as (asking, said):
            list(said.say(sent))
            came, answered = asking.to_the_end(), list(asking.answered)
            assert came is not Came.LATER
            asking.request.pass_over(time.monotonic() + LIMIT_S, NOBODYS)
            assert asking.answered == answered
            assert asking.given_back
            said.over.set()
            serves_the_next(asking)


@pytest.mark.parametrize("silent", [False, True])
def test_garbage_that_is_collected_within_the_lanes_own_work_may_be_a_step(silent):
    with asked(LONG) as (asking, _):
        breaker = Breaker(1.0, 0, lambda: None, lambda: None, "a server")
        asking.lane.silent, asking.request._silent = breaker.doubt, silent

        def collected() -> None:
            with asking.lane._lock, breaker._lock:
                asking.request.let_go(StepCancelledError("nobody refers to the step any more"))

        collecting = threading.Thread(target=collected, daemon=True)
        collecting.start()
        collecting.join(LIMIT_S / 4)
        assert not collecting.is_alive()
        breaker.close()
