"""Answers received by compiled loops: bit by bit, whatever comes, and not a byte elsewhere than where rows belong."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engrampool_proto import frames, wire
from engrampool_proto.kernels import receive
from engrampool_proto.kernels.sockets import WAITED
from server_fixtures import eventually

NUMBER = 0xFEDC_BA98_7654_3210
# As small as it may be, so that short answers go every way.
BUFFER, GUARD, FILL, OTHERS = 4096, 64, 0xA5, 5
END = frames.end(NUMBER, wire.ServerTimes(1, 2, 3))
# Layer, rows and bytes of each.
LAYERS = ((2, 500, 3), (9, 3, 7), (11, 40, 264))
SCATTERED = st.sampled_from([0, 1, 2, 4])
HUGE = (2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 264, 2**64 - 1)


def rows_of(layer: int, rows: int, row_bytes: int) -> bytes:
    return np.random.default_rng(layer).bytes(rows * row_bytes)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


class Receiving:
    """One answer that is received, with guards around everything that is written into.

    scattered: its rows belong among others, in another order, so many of them side by side; 0 for in order, and whole.
    """

    def __init__(self, layers: Sequence[tuple[int, int, int]] = LAYERS, scattered: int = 0, tcp: bool = False) -> None:
        others = OTHERS if scattered else 0
        sizes = (BUFFER, *((count + others) * row_bytes for _, count, row_bytes in layers))
        self._blocks = [np.full(size + 2 * GUARD, FILL, np.uint8) for size in sizes]
        self.buffer, *into = (block[GUARD:-GUARD] for block in self._blocks)
        self._into = [rows.reshape(-1, row_bytes) for (_, _, row_bytes), rows in zip(layers, into, strict=True)]
        self.layers = np.full((len(layers), receive.ENTRY_WORDS), -1, np.int64)
        self._places, self._first = [], []
        for place, (layer, count, row_bytes) in enumerate(layers):
            run = scattered if scattered and not count % scattered else 1
            order = np.random.default_rng(count).permutation((count + others) // run)[: count // run] * run
            self._first.append(order if scattered else order[:0])
            self._places.append((self._first[-1][:, None] + np.arange(run)).reshape(-1))
            nbytes = receive.lay(self.layers, place, layer, self._into[place], self._first[place], run)
            assert nbytes == count * row_bytes
        self.state = np.zeros(receive.STATE_WORDS, np.int64)
        self.ours, self.theirs = tcp_pair() if tcp else socket.socketpair()

    @property
    def rows(self) -> list[np.ndarray]:
        """What lies where each layer's rows belong, uint8 [bytes]."""
        found = []
        for rows, places in zip(self._into, self._places, strict=True):
            if len(places):
                assert (np.delete(rows, places, axis=0) == FILL).all()
                rows = rows[places]
            found.append(rows.reshape(-1))
        return found

    @property
    def wakes_at(self) -> int:
        """How many bytes wake whoever waits."""
        return self.ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)

    def take(self, until: int = 0) -> int:
        got = receive.take(self.ours.fileno(), self.buffer, self.state, self.layers, np.uint64(NUMBER), until, 0)
        self.check()
        return got

    def check(self) -> None:
        for block in self._blocks:
            assert (block[:GUARD] == FILL).all()
            assert (block[-GUARD:] == FILL).all()


@contextmanager
def receiving(
    layers: Sequence[tuple[int, int, int]] = LAYERS, scattered: int = 0, tcp: bool = False
) -> Iterator[Receiving]:
    made = Receiving(layers, scattered, tcp)
    with made.ours, made.theirs:
        yield made


def model(sent: bytes, layers: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[bytes]]:
    """What `take` gives for these bytes, until there is nothing more; and the rows that are there by then."""
    have = [b""] * len(layers)
    given: list[int] = []
    at = 0
    while len(sent) - at >= frames.HEADER.size:
        kind, layer, number, first, nbytes = frames.HEADER.unpack_from(sent, at)
        place = next((place for place, one in enumerate(layers) if one[0] == layer), None)
        whole = all(len(rows) == n * m for rows, (_, n, m) in zip(have, layers, strict=True))
        if number == NUMBER and kind == frames.END and nbytes == frames.TIMES.size and whole:
            answered = len(sent) - at >= frames.HEADER.size + nbytes
            return [*given, receive.ANSWERED if answered else receive.LATER], have
        if number != NUMBER or kind != frames.ROWS or place is None:
            return [*given, receive.ODD], have
        _, count, row_bytes = layers[place]
        if first * row_bytes != len(have[place]) or not 0 < nbytes <= count * row_bytes - len(have[place]):
            return [*given, receive.ODD], have
        at += frames.HEADER.size
        body = sent[at : at + nbytes]
        have[place] += body
        at += len(body)
        if len(body) == nbytes and len(have[place]) == count * row_bytes:
            given.append(place)
    return [*given, receive.LATER], have


