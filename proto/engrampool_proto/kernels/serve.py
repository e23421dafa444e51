"""Answering lookups of the direct lane without Python: from a request's header to the last row of its answer.

One thread a connection is within `serve` for as long as requests are ordinary: rows by id, all of them held, within all
limits. For whatever else it returns, with the request where it lies. docs/PROTOCOL.md has the frames.
"""

from typing import Any

import numpy as np
from numba import carray, njit, types

from engrampool_proto import frames
from engrampool_proto.kernels.gather import first_outside, gather
from engrampool_proto.kernels.jit import kernel, view
from engrampool_proto.kernels.sockets import (
    ENDED,
    LATE,
    SCRATCH_WORDS,
    add_at,
    bytes_at,
    now,
    receive_some,
    replace_at,
    send_all,
)
from engrampool_proto.kernels.tier import LINK, TIER_WORDS, rows_due, sleep_until, take_turn

# What `serve` returns.
CLOSED, FRAME, LARGE, ANSWERED, SLOW_REQUEST, GONE, UNREAD, LATE_ANSWER, SLOW_ANSWER = range(9)

# int64 [STATE_WORDS] of a connection. Where what was received begins and ends in its buffer; whether it takes no more
# requests; when the last one began to come (as of `now`); when it is looked at whether that goes on, and how many bytes
# there were the last time. Of the last lookup that was answered: its number, its rows, and its times in microseconds.
START, END, LEAVING, ARRIVED, DUE, SEEN, NUMBER, ANSWERED_ROWS, QUEUE_US, GATHER_US, TOTAL_US = range(11)
SCRATCH = 11
STATE_WORDS = SCRATCH + SCRATCH_WORDS

# int64 [LIMIT_WORDS]: bounds, of which all but the last three are the same for all connections of a process.
# Patience and spinning in nanoseconds; all else in bytes, but for rows. PROGRESS: what comes within the patience.
# ANSWERS: address of an int64 that lookups answered are counted in. Of the connection's caller, 0 for no bound of its
# own: MOST bytes in flight; RATE: nanoseconds of its time that a thousand rows take, and METER: see `meter`. SLOW_US:
# what takes longer is slow, 0 for nothing.
PATIENCE, PROGRESS, SPIN, MAX_REQUEST, MAX_ROWS, MAX_ANSWER, INLINE, HELD, IN_FLIGHT, SHARE, LARGE_BUFFER, ANSWERS = (
    range(12)
)
MOST, RATE, METER = range(12, 15)
SLOW_US = 15
# Of memory that is emulated; see tier.py.
TIER = 16
LIMIT_WORDS = TIER + TIER_WORDS
# A caller that was idle may have so much of its time at once.
BURST_NS = 100_000_000

# int64 [n, ENTRY_WORDS], one a layer of a handle: address: of row `row_start`. counts: address of int64 [2] that rows
# and bytes are counted in.
LAYER, ID_BYTES, ROW_START, ROWS, ROW_BYTES, ADDRESS, COUNTS = range(7)
ENTRY_WORDS = 7
# int64 [MAX_HANDLES, HANDLE_WORDS]: where its layers begin among the entries, how many there are (0: Python answers),
# and the address of the times of its model: of each of queue, gather and total: the sum in microseconds and
# observations by bucket.
FIRST, LAYERS, TIMES = range(3)
HANDLE_WORDS = 3

_HEADER = frames.HEADER.size
_END_BYTES = _HEADER + frames.TIMES.size
_WORD = 8
_U = np.uint64


@njit  # type: ignore[untyped-decorator]
def _release(own: Any, of_peers: Any, slot: Any, at: Any, nbytes: Any) -> None:
    add_at(_U(own.ctypes.data) + _U(slot * _WORD), -nbytes)
    add_at(_U(of_peers.ctypes.data) + _U((at + slot) * _WORD), -nbytes)


@kernel(types.boolean(types.int64[::1], types.int64[::1], *(types.int64,) * 7))
def reserve(
    own: Any, of_peers: Any, slot: Any, at: Any, processes: Any, nbytes: Any, limit: Any, share: Any, most: Any
) -> bool:
    """`InFlight.reserve`: count bytes as in flight, unless they are too many. Any thread of any process."""
    # Counted first and asked for afterwards: of two at once, neither may miss the other.
    add_at(_U(own.ctypes.data) + _U(slot * _WORD), nbytes)
    add_at(_U(of_peers.ctypes.data) + _U((at + slot) * _WORD), nbytes)
    free = limit
    for one in range(own.size):
        free -= own[one]
    if free >= share and most == 0:  # with half of it free nobody can have more than is free
        return True
    if free >= 0:
        of_peer = np.int64(0)
        for one in range(at, at + processes):
            of_peer += of_peers[one]
        if free >= of_peer and (most == 0 or most >= of_peer):
            return True
    _release(own, of_peers, slot, at, nbytes)
    return False


