"""One connection of the direct lane: the frames that come are read here, within bounds; answers.py answers them."""

import asyncio
from collections.abc import Callable
from typing import cast

import grpc
import numpy as np

from engrampool_proto import frames
from engrampool_server.answer.lane.answers import Answerer
from engrampool_server.answer.lane.resources import Resources
from engrampool_server.answer.lookups import SMALL_REQUEST_BYTES, RefusedError, invalid

# A connection without a ticket may stay for so long.
HELLO_S = 5.0
# How long a refusal that ends the connection may take to arrive, while what the peer still sends is thrown away.
_LINGER_S = 2.0
# Within so long a request that has begun ends or goes on by so much.
PATIENCE_S = 10.0
PROGRESS_BYTES = 1 << 20
# What frames of a stranger and of a caller are read into. A larger request has memory of its own, which grows as bytes
# come: whoever only promises them takes little.
_HELLO_BYTES = frames.HEADER.size + frames.MAX_TICKET_BYTES + 1
_FIRST_BYTES = 1 << 20
_GROWTH = 4
_MESSAGE_AT = frames.HEADER.size + frames.TIMEOUT.size


class Connection(asyncio.BufferedProtocol):
    """One caller: says hello with its ticket, then asks for one thing at a time.

    peer: whose it is; see peers.py. admit: whether a ticket lets this connection in. left: told once it is closed.
    """

    def __init__(
        self,
        resources: Resources,
        peer: str,
        admit: Callable[["Connection", bytes], bool],
        left: Callable[["Connection"], None],
    ) -> None:
        self.peer = peer
        self.answerer = Answerer(resources, peer)
        self._resources, self._admit, self._left = resources, admit, left
        self._kind = frames.HELLO  # of the frame that may come next
        self._view = self._read_buffer = memoryview(bytearray(_HELLO_BYTES))
        self._filled = 0
        self._ending = False  # what comes is thrown away
        self._unwanted: tuple[int, RefusedError] | None = None  # a request to be read to this end, then refused
        self._timer: asyncio.TimerHandle | None = None  # to the end of anything but waiting for a request

    # --- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have the peer say hello in time."""
        self.answerer.connected(cast(asyncio.Transport, transport))
        self._within(HELLO_S, self.cut, "no-hello")

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._ending or self.answerer.busy:  # whatever it is, it will not be read
            return self._resources.waste
        if self._unwanted is not None:
            return self._resources.waste[: self._unwanted[0] - self._filled]
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came."""
        if self._ending:
            return
        if self.answerer.busy:  # what comes meanwhile comes too early
            self.abort()
            return
        self._filled += nbytes
        if self._unwanted is not None:
            self._pass_over(*self._unwanted)
        elif self._filled >= frames.HEADER.size:
            self._read()
        elif self._timer is None:
            self._await_rest(0)

    def eof_received(self) -> bool:
        """A peer that says no more is told no more."""
        return False

    def pause_writing(self) -> None:
        """The system did not take all that was written."""
        self.answerer.pause()

    def resume_writing(self) -> None:
        """The system has taken all that was written."""
        self.answerer.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._no_timer()
        self.answerer.lost()
        self._left(self)

    # --- the lane's calls

    def leave(self) -> None:
        """Close, once the answer under way is sent."""
        self.answerer.leave()

    def abort(self) -> None:
        """Close at once."""
        self.answerer.abort()

    def cut(self, reason: str) -> None:
        """Close at once, for a reason to be counted."""
        self.answerer.cut(reason)

    # --- bounds

    def _within(self, seconds: float, end: Callable[..., None], *args: str) -> None:
        """Have the connection ended after that time, unless `_no_timer` is called before."""
        self._no_timer()
        self._timer = self._resources.loop.call_later(seconds, end, *args)

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _await_rest(self, before: int) -> None:
        """Have a request that has begun end or go on in time. before: bytes of it that were there the last time."""
        if before and self._filled - before < PROGRESS_BYTES:
            self.cut("slow-request")
        else:
            self._timer = self._resources.loop.call_later(PATIENCE_S, self._await_rest, self._filled)

    # --- frames

    def _read(self) -> None:
        """Look at what is there, from a header on."""
        length, head, kind = frames.HEADER.unpack_from(self._view)
        if kind != self._kind:
            self._end(_malformed(f"a frame of kind {self._kind} was due; this is of kind {kind}"))
            return
        hello = kind == frames.HELLO
        if head != (length if hello else frames.TIMEOUT.size) or head > min(length, frames.MAX_TICKET_BYTES):
            self._end(_malformed(f"a frame of kind {kind} has no head of {head} bytes out of {length}"))
            return
        if not hello and length - head > self._resources.max_request_bytes:
            text = f"the request is {length - head} bytes, at most {self._resources.max_request_bytes}; split it"
            self._end(invalid(text, "too-many-rows"))
            return
        total = frames.HEADER.size + length
        if self._filled < total:
            if self._timer is None:
                self._await_rest(0)
            if self._filled == len(self._view):
                self._grow(total)
            return
        if self._filled > total:
            self._end(_malformed("one frame at a time: wait for the answer"))
            return
        if hello:
            ticket = bytes(self._view[frames.HEADER.size : total])
            self._filled = 0
            self._greet(ticket)
            return
        if self._timer is not None:
            self._no_timer()
        (timeout_us,) = frames.TIMEOUT.unpack_from(self._view, frames.HEADER.size)
        view, self._view, self._filled = self._view, self._read_buffer, 0
        message = view[_MESSAGE_AT:total].toreadonly()
        self.answerer.ask(message, timeout_us / 1e6 if timeout_us else None, view is self._read_buffer)

    def _grow(self, total: int) -> None:
        """Have room for more of a frame of `total` bytes; where there is none, for nothing of it."""
        size = min(total, max(_FIRST_BYTES, _GROWTH * len(self._view)))
        try:
            self.answerer.reserve_request(size)
        except RefusedError as error:
            self._view = self._read_buffer
            self._unwanted = total, error
            return
        larger = np.empty(size, np.uint8).data
        larger[: self._filled] = self._view
        self._view = larger

    def _pass_over(self, total: int, error: RefusedError) -> None:
        """Refuse a request that there was no room for, once all of it came: the next one may come after it."""
        if self._filled == total:
            self._unwanted, self._filled = None, 0
            self._no_timer()
            self.answerer.refuse(error)

    def _greet(self, ticket: bytes) -> None:
        if not self._admit(self, ticket):
            text = "the ticket is not good, or no more; ask for one by OpenDirect"
            self._end(RefusedError(grpc.StatusCode.UNAUTHENTICATED, "bad-ticket", text))
            return
        self._no_timer()
        self._kind = frames.REQUEST
        self._view = self._read_buffer = memoryview(bytearray(SMALL_REQUEST_BYTES))
        self.answerer.welcome()

    def _end(self, error: RefusedError) -> None:
        """Say why, and close. What the peer still sends is read, or the system would take back what we said."""
        self._ending = True
        self.answerer.refuse_for_good(error)
        self._within(_LINGER_S, self.abort)


def _malformed(text: str) -> RefusedError:
    return invalid(text, "malformed-message")