@st.composite
def answers(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Frames of any size, the layers in any order, each layer's rows as they follow: (place, start, stop) of each."""
    left = []
    for place, (_, count, _) in enumerate(LAYERS):
        bounds = sorted({0, count} | draw(st.sets(st.integers(1, count - 1), max_size=4)))
        left.append([(place, *run) for run in pairwise(bounds)])
    order = draw(st.permutations([place for place, runs in enumerate(left) for _ in runs]))
    return [left[place].pop(0) for place in order]


def bytes_of(answer: list[tuple[int, int, int]]) -> bytes:
    sent = b""
    for place, start, stop in answer:
        layer, _, row_bytes = LAYERS[place]
        rows = rows_of(*LAYERS[place])[start * row_bytes : stop * row_bytes]
        sent += frames.rows_start(NUMBER, layer, start, len(rows)) + rows
    return sent + END


def deliver(made: Receiving, sent: bytes, splits: set[int]) -> list[int]:
    """Send it in these pieces, each received before the next is sent; gives all that is said but LATER."""
    bounds = sorted({0, len(sent)} | {split for split in splits if split < len(sent)})
    given: list[int] = []
    for start, stop in pairwise(bounds):
        made.theirs.sendall(sent[start:stop])
        came = -1
        while (got := made.take()) != receive.LATER or came != made.state[receive.CAME]:
            came = made.state[receive.CAME]  # it says LATER at any time, and nothing is there where nothing came
            if got == receive.LATER:
                continue
            given.append(got)
            if got < 0:
                return given
    return given


@given(answers(), st.sets(st.integers(1, 14_000), max_size=8), SCATTERED)
def test_an_answer_may_come_in_any_frames_and_pieces(answer, splits, scattered):
    sent = bytes_of(answer)
    with receiving(scattered=scattered) as made:
        given = deliver(made, sent, splits)
        assert sorted(given[:-1]) == list(range(len(LAYERS)))
        assert given == model(sent, LAYERS)[0]
        assert [rows.tobytes() for rows in made.rows] == [rows_of(*one) for one in LAYERS]
        start, end = made.state[receive.START], made.state[receive.END]
        assert made.buffer[start:end].tobytes() == END
        assert made.state[receive.CAME] == len(sent)


@pytest.mark.parametrize("scattered", [0, 1, 5])
def test_an_answer_may_be_split_at_every_byte(scattered):
    layers = ((2, 5, 3), (9, 2, 7))
    sent = b"".join(
        frames.rows_start(NUMBER, layer, 0, count * row_bytes) + rows_of(layer, count, row_bytes)
        for layer, count, row_bytes in layers
    )
    for cut in range(1, len(sent + END)):
        with receiving(layers, scattered) as made:
            assert deliver(made, sent + END, {cut}) == [0, 1, receive.ANSWERED]
            assert [rows.tobytes() for rows in made.rows] == [rows_of(*one) for one in layers]
    with receiving(layers, scattered) as made:
        assert deliver(made, sent + END, set(range(len(sent + END)))) == [0, 1, receive.ANSWERED]


@given(answers(), st.integers(0, 13_000), st.sets(st.integers(1, 14_000), max_size=4), SCATTERED)
def test_the_connection_may_end_at_any_byte(answer, cut, splits, scattered):
    sent = bytes_of(answer)
    with receiving(scattered=scattered) as made:
        given = deliver(made, sent[:cut], splits)
        made.theirs.close()
        said, have = model(sent[:cut], LAYERS)
        if said[-1] == receive.LATER:
            assert given == said[:-1]
            assert made.take() == made.take(2**62) == receive.LOST
        for rows, wanted in zip(made.rows, have, strict=True):
            assert rows.tobytes() == wanted + bytes([FILL]) * (rows.size - len(wanted))


BULK = ((2, 1000, 264),)
ROWS = rows_of(*BULK[0])
FIRST = frames.rows_start(NUMBER, 2, 0, len(ROWS)) + ROWS[:5000]


@contextmanager
def meanwhile(made: Receiving, happens: Callable[[], object]) -> Iterator[None]:
    """Within it, `happens` is called as soon as whoever receives sleeps until much is there."""

    def run() -> None:
        eventually(lambda: made.wakes_at > 1, "it sleeps until much is there")
        happens()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run)
        yield
        done.result()


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("scattered", [0, 1])
def test_who_sleeps_until_much_is_there_is_woken_by_the_last_of_it(tcp, scattered):
    with receiving(BULK, scattered, tcp) as made:
        made.theirs.sendall(FIRST)
        with meanwhile(made, lambda: made.theirs.sendall(ROWS[5000:])):
            assert made.take(2**62) == 0
        assert made.wakes_at == 1
        assert made.rows[0].tobytes() == ROWS


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("scattered", [0, 1])
@pytest.mark.parametrize("more", [0, 1000])  # bytes, fewer than are slept for
@pytest.mark.parametrize("ours", [False, True])
def test_who_sleeps_until_much_is_there_is_woken_by_the_end(tcp, scattered, more, ours):
    """ours: whoever gives the lookup up ends the connection."""
    with receiving(BULK, scattered, tcp) as made:

        def end() -> None:
            made.theirs.sendall(ROWS[5000 : 5000 + more])
            if ours:
                made.ours.shutdown(socket.SHUT_RDWR)
            else:
                made.theirs.close()

        made.theirs.sendall(FIRST)
        with meanwhile(made, end):
            assert made.take(2**62) == receive.LOST
        assert made.wakes_at == 1
        if not ours:  # what comes before the end is taken
            assert made.rows[0][: 5000 + more].tobytes() == ROWS[: 5000 + more]


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("scattered", [0, 1])
def test_of_bytes_that_come_slowly_each_is_taken_in_the_end(tcp, scattered):
    with receiving(BULK, scattered, tcp) as made:
        made.theirs.sendall(FIRST)
        for start in range(5000, 8000, 1000):
            came = made.state[receive.CAME]
            with meanwhile(made, partial(made.theirs.sendall, ROWS[start : start + 1000])):
                while came < len(FIRST) + start + 1000 - 5000:
                    assert made.take(time.monotonic_ns() + 20_000_000) == receive.LATER
                    assert made.wakes_at == 1
                    came = made.state[receive.CAME]
            assert made.rows[0][: start + 1000].tobytes() == ROWS[: start + 1000]