@kernel(types.void(types.int64[::1], types.int64[::1], types.int64, types.int64, types.int64))
def release(own: Any, of_peers: Any, slot: Any, at: Any, nbytes: Any) -> None:
    """Count them as in flight no more."""
    _release(own, of_peers, slot, at, nbytes)


@kernel(types.int64(types.uint64, types.int64, types.int64, types.int64))
def meter(cell: Any, rows: Any, rate: Any, time_ns: Any) -> int:
    """Count rows of a caller that may have so many a second: 0, or nanoseconds until it is its turn; then none counted.

    cell: address of an int64, until when the caller has had its time. Any thread of any process. However many rows they
    are, they are let by if it is the caller's turn, and its next turn comes the later.
    """
    while True:
        until = add_at(cell, 0)
        if until > time_ns:
            return int(until - time_ns)
        then = max(until, time_ns - BURST_NS) + rows // 1000 * rate + rows % 1000 * rate // 1000
        if replace_at(cell, until, then) == until:
            return 0


@kernel(types.boolean(types.uint64, types.int64))
def claim(cell: Any, owner: Any) -> bool:
    """Have an int64 that is 0, and so nobody's, be its owner's; whether it is. Any thread of any process."""
    was = replace_at(cell, 0, owner)
    return bool(was == 0 or was == owner)


@kernel(types.void(types.uint64, view(types.float64), types.int64))
def observe(times: Any, bounds: Any, micros: Any) -> None:
    """Count a time. times: address of int64 [2 + bounds]: their sum; how many by bucket, the last without bound."""
    add_at(times, micros)
    bucket = 0
    while bucket < bounds.size and micros > bounds[bucket]:
        bucket += 1
    add_at(times + _U((1 + bucket) * _WORD), 1)


@kernel(types.void(types.uint64, types.int64))
def count(cell: Any, amount: Any) -> None:
    """Add to an int64 at an address that several threads count in."""
    add_at(cell, amount)


@njit  # type: ignore[untyped-decorator]
def _outside(entry: Any, ids: Any) -> Any:
    """Whether one of the ids, as bytes, is not held."""
    stop = entry[ROW_START] + entry[ROWS]
    if entry[ID_BYTES] == 4:
        return first_outside(ids.view(np.uint32), entry[ROW_START], stop) >= 0
    return first_outside(ids.view(np.uint64), entry[ROW_START], stop) >= 0


@njit  # type: ignore[untyped-decorator]
def _gather(entry: Any, ids: Any, out: Any) -> Any:
    rows = carray(bytes_at(_U(entry[ADDRESS])), (entry[ROWS], entry[ROW_BYTES]))
    if entry[ID_BYTES] == 4:
        return gather(rows, ids.view(np.uint32), entry[ROW_START], out)
    return gather(rows, ids.view(np.uint64), entry[ROW_START], out)


@njit  # type: ignore[untyped-decorator]
def _put_header(out: Any, at: Any, kind: Any, which: Any, number: Any, first: Any, nbytes: Any) -> Any:
    """Write a header; gives where it ends."""
    words = (_U(kind) | (_U(which) << _U(32)), number, _U(first), _U(nbytes))
    for word in range(4):
        value = words[word]
        for byte in range(8):
            out[at + 8 * word + byte] = np.uint8((value >> _U(8 * byte)) & _U(255))
    return at + _HEADER


