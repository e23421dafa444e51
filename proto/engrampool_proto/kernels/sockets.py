"""Sending and receiving without Python: the C library's calls, for loops that run without the GIL.

Sockets are named by their descriptors, those inside TLS as `SECURED` says, memory by its address; to keep all alive is
for whoever calls such a loop.
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
# A socket inside TLS is named by SECURED plus the address of nine int64: its descriptor, the SSL of OpenSSL (0 once it
# is closed), the addresses of SSL_read, SSL_write, SSL_has_pending, SSL_get_error, ERR_clear_error and BIO_ctrl, and
# the BIO that keeps records until it is told to send them, 0 for none.
SECURED = 1 << 62
DESCRIPTOR, SSL, READ, WRITE, PENDING, ERROR, CLEAR, CONTROL, KEEPS = range(9)
_FLUSH = 11
_WANT_READ = 2
_NOTHING = np.uint64(0)
# OpenSSL may hold so much of a record that is not whole, of which the system says nothing any more.
_OF_RECORD = 17 << 10
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


@intrinsic  # type: ignore[untyped-decorator]
def _word_at(typing: Any, address: Any) -> Any:
    """The int64 at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call(typing: Any, function: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Call a function of C's at an address, which gives an int. One with fewer arguments leaves the others unread."""
    word = ir.IntType(64)
    shape = ir.FunctionType(ir.IntType(32), [word] * 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.inttoptr(args[0], shape.as_pointer()), args[1:])

    return types.int32(types.int64, types.int64, types.uint64, types.int64, types.int64), generate


@njit  # type: ignore[untyped-decorator]
def _of(fd: Any, which: Any) -> Any:
    """A word of a socket inside TLS."""
    return _word_at(np.uint64(fd - SECURED) + np.uint64(8 * which))


@njit  # type: ignore[untyped-decorator]
def descriptor(fd: Any) -> Any:
    """The descriptor of a socket that is named so."""
    return np.int32(_of(fd, DESCRIPTOR) if fd >= SECURED else fd)


@njit  # type: ignore[untyped-decorator]
def _receive(fd: Any, at: Any, room: Any, flags: Any) -> Any:
    """As recv does it, but inside TLS it never waits: gives bytes, ENDED, or -1 where there is nothing as yet."""
    if fd < SECURED:
        return _recv(np.int32(fd), at, np.uint64(room), np.int32(flags))
    got = np.int64(0)
    while got < room:
        ssl, some = _of(fd, SSL), np.int32(0)
        if ssl:
            _call(_of(fd, CLEAR), 0, _NOTHING, 0, 0)
            some = _call(_of(fd, READ), ssl, at + np.uint64(got), min(room - got, 1 << 30), 0)
        if some <= 0:  # what it is that comes after bytes is found the next time
            if got == 0 and ssl and _call(_of(fd, ERROR), ssl, np.uint64(some), 0, 0) == _WANT_READ:
                return np.int64(-1)
            break
        got += some
        if not _call(_of(fd, PENDING), ssl, _NOTHING, 0, 0):
            break
    return got


@njit  # type: ignore[untyped-decorator]
def _give(fd: Any, at: Any, nbytes: Any) -> Any:
    """As send does it without waiting: how many bytes are taken, or no more than 0."""
    if fd < SECURED:
        return _send(np.int32(fd), at, np.uint64(nbytes), np.int32(_DONTWAIT | _NOSIGNAL))
    ssl = _of(fd, SSL)
    if not ssl:
        return np.int64(-1)
    _call(_of(fd, CLEAR), 0, _NOTHING, 0, 0)
    return np.int64(_call(_of(fd, WRITE), ssl, at, min(nbytes, 1 << 30), 0))


@njit  # type: ignore[untyped-decorator]
def _given(fd: Any) -> Any:
    """Whether the system has taken all that `_give` took."""
    if fd < SECURED or not _of(fd, KEEPS):
        return True
    return _of(fd, SSL) != 0 and _call(_of(fd, CONTROL), _of(fd, KEEPS), np.uint64(_FLUSH), 0, 0) > 0


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
        scratch[0] = np.int64(descriptor(fd)) | (np.int64(events) << 32)
        found = _poll(np.uint64(scratch.ctypes.data), np.uint64(1), wait_ms)
        if found > 0:
            happened = scratch[0] >> 48
            over = happened & _POLLOVER and (events == _POLLOUT or not happened & events)  # what came before is read
            return ENDED if over or not happened & events else 1


@njit  # type: ignore[untyped-decorator]
def _wake_at(fd: Any, nbytes: Any, scratch: Any) -> None:
    """Have the system wake who waits for the socket when so many bytes are there. Where it cannot, it wakes for any."""
    scratch[0] = nbytes if fd < SECURED else max(1, nbytes - _OF_RECORD)
    _setsockopt(
        descriptor(fd), np.int32(_SOL_SOCKET), np.int32(_RCVLOWAT), np.uint64(scratch.ctypes.data), np.uint32(4)
    )


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
        got = _receive(fd, at, room, _DONTWAIT if spins or until >= 0 else 0)
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
                got = _receive(fd, at, room, _DONTWAIT)
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
    while (sent < nbytes or not _given(fd)) and tries < _TRIES:
        some = _give(fd, at + np.uint64(sent), nbytes - sent) if sent < nbytes else 0
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
    return nbytes if tries < _TRIES else ENDED


@njit  # type: ignore[untyped-decorator]
def send_at_once(fd: Any, first: Any, rest: Any, scratch: Any) -> Any:
    """Whether the system took two arrays without waiting. What it took of less is of no use to anybody.

    Arrays and no addresses: numba lets go of its caller's own as soon as nothing refers to them. scratch: int64
    [MESSAGE_WORDS].
    """
    if fd >= SECURED:
        both = np.empty(first.nbytes + rest.nbytes, np.uint8)
        both[: first.nbytes], both[first.nbytes :] = first.view(np.uint8), rest.view(np.uint8)
        sent, some = np.int64(0), np.int64(1)
        while some > 0 and sent < both.size:
            some = _give(fd, np.uint64(both.ctypes.data) + np.uint64(sent), both.size - sent)
            sent += max(some, 0)
        return sent == both.size and _given(fd)
    scratch[:] = 0
    scratch[2], scratch[3] = np.int64(scratch.ctypes.data) + 56, 2  # of the pieces, and how many
    scratch[7], scratch[8] = np.int64(first.ctypes.data), first.nbytes
    scratch[9], scratch[10] = np.int64(rest.ctypes.data), rest.nbytes
    sent = _sendmsg(np.int32(fd), np.uint64(scratch.ctypes.data), np.int32(_DONTWAIT | _NOSIGNAL))
    return sent == first.nbytes + rest.nbytes


@njit  # type: ignore[untyped-decorator]
def random_word(scratch: Any) -> Any:
    """A uint64 that nobody can guess, nor a process that this one is forked from; 0 where there is none."""
    got = _getrandom(np.uint64(scratch.ctypes.data), np.uint64(8), np.uint32(0))
    return np.uint64(scratch[0]) if got == 8 else np.uint64(0)


@kernel(types.int64(types.int64, types.uint8[::1], types.int64, types.int64, types.int64, types.int64[::1]))
def receive_into(fd: Any, buffer: Any, start: Any, stop: Any, until: Any, scratch: Any) -> int:
    """Receive into buffer[start:stop]; gives how many bytes came until the end, or until it was late."""
    got: int = receive_all(fd, np.uint64(buffer.ctypes.data) + np.uint64(start), stop - start, until, 0, scratch)
    return got


@kernel(types.int64(types.int64, view(types.uint8), types.int64, types.int64, types.int64[::1]))
def send_from(fd: Any, data: Any, until: Any, patience_ns: Any, scratch: Any) -> int:
    """Send all of `data`; gives its size, which is not 0, ENDED, or LATE. until, patience_ns: as of `send_all`."""
    sent: int = send_all(fd, np.uint64(data.ctypes.data), data.size, until, patience_ns, scratch)
    return sent


@kernel(types.int64(types.int64, types.uint8[::1], types.int64, types.int64, types.int64, types.int64[::1]))
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
