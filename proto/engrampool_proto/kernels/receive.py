"""The client's side of the direct lane: an answer to a lookup, received where it belongs; docs/PROTOCOL.md has frames.

What is known of an answer lies in arrays, so that it may be received bit by bit, by one thread after the other.
"""

from typing import Any

import numpy as np
from numba import carray, njit, types

from engrampool_proto import frames
from engrampool_proto.kernels.gather import copy_row
from engrampool_proto.kernels.jit import kernel
from engrampool_proto.kernels.sockets import ENDED, SCRATCH_WORDS, WAITED, bytes_at, now, receive_some

# Why `take` returns, where it does not say that a layer is whole: all was there up to the frame at START, whose times
# are in the buffer; nothing more came in time; the connection ended; a frame that has no place in the answer is at
# START, whole as far as its header goes.
ANSWERED, LATER, LOST, ODD = -1, -2, -3, -4

# int64 [STATE_WORDS] of an answer: where what was received begins and ends in the buffer; the layer whose rows are
# coming, by its place in `layers`, and how many bytes of them are to follow; bytes received so far; when the
# first of them came, by `now`, or 0 if they lay there before somebody waited.
START, END, LAYER, LEFT, CAME, FIRST_AT = range(6)
SCRATCH = 6
STATE_WORDS = SCRATCH + SCRATCH_WORDS

# int64 [layers, ENTRY_WORDS]: which layer; where its rows are to lie; how many bytes they are, those of one row, and
# how many are there; 0 if they lie in the order in which they come, else the address of int64 [runs], each one's place,
# and how many bytes a run of rows that lie side by side has.
NUMBER, ADDRESS, BYTES, ROW_BYTES, HAVE, PLACES, RUN_BYTES = range(7)
ENTRY_WORDS = 7

# Bytes of rows that are waited for at a time.
_FEW, _MANY = 64 << 10, 1 << 20
# What comes without a pause is taken for no longer than this beyond the time.
_BEYOND_NS = 20_000_000
_HEADER = frames.HEADER.size
_END_BYTES = _HEADER + frames.TIMES.size
_U = np.uint64


@kernel(
    types.int64(types.int64[:, ::1], types.int64, types.int64, types.uint8[:, ::1], types.int64[::1], types.int64),
    nogil=False,
)
def lay(layers: Any, place: Any, layer: Any, rows: Any, places: Any, run: Any) -> int:
    """Write an entry of `layers`, of which nothing is there yet; gives the bytes that are to come.

    rows: uint8 [N, row_bytes]. places: of each `run` of the rows that come, where its first belongs among `rows`; empty
    if all of them come, in order. Both are to be kept alive.
    """
    entry = layers[place]
    entry[NUMBER], entry[ADDRESS], entry[HAVE] = layer, np.int64(rows.ctypes.data), 0
    entry[ROW_BYTES], entry[BYTES], entry[PLACES], entry[RUN_BYTES] = rows.shape[1], rows.size, 0, run * rows.shape[1]
    if places.size:
        entry[BYTES], entry[PLACES] = places.size * entry[RUN_BYTES], np.int64(places.ctypes.data)
    return int(entry[BYTES])