numbers = st.one_of(st.integers(0, 2000), st.sampled_from(HUGE), st.integers(0, 2**64 - 1))
odd_frames = st.builds(
    lambda kind, which, number, first, nbytes, body: frames.HEADER.pack(kind, which, number, first, nbytes) + body,
    st.sampled_from([frames.ROWS, frames.ROWS, frames.ROWS, frames.END, frames.REFUSED, frames.READY, 0, 2**32 - 1]),
    st.sampled_from([2, 2, 9, 11, 0, 3, 2**31, 2**32 - 1]),
    st.sampled_from([NUMBER, NUMBER, NUMBER, NUMBER, 0, NUMBER + 1, NUMBER - 2**63, 2**64 - 1]),
    numbers,
    numbers,
    st.binary(max_size=100),
)


@given(answers(), st.integers(0, 14_000), odd_frames, st.sets(st.integers(1, 14_000), max_size=4), SCATTERED)
def test_frames_that_have_no_place_are_odd_and_write_nothing_elsewhere(answer, at, odd, splits, scattered):
    """A frame of any kind comes instead of what follows from there, most often not where one begins."""
    sent = bytes_of(answer)[:at] + odd
    with receiving(scattered=scattered) as made:
        given = deliver(made, sent, splits)
        said, have = model(sent, LAYERS)
        assert given == (said if said[-1] != receive.LATER else said[:-1])
        for rows, wanted in zip(made.rows, have, strict=True):
            assert rows.tobytes() == wanted + bytes([FILL]) * (rows.size - len(wanted))


def after_rows_of_layer_2(odd: bytes) -> bytes:
    return frames.rows_start(NUMBER, 2, 0, 1500) + rows_of(2, 500, 3) + odd


@pytest.mark.parametrize("first", [0, 1, 3, 500, *HUGE])
@pytest.mark.parametrize("nbytes", [0, 1, 21, 22, *HUGE])
def test_rows_that_do_not_follow_or_are_too_many_are_odd_however_huge_their_numbers_are(first, nbytes):
    with receiving() as made:
        sent = after_rows_of_layer_2(frames.rows_start(NUMBER, 9, first, nbytes))
        right = first == 0 and 0 < nbytes <= 21
        assert deliver(made, sent, set()) == ([0] if right else [0, receive.ODD])
        if not right:  # and it stays where it is, for whoever says what is wrong
            start, end = made.state[receive.START], made.state[receive.END]
            assert made.buffer[start:end].tobytes() == sent[-frames.HEADER.size :]
            assert made.take() == receive.ODD


def test_a_frame_after_half_a_row_is_odd():
    with receiving() as made:
        sent = frames.rows_start(NUMBER, 2, 0, 4) + b"abcd" + frames.rows_start(NUMBER, 2, 1, 3) + b"efg"
        assert deliver(made, sent, set()) == [receive.ODD]


