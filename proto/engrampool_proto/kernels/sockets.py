"""Sending and receiving without Python: the C library's calls, for loops that run without the GIL.

Sockets are named by their descriptors, memory by its address; to keep both alive is for whoever calls such a loop.
"""

import socket
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engrampool_proto.kernels.jit import kernel, view

# Instead of a number of bytes: the other side, or somebody here, ended the connection; the time is over.
ENDED, LATE = 0, -1

_U, _I = types.uint64, types.int32
_recv = types.ExternalFunction("recv", types.int64(_I, _U, _U, _I))
_send = types.ExternalFunction("send", types.int64(_I, _U, _U, _I))
_sendmsg = types.ExternalFunction("sendmsg", types.int64(_I, _U, _I))
_poll = types.ExternalFunction("poll", _I(_U, _U, _I))
_setsockopt = types.ExternalFunction("setsockopt", _I(_I, _I, _I, _U, types.uint32))
_getrandom = types.ExternalFunction("getrandom", types.int64(_U, _U, types.uint32))
_clock_gettime = types.ExternalFunction("clock_gettime", _I(_I, _U))
_DONTWAIT, _NOSIGNAL = 0x40, 0x4000
_POLLIN, _POLLOUT, _POLLOVER = 1, 4, 0x38  # the last: an error, the end, or no socket
_MONOTONIC = 1
_SOL_SOCKET, _RCVLOWAT = int(socket.SOL_SOCKET), int(socket.SO_RCVLOWAT)
# Errors that come and go (no memory for a moment) are tried again so often; to look at errno is not for compiled code.
_TRIES = 1000
# Memory that the calls need: a pollfd, a timespec, and whether what was received last was waited for; a msghdr of two
# pieces.
SCRATCH_WORDS, MESSAGE_WORDS, WAITED = 4, 11, 3


