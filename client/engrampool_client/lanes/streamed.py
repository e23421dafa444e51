"""A small lookup over gRPC: begun in the thread of whoever asks, received in whichever thread comes for its rows."""

import time
from collections.abc import Callable
from contextlib import suppress
from math import inf

import grpc

from engrampool_client.compute.served import ServedModel
from engrampool_client.errors import DeadlineError, EngrampoolError, PoolError, from_rpc
from engrampool_client.lanes.grpc import GrpcLane, new_number
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Landing
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.small import Small
from engrampool_client.stats import AT_ONCE_S, Answered
from engrampool_proto import wire

# Smaller answers are one message, for which a thread of the client waits: another one costs all rows more than the
# first layer gains.
STREAMED_ABOVE_BYTES = 256 << 10


class StreamedRequest:
    """A call that was begun, whose answer has a message a layer at least. One thread at a time, but for `shut`.

    number: see `Request`. times: the server's, once all rows are there. The end of the call, which comes after them, is
    nobody's to wait for: `GrpcLane.end_calls` takes it in.

    small, timed: see `Request`. gRPC waits for the next message without a time of its own.
    """

    small = timed = False

    def __init__(
        self,
        lane: GrpcLane,
        small: Small,
        served: ServedModel,
        deadline: float,
        answered: Answered,
        late: Callable[[DeadlineError], None],
    ) -> None:
        """Begins the call. deadline: by time.monotonic.

        answered: told once all rows are there. late: told where the server let a deadline pass.
        Raises ValueError where the lane is closed, which is gRPC's way to say so.
        """
        self._lane, self._deadline, self._answered, self._late = lane, deadline, answered, late
        self._message = b""  # that came, and was not taken in
        self._asked_at, self.number = time.monotonic(), new_number()
        # Until the first of it came, as far as somebody waited for it; inf before.
        self._first_s: float | None = inf
        asked = wire.LookupRequest(*small.what[:2], small.tables(served.spec))
        connection = self._connection = lane.enter()
        stream = None
        try:
            message = wire.encode_request(asked, self.number)
            stream = self._stream = connection.begin(message, max(0.0, deadline - time.monotonic()))
            connection.streams.add(stream)
            # While the server is at work.
            shapes = {layer: rows.shape for layer, rows in small.rows.items()}
            self._exchange = Exchange(served, asked, Landing(Delivery(list(shapes)), shapes, small.rows))
            self._places = {layer: place for place, layer in enumerate(shapes)}
            self._traced = None
            if small.trace is not None:
                number, at = self.number, self._asked_at
                self._traced = small.trace.asked(lane.target, "grpc", small.nbytes, number, at)
        except BaseException:
            if stream is not None:
                connection.ending.append(stream)
            lane.leave(connection)
            raise

    @property
    def times(self) -> wire.ServerTimes | None:
        """See above."""
        return self._exchange.times

    def ready(self, until: float, spin_s: float) -> Came | None:
        """Wait for the next message, where its rows cannot be written yet; None if `take` is to follow.

        until: 0 for what is there already. What else the call fails with is found out by whoever asks again. Raises
        DeadlineError, ProtocolError.
        """
        connection, landing = self._connection, self._exchange.landing
        if self._message or landing.ready:
            return Came.NOTHING if connection.lost else None
        if landing.complete:
            first_s = None if self._first_s == inf else self._first_s
            if self._traced is not None:
                self._traced.answered(self.times, first_s)
            self._answered(self._exchange.answer_bytes, self.times, first_s, self.number)
            return Came.ALL
        if connection.lost:
            return Came.NOTHING
        if until <= 0:
            return Came.LATER
        begin = time.monotonic()
        try:
            self._message = next(self._stream, b"")
            if self._first_s == inf:
                now = time.monotonic()
                waited = begin - self._asked_at < AT_ONCE_S or now - begin > AT_ONCE_S
                self._first_s = now - self._asked_at if waited else None
        except grpc.RpcError as failed:
            error: PoolError = from_rpc(failed, self._lane.target)
            error.number = self.number
            if self._traced is not None:
                self._traced.gave_up(str(error))
            if isinstance(error, DeadlineError):
                raise error from failed
            return Came.NOTHING
        except KeyboardInterrupt:
            connection.lose(self._stream)
            raise
        if not self._message:
            landing.check_complete()
        return None

    def take(self, until: float, spin_s: float) -> int | Came:
        """Take in what came; the place of a layer that is whole. Raises ProtocolError."""
        landing = self._exchange.landing
        try:
            if self._message:
                self._exchange.add(self._message)
                self._message = b""
            return self._places[landing.ready.pop(0)] if landing.ready else Came.LATER
        except KeyboardInterrupt:
            self._connection.lose(self._stream)
            raise

    def shut(self) -> None:
        """Have the thread that waits in `ready`, if any does, come back soon. Any thread.

        A call that was cancelled leaves something behind in gRPC until its channel is closed; one whose deadline has
        passed ends by itself.
        """
        if not self._connection.lost and time.monotonic() < self._deadline:
            self._connection.cancel(self._stream)

    def whole(self, layer: int) -> bool:
        """As of `Part`."""
        return all(layer != missing for missing, _ in self._exchange.landing.missing())

    def late(self, error: DeadlineError) -> None:
        """As of `Request`."""
        if not self._exchange.landing.complete:
            self._late(error)

    def let_go(self, error: BaseException | None) -> None:
        """The end, with what the lookup ended with."""
        self._connection.ending.append(self._stream)
        self._lane.leave(self._connection)

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        """Have the answer that nobody wants any more come, which costs less than to cancel it.

        A server that does not answer is found out by gRPC in some seconds.
        """
        connection = self._connection
        try:
            if not connection.lost:
                with suppress(grpc.RpcError):
                    for _ in self._stream:
                        pass
                connection.streams.discard(self._stream)
        finally:
            self._lane.leave(connection)
