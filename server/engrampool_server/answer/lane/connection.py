"""One connection of the direct lane, and its thread: within `serve` as long as what comes is ordinary, else here."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import grpc
import numpy as np
import numpy.typing as npt

from engrampool_proto import frames, wire
from engrampool_proto.errors import WireError
from engrampool_proto.kernels import serve
from engrampool_proto.kernels.sockets import LATE, pass_over, receive_into
from engrampool_proto.security.tls_socket import TlsSocket, line_of
from engrampool_server.answer.emulation import wake_promptly
from engrampool_server.answer.in_flight import Account, Peer
from engrampool_server.answer.lane.answers import Answerer, CutError
from engrampool_server.answer.lane.handles import Handles
from engrampool_server.answer.lane.resources import GATHERED_BYTES, Buffer, Resources
from engrampool_server.answer.lookups import SMALL_REQUEST_BYTES, Job, Refusals, RefusedError, invalid
from engrampool_server.telemetry import log

# A connection without a ticket may stay for so long.
HELLO_S = 5.0
# How long a refusal that ends the connection may take to arrive, while what the peer still sends is thrown away.
_LINGER_S = 2.0
# Within so long a request that has begun ends or goes on by so much.
PATIENCE_S = 10.0
PROGRESS_BYTES = 1 << 20
# A larger request has memory of its own, which grows as bytes come: whoever only promises them takes little.
_FIRST_BYTES = 1 << 20
_GROWTH = 4
# Why the loop has a connection cut off, as it is counted; "" for a caller that left.
_CUT = {serve.SLOW_REQUEST: "slow-request", serve.GONE: "", serve.UNREAD: "unread-answer", serve.LATE_ANSWER: ""}


class Connection:
    """One caller: says hello with its ticket, then asks for one thing after the other.

    peer: whose it is; see peers.py. account: of the caller that it was admitted for, and key: of the credential; None
    before, and where everybody may come. admit: whether a ticket lets this connection in; may raise RefusedError.
    left: told once it is closed. Both are called by its thread.
    """

    def __init__(
        self,
        resources: Resources,
        accepted: socket.socket,
        peer: str,
        admit: Callable[["Connection", bytes], bool],
        left: Callable[["Connection"], None],
    ) -> None:
        self.peer = peer
        self.key: bytes | None = None
        self.account: Account | None = None
        self._resources, self._socket, self._admit, self._left = resources, accepted, admit, left
        self._state = np.zeros(serve.STATE_WORDS, np.int64)
        leaving = self._state[serve.LEAVING : serve.LEAVING + 1]
        self._line = line_of(accepted)  # what the socket is for kernels
        self._answerer = Answerer(resources, peer, self._line, leaving)
        self._closing = threading.Lock()  # so that nobody shuts a descriptor that is another's by then
        self._limiting = threading.Lock()  # of what the caller may have, which changes while it is connected
        self._closed = self._cut_off = False
        self._limits: npt.NDArray[np.int64] | None = None
        self._buffer: Buffer = np.empty(0, np.uint8)

    def start(self) -> None:
        """Begin. Raises RuntimeError if the system gives no thread."""
        threading.Thread(target=self._run, name="direct", daemon=True).start()

    # --- the lane's calls, from any thread

    @property
    def received(self) -> int:
        """Bytes of the request that is coming."""
        return int(self._state[serve.END] - self._state[serve.START])

    def is_of(self, key: bytes, account: Account) -> None:
        """A caller that is known by name has it; to be called before it is admitted."""
        self.account = self._answerer.peer = account
        self.key = key  # last: who sees it looks for the account

    def may(self, account: Account) -> None:
        """The caller's limits are these by now; its place stays. From any thread."""
        with self._limiting:
            self.account = self._answerer.peer = account
            self._limit()

    def _limit(self) -> None:
        account, words = self.account, self._limits
        if account is not None and words is not None:
            words[serve.MOST], words[serve.METER], words[serve.RATE] = account.most_bytes, account.meter, account.rate

    def leave(self) -> None:
        """Close, once the answer under way is sent."""
        self._state[serve.LEAVING] = 1
        self._shut(socket.SHUT_RD)

    def abort(self) -> None:
        """Close at once."""
        self._state[serve.LEAVING] = 1
        self._shut(socket.SHUT_RDWR)

    def cut(self, reason: str) -> None:
        """Close at once, for a reason to be counted."""
        if not self._cut_off:
            self._cut_off = True
            self._resources.cut(reason)
        self.abort()

    def _shut(self, how: int) -> None:
        with self._closing, suppress(OSError):
            if not self._closed:
                self._socket.shutdown(how)

    # --- its thread

    def _run(self) -> None:
        if self._resources.lookups.emulation is not None:
            wake_promptly()
        try:
            if self._greet():
                self._serve()
        except CutError as error:
            if error.reason:
                self.cut(error.reason)
        except BaseException as error:  # no caller can be told; this connection ends
            self._resources.ended(grpc.StatusCode.INTERNAL)
            self.cut("failed")
            log.event("direct-failed", level="error", error=repr(error))
        finally:
            try:
                self._answerer.let_go()
                with self._closing:
                    self._closed = True
                    self._socket.close()
            finally:  # or a server that stops would wait for it for ever
                self._left(self)

    def _greet(self) -> bool:
        """Have the peer say hello in time; whether it is let in. Raises CutError."""
        self._buffer = np.empty(frames.HEADER.size + frames.MAX_TICKET_BYTES, np.uint8)
        until = self._now() + round(HELLO_S * 1e9)
        self._agree(until)
        (kind,) = self._receive_hello(0, 4, until)[:4].view(np.uint32)
        if kind != frames.HELLO:
            return self._end(_malformed(f"a frame of kind {frames.HELLO} was due; this is of kind {kind}"))
        _, _, _, _, nbytes = frames.HEADER.unpack_from(self._receive_hello(4, frames.HEADER.size, until).data)
        if nbytes > frames.MAX_TICKET_BYTES:
            return self._end(_malformed(f"a ticket has no {nbytes} bytes"))
        stop = frames.HEADER.size + nbytes
        ticket = self._receive_hello(frames.HEADER.size, stop, until)[frames.HEADER.size : stop].tobytes()
        try:
            admitted = self._admit(self, ticket)
        except RefusedError as error:
            return self._end(error)
        if not admitted:
            text = "the ticket is not good, or no more; ask for one by OpenDirect"
            return self._end(RefusedError(grpc.StatusCode.UNAUTHENTICATED, "bad-ticket", text))
        self._answerer.send(frames.frame(frames.READY))
        return True

    def _agree(self, until: int) -> None:
        """Where the lane is inside TLS, agree on that. Raises CutError."""
        if not isinstance(self._socket, TlsSocket):
            return
        try:
            self._socket.handshake(until / 1e9)
        except TimeoutError:
            raise CutError("no-hello") from None
        except ConnectionAbortedError:
            raise CutError("") from None
        except OSError:
            self._drain(self._socket.fileno())  # or the system would take back what the peer is told
            raise CutError("handshake") from None

    def _receive_hello(self, start: int, stop: int, until: int) -> Buffer:
        came = receive_into(self._line, self._buffer, start, stop, until, self._state[serve.SCRATCH :])
        if came < stop - start:
            raise CutError("no-hello" if self._now() >= until else "")
        return self._buffer

    def _serve(self) -> None:
        """Answer until the connection ends. Raises CutError."""
        resources, state = self._resources, self._state
        small = self._buffer = np.empty(SMALL_REQUEST_BYTES, np.uint8)
        gathered = np.empty(GATHERED_BYTES, np.uint8)
        limits = resources.limits(PATIENCE_S, PROGRESS_BYTES)
        with self._limiting:  # they may be others at this moment
            self._limits = limits
            self._limit()
        peer: Peer = self.account or self.peer
        handles = Handles(resources.lookups, resources.metrics, GATHERED_BYTES // 2)
        bound = resources.lookups.in_flight
        slots, of_peers = bound.arrays
        place = bound.place_of(peer)
        while True:
            why = serve.serve(
                self._line,
                state,
                limits,
                self._buffer,
                handles.handles,
                handles.entries,
                gathered,
                slots,
                of_peers,
                bound.slot,
                place,
                bound.processes,
                resources.buckets_us,
            )
            if why == serve.CLOSED:
                return
            if why in _CUT:
                if why != serve.SLOW_REQUEST:
                    resources.ended(grpc.StatusCode.CANCELLED)
                raise CutError(_CUT[why])
            if why == serve.LARGE:
                if not self._grow(small):
                    return
                continue
            if why == serve.SLOW_ANSWER:
                number, rows, *micros = state[serve.NUMBER : serve.TOTAL_US + 1].tolist()
                number &= (1 << 64) - 1
                resources.lookups.slow.note("Direct", number, self.peer, rows, wire.ServerTimes(*micros))
            if why == serve.FRAME and not self._answer_frame(handles):
                return
            self._answerer.let_go()
            if self._buffer is not small:
                start, end = state[serve.START], state[serve.END]  # less than a word
                # Not at the beginning, as of a request whose time began before.
                small[1 : 1 + end - start] = self._buffer[start:end]
                self._buffer, state[serve.START], state[serve.END] = small, 1, 1 + end - start

    def _answer_frame(self, handles: Handles) -> bool:
        """Do what the frame at the buffer's beginning asks for. False if that ends the connection; raises CutError."""
        state = self._state
        kind, which, number, first, nbytes = frames.HEADER.unpack_from(self._buffer.data)
        if kind not in (frames.REGISTER, frames.LOOKUP, frames.REQUEST):
            return self._end(_malformed(f"a request was due; this is a frame of kind {kind}"))
        total = frames.HEADER.size + nbytes
        body = self._buffer[frames.HEADER.size : total].data.toreadonly()
        lookups, arrived = self._resources.lookups, int(state[serve.ARRIVED])
        if kind == frames.REGISTER:
            try:
                if nbytes > frames.MAX_SMALL_BYTES:
                    raise WireError(f"a registration has no {nbytes} bytes")
                handles.register(which, wire.parse_request(body))
            except Refusals as error:
                return self._end(_malformed(str(error)))
        elif kind == frames.LOOKUP:

            def read() -> Job:
                return lookups.check_request(handles.request(which, body))

            self._answerer.answer(read, nbytes, number, arrived, first)
        else:
            self._answerer.answer(partial(lookups.check, body), nbytes, number, arrived, first)
        state[serve.START] = total
        return True

    def _grow(self, small: Buffer) -> bool:
        """Have room for more of the frame at the buffer's beginning; where there is none, for nothing of it.

        False if the connection is to end; raises CutError.
        """
        state = self._state
        kind, _, number, _, nbytes = frames.HEADER.unpack_from(self._buffer.data)
        if kind == frames.REGISTER:
            return self._end(_malformed(f"a registration has no {nbytes} bytes"))
        if nbytes > self._resources.max_request_bytes:
            text = f"the request is {nbytes} bytes, at most {self._resources.max_request_bytes}; split it"
            return self._end(invalid(text, "too-many-rows"), number)
        total, came = frames.HEADER.size + nbytes, int(state[serve.END])
        size = min(frames.padded(total), max(_FIRST_BYTES, _GROWTH * len(self._buffer)))
        try:
            self._answerer.reserve_request(size)
            larger = self._resources.take_buffer(size)
        except RefusedError as error:
            scratch = state[serve.SCRATCH :]
            patience = round(PATIENCE_S * 1e9)
            passed = pass_over(self._line, small, total - came, patience, PROGRESS_BYTES, scratch)
            if passed <= 0:
                raise CutError("slow-request" if passed == LATE else "") from None
            self._buffer, state[serve.START], state[serve.END] = small, 0, 0
            self._answerer.refuse(error, number)
            return True
        larger[:came] = self._buffer[:came]
        self._buffer = larger
        return True

    def _end(self, error: Exception, number: int = 0) -> bool:
        """Say why, and close. What the peer still sends is read, or the system would take back what we said."""
        self._answerer.refuse(error, number)
        self._drain(self._line)
        return False

    def _drain(self, line: int) -> None:
        """Say no more, and read what the peer still sends, for a while."""
        self._shut(socket.SHUT_WR)
        until, scratch = self._now() + round(_LINGER_S * 1e9), self._state[serve.SCRATCH :]
        waste = np.empty(SMALL_REQUEST_BYTES, np.uint8)
        came = len(waste)
        while came == len(waste) and self._now() < until:  # of whoever sends without a pause nothing is ever late
            came = receive_into(line, waste, 0, len(waste), until, scratch)

    @staticmethod
    def _now() -> int:
        return time.monotonic_ns()


def _malformed(text: str) -> RefusedError:
    return invalid(text, "malformed-message")