@intrinsic  # type: ignore[untyped-decorator]
def add_at(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at `address` in one step that no other thread can come between; gives what it is then."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.add(builder.atomic_rmw("add", pointer, args[1], "seq_cst"), args[1])

    return types.int64(types.uint64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def replace_at(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Put `value` in the place of the int64 at `address` if that is `expected`, in one step; gives what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 0)

    return types.int64(types.uint64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typing: Any, address: Any) -> Any:
    """The memory at `address`, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.uint64), generate


@njit  # type: ignore[untyped-decorator]
def now(scratch: Any) -> Any:
    """Nanoseconds, as time.monotonic_ns has them. scratch: int64 [SCRATCH_WORDS], of the calling thread alone."""
    _clock_gettime(np.int32(_MONOTONIC), np.uint64(scratch.ctypes.data) + np.uint64(8))
    return scratch[1] * 1_000_000_000 + scratch[2]


@njit  # type: ignore[untyped-decorator]
def _await(fd: Any, events: Any, until: Any, scratch: Any) -> Any:
    """Sleep until the socket can be used: whether it can (1), is of no use (ENDED), or is not until then (LATE)."""
    while True:
        wait_ms = np.int32(-1)
        if until >= 0:
            left = until - now(scratch)
            if left <= 0:
                return LATE
            wait_ms = np.int32(min((left + 999_999) // 1_000_000, 1_000_000))
        scratch[0] = np.int64(fd) | (np.int64(events) << 32)
        found = _poll(np.uint64(scratch.ctypes.data), np.uint64(1), wait_ms)
        if found > 0:
            happened = scratch[0] >> 48
            over = happened & _POLLOVER and (events == _POLLOUT or not happened & events)  # what came before is read
            return ENDED if over or not happened & events else 1


@njit  # type: ignore[untyped-decorator]
def _wake_at(fd: Any, nbytes: Any, scratch: Any) -> None:
    """Have the system wake who waits for the socket when so many bytes are there. Where it cannot, it wakes for any."""
    scratch[0] = nbytes
    _setsockopt(fd, np.int32(_SOL_SOCKET), np.int32(_RCVLOWAT), np.uint64(scratch.ctypes.data), np.uint32(4))


@njit  # type: ignore[untyped-decorator]
def receive_some(fd: Any, at: Any, room: Any, least: Any, until: Any, spin_ns: Any, scratch: Any) -> Any:
    """Receive up to `room` bytes, one at least; gives how many, ENDED, or LATE.

    at: address. least: sleep until so many are there, which must be on their way; late, or at the end, fewer are taken.
    To be woken for each packet of many costs both sides more than to copy it. until: as of `now`; -1 to wait for as
    long as it takes. spin_ns: how long to look without sleeping.
    """
    tries = 0
    scratch[WAITED] = 0
    spin_until = now(scratch) + spin_ns if spin_ns > 0 else 0
    while tries < _TRIES:
        spins = spin_until and now(scratch) < spin_until
        # With no time to look after, the system waits within the call itself.
        got = _recv(fd, at, np.uint64(room), np.int32(_DONTWAIT if spins or until >= 0 else 0))
        if got >= 0:
            return got
        scratch[WAITED] = 1
        if spins:
            continue
        if least > 1:
            _wake_at(fd, least, scratch)
        ready = _await(fd, _POLLIN, until, scratch)
        if least > 1:
            _wake_at(fd, 1, scratch)  # whoever waits for the socket next, in whatever way, waits for any
            if ready != 1:
                got = _recv(fd, at, np.uint64(room), np.int32(_DONTWAIT))
                return got if got > 0 else ready
        if ready != 1:
            return ready
        tries += 1
    return ENDED


@njit  # type: ignore[untyped-decorator]
def receive_all(fd: Any, at: Any, nbytes: Any, until: Any, spin_ns: Any, scratch: Any) -> Any:
    """Receive so many bytes; gives how many came until the end, or until it was late."""
    got = 0
    while got < nbytes:
        some = receive_some(fd, at + np.uint64(got), nbytes - got, 1, until, spin_ns if got == 0 else 0, scratch)
        if some <= 0:
            break
        got += some
    return got


@njit  # type: ignore[untyped-decorator]
def send_all(fd: Any, at: Any, nbytes: Any, until: Any, patience_ns: Any, scratch: Any) -> Any:
    """Send so many bytes; gives `nbytes`, ENDED, or LATE.

    until: as of `now`, for all of it; -1 for none. patience_ns: within so long some of them are taken.
    """
    sent, tries = 0, 0
    while sent < nbytes and tries < _TRIES:
        some = _send(fd, at + np.uint64(sent), np.uint64(nbytes - sent), np.int32(_DONTWAIT | _NOSIGNAL))
        if some > 0:
            sent += some
            tries = 0
            continue
        limit = now(scratch) + patience_ns
        if 0 <= until < limit:
            limit = until
        ready = _await(fd, _POLLOUT, limit, scratch)
        if ready != 1:
            return ready
        tries += 1
    return nbytes if sent == nbytes else ENDED


@njit  # type: ignore[untyped-decorator]
def send_at_once(fd: Any, first: Any, rest: Any, scratch: Any) -> Any:
    """Whether the system took two arrays without waiting. What it took of less is of no use to anybody.

    Arrays and no addresses: numba lets go of its caller's own as soon as nothing refers to them. scratch: int64
    [MESSAGE_WORDS].
    """
    scratch[:] = 0
    scratch[2], scratch[3] = np.int64(scratch.ctypes.data) + 56, 2  # of the pieces, and how many
    scratch[7], scratch[8] = np.int64(first.ctypes.data), first.nbytes
    scratch[9], scratch[10] = np.int64(rest.ctypes.data), rest.nbytes
    sent = _sendmsg(fd, np.uint64(scratch.ctypes.data), np.int32(_DONTWAIT | _NOSIGNAL))
    return sent == first.nbytes + rest.nbytes


@njit  # type: ignore[untyped-decorator]
def random_word(scratch: Any) -> Any:
    """A uint64 that nobody can guess, nor a process that this one is forked from; 0 where there is none."""
    got = _getrandom(np.uint64(scratch.ctypes.data), np.uint64(8), np.uint32(0))
    return np.uint64(scratch[0]) if got == 8 else np.uint64(0)


@kernel(types.int64(types.int32, types.uint8[::1], types.int64, types.int64, types.int64, types.int64[::1]))
def receive_into(fd: Any, buffer: Any, start: Any, stop: Any, until: Any, scratch: Any) -> int:
    """Receive into buffer[start:stop]; gives how many bytes came until the end, or until it was late."""
    got: int = receive_all(fd, np.uint64(buffer.ctypes.data) + np.uint64(start), stop - start, until, 0, scratch)
    return got


@kernel(types.int64(types.int32, view(types.uint8), types.int64, types.int64, types.int64[::1]))
def send_from(fd: Any, data: Any, until: Any, patience_ns: Any, scratch: Any) -> int:
    """Send all of `data`; gives its size, which is not 0, ENDED, or LATE. until, patience_ns: as of `send_all`."""
    sent: int = send_all(fd, np.uint64(data.ctypes.data), data.size, until, patience_ns, scratch)
    return sent


@kernel(types.int64(types.int32, types.uint8[::1], types.int64, types.int64, types.int64, types.int64[::1]))
def pass_over(fd: Any, waste: Any, nbytes: Any, patience_ns: Any, progress: Any, scratch: Any) -> int:
    """Receive so many bytes that nobody wants, into `waste`; gives `nbytes`, ENDED, or LATE.

    progress: so many of them come within each patience.
    """
    until, seen, came = now(scratch) + patience_ns, np.int64(0), np.int64(0)
    while came < nbytes:
        room = min(waste.size, nbytes - came)
        some = receive_some(fd, np.uint64(waste.ctypes.data), room, 1, until, 0, scratch)
        if some == LATE and came - seen >= progress:
            until, seen = now(scratch) + patience_ns, came
            continue
        if some <= 0:
            return int(some)
        came += some
    return int(nbytes)