@pytest.mark.parametrize("odd", [END, frames.rows_start(NUMBER, 2, 500, 3), frames.rows_start(NUMBER, 2, 0, 0)])
def test_an_end_too_early_and_rows_of_a_layer_that_is_whole_are_odd(odd):
    with receiving() as made:
        assert deliver(made, after_rows_of_layer_2(odd), set()) == [0, receive.ODD]


@given(st.binary(max_size=300), st.sets(st.integers(1, 300), max_size=3))
@example(frames.HEADER.pack(frames.ROWS, 2**32 - 1, NUMBER, 2**64 - 1, 2**64 - 1), set())
def test_bytes_that_are_no_frames_write_nothing(sent, splits):
    with receiving() as made:
        said, _ = model(sent, LAYERS)
        assert deliver(made, sent, splits) == (said if said[-1] != receive.LATER else [])
        assert all((rows == FILL).all() for rows in made.rows)


def is_over(came: bytes, nbytes: int) -> bool:
    """Whether a frame is among it that is neither one of rows nor the end where that belongs."""
    at = 0
    while at != nbytes - len(END) and len(came) - at >= frames.HEADER.size:
        kind, _, _, _, body = frames.HEADER.unpack_from(came, at)
        if kind != frames.ROWS or body > nbytes:
            return True
        at += frames.HEADER.size + body
    return False


@given(
    nbytes=st.sampled_from([1, 31, 32, 100, 2 * 32 + 60 + 20 + 56, BUFFER]),
    sent=st.lists(st.sampled_from([(frames.ROWS, 20), (frames.ROWS, 60), (frames.END, 24), (frames.REFUSED, 40)])),
    splits=st.sets(st.integers(1, 5000), max_size=6),
    ends=st.booleans(),
)
@example(BUFFER, [(frames.ROWS, 2**63)], set(), False)
@example(BUFFER, [(frames.ROWS, 2**64 - 32)], set(), False)
@example(140 + 56, [(frames.ROWS, 60), (frames.ROWS, 20), (frames.END, 24)], {60, 190}, False)
def test_so_many_bytes_are_received_into_the_buffer_unless_fewer_may_come(nbytes, sent, splits, ends):
    """Frames of these kinds and sizes come, of whatever request."""
    sent = b"".join(frames.HEADER.pack(kind, 2, 1, 0, body) + bytes(min(body, 100)) for kind, body in sent)
    with receiving() as made:

        def fill() -> int:
            got = receive.fill(made.ours.fileno(), made.buffer, made.state, nbytes, 0, 0)
            made.check()
            return got

        bounds = sorted({0, len(sent)} | {split for split in splits if split < len(sent)})
        over = False
        for start, stop in pairwise(bounds):
            made.theirs.sendall(sent[start:stop])
            got = fill()
            came = int(made.state[receive.CAME])
            assert came == made.state[receive.END] <= min(stop, BUFFER)
            assert made.buffer[:came].tobytes() == sent[:came]
            assert (made.buffer[came:] == FILL).all()
            over = came >= nbytes or is_over(sent[:came], nbytes)
            assert got == (1 if over else receive.LATER)
            if over:
                break
        if ends and not over:
            made.theirs.close()
            assert fill() == receive.LOST
        assert all((rows == FILL).all() for rows in made.rows)


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_it_is_known_when_an_answer_began_to_come_that_somebody_waited_for(waits, fills):
    receiving = Receiving(((2, 5, 3),))
    with receiving.ours, receiving.theirs, ThreadPoolExecutor() as pool:
        answer = frames.rows_start(NUMBER, 2, 0, 15) + rows_of(2, 5, 3) + END
        if not waits:
            receiving.theirs.sendall(answer)
        until, sent = time.monotonic_ns() + 60_000_000_000, 0
        where = receiving.ours.fileno(), receiving.buffer, receiving.state
        if fills:
            coming = pool.submit(receive.fill, *where, len(answer), until, 0)
        else:
            coming = pool.submit(receiving.take, until)
        if waits:
            # Whoever waits sleeps in the system: then it has found nothing.
            eventually(lambda: receiving.state[receive.SCRATCH + WAITED] == 1, "somebody waits")
            sent = time.monotonic_ns()
            receiving.theirs.sendall(answer)
        assert coming.result() in (0, 1)  # the layer is whole, or all of it is there
        first = receiving.state[receive.FIRST_AT]
        assert (sent <= first <= time.monotonic_ns()) if waits else first == 0
        assert receiving.take(until) in (0, receive.ANSWERED)
        assert receiving.state[receive.FIRST_AT] == first