@njit  # type: ignore[untyped-decorator]
def _answer(
    fd: Any,
    state: Any,
    limits: Any,
    words: Any,
    buffer: Any,
    handle: Any,
    entries: Any,
    out: Any,
    own: Any,
    of_peers: Any,
    slot: Any,
    peer_at: Any,
    processes: Any,
    bounds: Any,
) -> Any:
    """Answer the lookup at the buffer's beginning: ANSWERED if it was, else as `serve`."""
    scratch = state[SCRATCH:]
    first, layers = handle[FIRST], handle[LAYERS]
    number, timeout_us, nbytes = words[1], words[2], np.int64(words[3])
    # Is it what it says, and within the limits?
    ids_at, rows, answer_bytes = np.int64(_WORD) * layers, np.int64(0), np.int64(0)
    if ids_at > nbytes:
        return FRAME
    for layer in range(layers):
        entry = entries[first + layer]
        if words[4 + layer] > _U(limits[MAX_ROWS]):
            return FRAME
        counted = np.int64(words[4 + layer])
        ids_at += (counted * entry[ID_BYTES] + 7) // 8 * 8
        rows += counted
        answer_bytes += counted * entry[ROW_BYTES]
    if ids_at != nbytes or rows > limits[MAX_ROWS] or answer_bytes > limits[MAX_ANSWER]:
        return FRAME
    ids_at = np.int64(_HEADER + _WORD * layers)
    for layer in range(layers):
        entry = entries[first + layer]
        size = np.int64(words[4 + layer]) * entry[ID_BYTES]
        if _outside(entry, buffer[ids_at : ids_at + size]):
            return FRAME
        ids_at += (size + 7) // 8 * 8
    begin = now(scratch)
    until = np.int64(-1)
    if timeout_us and timeout_us < _U(1 << 50):
        until = state[ARRIVED] + np.int64(timeout_us) * 1000
        if begin >= until:
            return FRAME
    held = answer_bytes
    if answer_bytes + nbytes > limits[INLINE]:
        held = min(answer_bytes, limits[HELD])
    if not reserve(own, of_peers, slot, peer_at, processes, held, limits[IN_FLIGHT], limits[SHARE], limits[MOST]):
        return FRAME
    if limits[RATE] and meter(_U(limits[METER]), rows, limits[RATE], begin):
        _release(own, of_peers, slot, peer_at, held)
        return FRAME
    # Gathered and sent in pieces of `out`: while the system brings one of them away, the next one is gathered.
    source, at, gathered, sent = _U(out.ctypes.data), np.int64(0), np.int64(0), np.int64(1)
    tier, read, turn = limits[TIER:], np.int64(0), np.int64(0)
    if tier[LINK]:
        turn = take_turn(tier, answer_bytes, begin)
    ids_at = np.int64(_HEADER + _WORD * layers)
    for layer in range(layers):
        entry = entries[first + layer]
        counted, width = np.int64(words[4 + layer]), entry[ROW_BYTES]
        if out.size - at < _HEADER + width:
            sent = send_all(fd, source, at, until, limits[PATIENCE], scratch)
            at = np.int64(0)
        if sent > 0:
            at = _put_header(out, at, frames.ROWS, entry[LAYER], number, 0, counted * width)
        done = np.int64(0)
        while done < counted and sent > 0:
            some = min((out.size - at) // width, counted - done)
            if some == 0:
                sent = send_all(fd, source, at, until, limits[PATIENCE], scratch)
                at = np.int64(0)
                continue
            start = now(scratch)
            ids = ids_at + done * entry[ID_BYTES]
            _gather(entry, buffer[ids : ids + some * entry[ID_BYTES]], out[at : at + some * width])
            if tier[LINK]:
                read += some * width
                due = rows_due(tier, begin, turn, read, start, some * width)
                sent = sleep_until(fd, due, until, state[LEAVING : LEAVING + 1], scratch)
            gathered += now(scratch) - start
            at += some * width
            done += some
        ids_at += (counted * entry[ID_BYTES] + 7) // 8 * 8
    if sent > 0 and out.size - at < _END_BYTES:
        sent = send_all(fd, source, at, until, limits[PATIENCE], scratch)
        at = np.int64(0)
    queue_us, gather_us = (begin - state[ARRIVED]) // 1000, gathered // 1000
    total_us = (now(scratch) - state[ARRIVED]) // 1000
    if sent > 0:
        at = _put_header(out, at, frames.END, 0, number, 0, _END_BYTES - _HEADER)
        times = (_U(queue_us), _U(gather_us), _U(total_us))
        for time in range(3):
            value = times[time]
            for byte in range(8):
                out[at + 8 * time + byte] = np.uint8((value >> _U(8 * byte)) & _U(255))
        sent = send_all(fd, source, at + _END_BYTES - _HEADER, until, limits[PATIENCE], scratch)
    _release(own, of_peers, slot, peer_at, held)
    if sent <= 0:
        if sent == ENDED:
            return GONE
        return LATE_ANSWER if 0 <= until <= now(scratch) else UNREAD
    state[NUMBER], state[ANSWERED_ROWS] = np.int64(number), rows
    state[QUEUE_US], state[GATHER_US], state[TOTAL_US] = queue_us, gather_us, (now(scratch) - state[ARRIVED]) // 1000
    add_at(_U(limits[ANSWERS]), 1)
    model = _U(handle[TIMES])
    span = _U((2 + bounds.size) * _WORD)
    observe(model, bounds, queue_us)
    observe(model + span, bounds, gather_us)
    observe(model + span + span, bounds, total_us)
    for layer in range(layers):
        entry = entries[first + layer]
        counted = np.int64(words[4 + layer])
        add_at(_U(entry[COUNTS]), counted)
        add_at(_U(entry[COUNTS]) + _U(_WORD), counted * entry[ROW_BYTES])
    return ANSWERED


@kernel(
    types.int64(
        types.int64,
        types.int64[::1],
        types.int64[::1],
        types.uint8[::1],
        types.int64[:, ::1],
        types.int64[:, ::1],
        types.uint8[::1],
        types.int64[::1],
        types.int64[::1],
        types.int64,
        types.int64,
        types.int64,
        view(types.float64),
    )
)
def serve(
    fd: Any,
    state: Any,
    limits: Any,
    buffer: Any,
    handles: Any,
    entries: Any,
    out: Any,
    own: Any,
    of_peers: Any,
    slot: Any,
    at: Any,
    processes: Any,
    bounds: Any,
) -> int:
    """Answer what comes on a connection; gives why it is for Python to go on.

    CLOSED: the other side ended it, or a request was over and `state[LEAVING]` is set. FRAME: a whole frame lies at the
    buffer's beginning that is not answered here, or a header that begins none; of a lookup nothing was sent. LARGE: the
    frame there has no room in the buffer, or is over `limits[MAX_REQUEST]`. ANSWERED: a request was, and the buffer is
    larger than `limits[LARGE_BUFFER]`. SLOW_ANSWER: a request was, and took longer than `limits[SLOW_US]`.
    SLOW_REQUEST: the other side does not go on sending it. In the midst of an answer: GONE, the other side ended the
    connection; UNREAD, it does not go on receiving; LATE_ANSWER, the request's time is over.

    buffer: uint8, its size and its address multiples of 8. entries: of all handles. out: what answers are gathered
    into, a row of any entry and 128 bytes at least. own, of_peers, slot, at, processes: of `InFlight`, and where the
    peer's slots begin. bounds: of the buckets of times, in microseconds.
    """
    scratch = state[SCRATCH:]
    base = _U(buffer.ctypes.data)
    words = buffer.view(np.uint64)
    while True:
        if state[START]:
            left = state[END] - state[START]
            for one in range(left):
                buffer[one] = buffer[state[START] + one]
            state[START], state[END], state[ARRIVED] = 0, left, now(scratch)
            state[DUE], state[SEEN] = state[ARRIVED] + limits[PATIENCE], left
        if state[LEAVING]:
            return CLOSED
        # What is to be there when it is due is a megabyte more than there was, or the end of the frame.
        total, whole = np.int64(_HEADER), False
        while True:
            have = state[END]
            if not whole and have >= _HEADER:
                kind = words[0] & _U(0xFFFFFFFF)
                if kind < frames.REGISTER or kind > frames.REQUEST:
                    return FRAME
                most = frames.MAX_SMALL_BYTES if kind == frames.REGISTER else limits[MAX_REQUEST]
                if words[3] > _U(most):
                    return LARGE
                total, whole = np.int64(_HEADER) + np.int64(words[3]), True
            if have >= total:
                break
            if have == buffer.size:
                return LARGE
            until = state[DUE] if have else np.int64(-1)
            got = receive_some(fd, base + _U(have), buffer.size - have, 1, until, limits[SPIN], scratch)
            if got == ENDED:
                return CLOSED
            if got == LATE:
                if have - state[SEEN] < limits[PROGRESS]:
                    return SLOW_REQUEST
                state[DUE], state[SEEN] = now(scratch) + limits[PATIENCE], have
                continue
            if have == 0:
                state[ARRIVED] = now(scratch)
                state[DUE], state[SEEN] = state[ARRIVED] + limits[PATIENCE], got
            state[END] = have + got
        kind, which = words[0] & _U(0xFFFFFFFF), np.int64(words[0] >> _U(32))
        if kind != frames.LOOKUP or which >= handles.shape[0] or handles[which, LAYERS] == 0:
            return FRAME
        done = _answer(
            fd, state, limits, words, buffer, handles[which], entries, out, own, of_peers, slot, at, processes, bounds
        )
        if done != ANSWERED:
            return int(done)
        state[START] = total
        if 0 < limits[SLOW_US] < state[TOTAL_US]:
            return SLOW_ANSWER
        if buffer.size > limits[LARGE_BUFFER]:
            return ANSWERED
