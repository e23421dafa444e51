"""A socket inside TLS: for Python as a blocking one with the system's timeouts, for compiled loops by its `line`."""

import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from engrampool_proto.security import openssl

# As kernels/sockets.py has them, which a client without numba does not import.
_SECURED = 1 << 62
_CALLS = ("SSL_read", "SSL_write", "SSL_has_pending", "SSL_get_error", "ERR_clear_error", "BIO_ctrl")
_SSL = 1
# What is sent at a time: a record, which OpenSSL takes whole or not at all.
_PIECE = 16 << 10
_TIMEVAL = struct.Struct("@ll")
_NOT_YET = -1
_BODY = b"RB"


class TlsSocket(socket.socket):
    """Takes the place of a connected socket. To be used by one thread at a time; `shutdown` may be called by any.

    line: what it is for kernels. There is no goodbye inside TLS: the end is the connection's.
    """

    def __init__(self, plain: socket.socket, context: openssl.Context, host: str = "") -> None:
        """plain: closed if this fails. host: whose certificate the server must have, for a client. Raises OSError."""
        super().__init__(fileno=plain.detach())
        self._of_process = os.getpid()
        self._limits_s = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}
        try:
            self.setblocking(False)
            self._calls, self._ssl = openssl.library(), openssl.new_ssl(context, self.fileno(), host)
        except BaseException:
            super().close()
            raise
        self._keeps = self._calls.SSL_get_wbio(self._ssl) if context.server else 0
        self._words = np.array([self.fileno(), self._ssl, *map(openssl.address_of, _CALLS), self._keeps], np.int64)
        self.line = _SECURED + self._words.ctypes.data

    def __del__(self) -> None:
        """Only here OpenSSL lets go of its memory: whoever is in a compiled loop has a reference.

        In the child of a fork it may be half changed, by a thread that is not there.
        """
        self.close()
        if hasattr(self, "_ssl") and os.getpid() == self._of_process:
            self._calls.SSL_free(self._ssl)

    def close(self) -> None:
        """Give the descriptor back."""
        if hasattr(self, "_words"):
            self._words[_SSL] = 0
        super().close()

    def handshake(self, until: float) -> None:
        """Agree on keys, and on who the other side is. until: by time.monotonic. Raises OSError.

        TimeoutError where that takes too long, ConnectionAbortedError where the other side left without a word.
        """
        calls = self._calls
        while True:
            calls.ERR_clear_error()
            done = calls.SSL_do_handshake(self._ssl)
            if done == 1:
                return
            error = calls.SSL_get_error(self._ssl, done)
            if error in (openssl.SYSCALL, openssl.ZERO_RETURN):
                raise ConnectionAbortedError("no TLS with it: the other side closed the connection")
            if error not in (openssl.WANT_READ, openssl.WANT_WRITE):
                raise ConnectionError(f"no TLS with it: {openssl.reason(self._ssl)}")
            if not self._wait(select.POLLIN if error == openssl.WANT_READ else select.POLLOUT, until):
                raise TimeoutError("no TLS with it: the other side takes too long")

    def setsockopt(self, level: int, option: int, value: Any, *rest: Any) -> None:
        """As of a socket. The system's timeouts are kept here, as the descriptor itself never blocks."""
        if level == socket.SOL_SOCKET and option in self._limits_s:
            seconds, micros = _TIMEVAL.unpack(value)
            self._limits_s[option] = seconds + micros / 1e6
        else:
            super().setsockopt(level, option, value, *rest)

    # --- receiving

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As of a socket."""
        place = memoryview(buffer)
        return self.recvmsg_into([place[: nbytes or len(place)]], 0, flags)[0]

    def recv(self, nbytes: int, flags: int = 0) -> bytes:
        """As of a socket. With MSG_PEEK, of a record that came in part: a byte of no meaning."""
        place = bytearray(nbytes)
        if not flags & socket.MSG_PEEK:
            return bytes(place[: self.recv_into(place, 0, flags)])
        got = self._take(memoryview(place), self._calls.SSL_peek)
        if got == _NOT_YET:
            calls = self._calls  # of one whose header was read, and no more, the body is waited for
            if not calls.SSL_has_pending(self._ssl) and calls.SSL_rstate_string(self._ssl) != _BODY:
                raise BlockingIOError
            got = 1
        return bytes(place[:got])

    def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, Any]:
        """As of a socket, without anything beside the bytes."""
        until, total = self._until(socket.SO_RCVTIMEO, flags), 0
        for buffer in buffers:
            place, came = memoryview(buffer).cast("B"), 0
            while came < len(place):
                got = self._take(place[came:], self._calls.SSL_read)
                if got > 0:
                    came += got
                    continue
                whole = total + came and not flags & socket.MSG_WAITALL
                if got == _NOT_YET and not whole and self._wait(select.POLLIN, until):
                    continue
                if got == _NOT_YET and not total + came:
                    raise BlockingIOError
                return total + came, [], 0, None
            total += came
        return total, [], 0, None

    def _take(self, place: memoryview, call: Any) -> int:
        """Bytes that are there; 0 at the end, _NOT_YET. Raises ConnectionError."""
        if self.fileno() < 0:
            raise OSError("the connection is closed")
        calls = self._calls
        calls.ERR_clear_error()
        got = int(call(self._ssl, ctypes.addressof(ctypes.c_char.from_buffer(place)), min(len(place), 1 << 30)))
        if got > 0:
            return got
        error = calls.SSL_get_error(self._ssl, got)
        if error == openssl.ZERO_RETURN:
            return 0
        if error == openssl.WANT_READ:
            return _NOT_YET
        raise ConnectionError(openssl.reason())

    # --- sending

    def send(self, data: Any, flags: int = 0) -> int:
        """As of a socket."""
        return self.sendmsg([data], (), flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As of a socket; all of it within the time of one call. Raises TimeoutError."""
        if self.send(data, flags) < len(data):
            raise TimeoutError("the other side takes nothing")

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        """As of a socket, without anything beside the bytes: those that were taken in time."""
        data = b"".join(buffers)
        until, sent, calls = self._until(socket.SO_SNDTIMEO, flags), 0, self._calls
        while sent < len(data):
            if self.fileno() < 0:
                raise OSError("the connection is closed")
            calls.ERR_clear_error()
            piece = data[sent : sent + _PIECE]
            some = calls.SSL_write(self._ssl, piece, len(piece))
            if some > 0:
                sent += some
                continue
            if calls.SSL_get_error(self._ssl, some) != openssl.WANT_WRITE:
                raise ConnectionError(openssl.reason())
            if not self._wait(select.POLLOUT, until):
                if sent:
                    return sent
                raise BlockingIOError
        while self._keeps and calls.BIO_ctrl(self._keeps, openssl.FLUSH, 0, None) <= 0:
            if not self._wait(select.POLLOUT, until):
                raise BlockingIOError
        return sent

    # --- waiting

    def _until(self, option: int, flags: int) -> float:
        """When a call that begins now comes back, by time.monotonic."""
        if flags & socket.MSG_DONTWAIT:
            return 0.0
        limit = self._limits_s[option]
        return time.monotonic() + limit if limit else float("inf")

    def _wait(self, events: int, until: float) -> bool:
        """Whether the socket can be used by then, or is over."""
        left = until - time.monotonic()
        if left <= 0:
            return False
        poll = select.poll()
        poll.register(self.fileno(), events)
        return bool(poll.poll(None if left == float("inf") else left * 1e3))


def line_of(one: socket.socket) -> int:
    """What a socket is for kernels."""
    return one.line if isinstance(one, TlsSocket) else one.fileno()