@njit  # type: ignore[untyped-decorator]
def _put(entry: Any, source: Any, nbytes: Any) -> Any:
    """Copy the next bytes of an entry's rows to where they belong."""
    if not entry[PLACES]:
        copy_row(_U(entry[ADDRESS]) + _U(entry[HAVE]), source, _U(nbytes))
        return
    width, row_bytes = entry[RUN_BYTES], entry[ROW_BYTES]
    places = carray(bytes_at(_U(entry[PLACES])), (8 * (entry[BYTES] // width),)).view(np.int64)
    run, within = entry[HAVE] // width, entry[HAVE] % width
    done = np.int64(0)
    while done < nbytes:
        some = min(width - within, nbytes - done)
        copy_row(_U(entry[ADDRESS]) + _U(places[run] * row_bytes + within), source + _U(done), _U(some))
        done += some
        run, within = run + 1, np.int64(0)


@njit  # type: ignore[untyped-decorator]
def _word(buffer: Any, at: Any) -> Any:
    value = _U(0)
    for byte in range(8):
        value |= _U(buffer[at + byte]) << _U(8 * byte)
    return value


@njit  # type: ignore[untyped-decorator]
def _count(state: Any, got: Any, scratch: Any) -> None:
    """Bytes were received."""
    if not state[CAME] and scratch[WAITED]:
        state[FIRST_AT] = now(scratch)
    state[CAME] += got


@njit  # type: ignore[untyped-decorator]
def _more(fd: Any, buffer: Any, state: Any, least: Any, until: Any, spin_ns: Any) -> Any:
    """Receive what comes into the buffer; gives 1, LATER or LOST. least: as of `receive_some`."""
    left = state[END] - state[START]
    for one in range(left):  # less than a frame's header and times
        buffer[one] = buffer[state[START] + one]
    state[START], state[END] = 0, left
    scratch = state[SCRATCH:]
    got = receive_some(fd, _U(buffer.ctypes.data) + _U(left), buffer.size - left, least, until, spin_ns, scratch)
    if got <= 0:
        return LOST if got == ENDED else LATER
    state[END] = left + got
    _count(state, got, scratch)
    return 1


@kernel(types.int64(types.int64, types.uint8[::1], types.int64[::1], types.int64, types.int64, types.int64))
def fill(fd: Any, buffer: Any, state: Any, nbytes: Any, until: Any, spin_ns: Any) -> int:
    """Receive until so many bytes lie in the buffer, from its beginning on, and write nothing elsewhere.

    Gives 1, LATER or LOST; 1 also where frames of rows are followed by another one than the end that belongs there, as
    no more may come. Only before `take`. nbytes: of the answer, no more than the buffer has.
    """
    scratch, last = state[SCRATCH:], nbytes - _END_BYTES
    frame = np.int64(0)  # where the first one is that was not looked at
    while state[END] < nbytes:
        at = _U(buffer.ctypes.data) + _U(state[END])
        got = receive_some(fd, at, buffer.size - state[END], 1, until, spin_ns, scratch)
        if got <= 0:
            return LOST if got == ENDED else LATER
        state[END] += got
        _count(state, got, scratch)
        while frame != last and frame + _HEADER <= state[END]:
            body = _word(buffer, frame + 24)
            if _word(buffer, frame) & _U(0xFFFFFFFF) != _U(frames.ROWS) or body > _U(nbytes):
                return 1
            frame += _HEADER + np.int64(body)
        if state[END] < nbytes and now(scratch) >= until:  # however little comes, and however often
            return LATER
    return 1


@kernel(
    types.int64(
        types.int64, types.uint8[::1], types.int64[::1], types.int64[:, ::1], types.uint64, types.int64, types.int64
    )
)
def take(fd: Any, buffer: Any, state: Any, layers: Any, number: Any, until: Any, spin_ns: Any) -> int:
    """Receive until a layer is whole, and give its place in `layers`; or why it is for Python to go on.

    fd: of the socket. buffer: uint8, 4096 bytes at least. number: of the request. until: as time.monotonic_ns has it;
    what has come by then is taken all the same. spin_ns: how long to look for the next bytes without sleeping. No byte
    is written elsewhere than into the buffer and the rows of `layers`, whatever comes.
    """
    scratch = state[SCRATCH:]
    bound = max(until, now(scratch) + _BEYOND_NS)
    while True:
        there = state[END] - state[START]
        if state[LEFT] > 0:
            entry = layers[state[LAYER]]
            if there > 0:
                some = min(there, state[LEFT])
                _put(entry, _U(buffer.ctypes.data) + _U(state[START]), some)
                state[START] += some
            elif state[LEFT] >= buffer.size // 2 and not entry[PLACES]:
                to, left = _U(entry[ADDRESS]) + _U(entry[HAVE]), state[LEFT]
                # Half of what is to come, so that the last of it is not waited for as a whole.
                least = min(max(left // 2, min(left, _FEW)), _MANY)
                some = receive_some(fd, to, left, least, until, spin_ns, scratch)
                if some <= 0:
                    return LOST if some == ENDED else LATER
                state[CAME] += some
            else:
                if now(scratch) >= bound:
                    return LATER
                least = min(state[LEFT], buffer.size // 2)
                got = _more(fd, buffer, state, least, until, spin_ns)
                if got != 1:
                    return int(got)
                continue
            entry[HAVE] += some
            state[LEFT] -= some
            if state[LEFT] == 0 and entry[HAVE] == entry[BYTES]:
                return int(state[LAYER])
            if there == 0 and now(scratch) >= until:
                return LATER
            continue
        if there < _HEADER:
            got = _more(fd, buffer, state, 1, until, spin_ns)
            if got != 1:
                return int(got)
            if state[END] - state[START] < _HEADER and now(scratch) >= until:
                return LATER
            continue
        at = state[START]
        head = _word(buffer, at)
        kind, which = head & _U(0xFFFFFFFF), np.int64(head >> _U(32))
        first, nbytes = _word(buffer, at + 16), _word(buffer, at + 24)
        if _word(buffer, at + 8) != number:
            return ODD
        if kind == _U(frames.END) and nbytes == _U(_END_BYTES - _HEADER):
            for place in range(layers.shape[0]):
                if layers[place, HAVE] != layers[place, BYTES]:
                    return ODD
            if there < _END_BYTES:
                got = _more(fd, buffer, state, 1, until, spin_ns)
                if got != 1:
                    return int(got)
                if state[END] - state[START] < _END_BYTES and now(scratch) >= until:
                    return LATER
                continue
            return ANSWERED
        if kind != _U(frames.ROWS):
            return ODD
        found = np.int64(-1)
        for place in range(layers.shape[0]):
            if layers[place, NUMBER] == which:
                found = np.int64(place)
        if found < 0:
            return ODD
        entry = layers[found]
        rows, part = entry[HAVE] // entry[ROW_BYTES], entry[HAVE] % entry[ROW_BYTES]
        if part or first != _U(rows) or nbytes == _U(0) or nbytes > _U(entry[BYTES] - entry[HAVE]):
            return ODD
        state[START] = at + _HEADER
        state[LAYER], state[LEFT] = found, np.int64(nbytes)
