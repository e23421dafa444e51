"""A small lookup over gRPC: begun in the thread of whoever asks, received in whichever thread comes for its rows."""

import time
from collections.abc import Callable

import grpc

from engrampool_client.errors import DeadlineError, PoolError, from_rpc
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Landing
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.served import ServedModel
from engrampool_client.lookup.small import Small
from engrampool_proto import wire

# Smaller answers are one message, for which a thread of the client waits: another one costs all rows more than the
# first layer gains.
STREAMED_ABOVE_BYTES = 64 << 10


class StreamedRequest:
    """A call that was begun, whose answer has a message a layer at least. One thread at a time, but for `shut`.

    times: the server's, once all rows are there. The end of the call, which comes after them, is nobody's to wait for:
    `GrpcLane.end_calls` takes it in.

    small, timed: see `Request`. gRPC waits for the next message without a time of its own.
    """

    small = timed = False

    def __init__(
        self,
        lane: GrpcLane,
        small: Small,
        served: ServedModel,
        deadline: float,
        answered: Callable[[int], None],
        late: Callable[[DeadlineError], None],
    ) -> None:
        """Begins the call. deadline: by time.monotonic.

        answered: told of the bytes of rows, once all are there. late: told where the server let a deadline pass.
        Raises ValueError where the lane is closed, which is gRPC's way to say so.
        """
        self._lane, self._answered, self._late = lane, answered, late
        model, version, _ = small.what
        tables = tuple([(layer, ids.reshape(-1)) for layer, ids in small.tables.items()])
        asked = wire.LookupRequest(model, version, tables)
        self._connection = lane.enter()
        try:
            self._stream = self._connection.begin(wire.encode_request(asked), max(0.0, deadline - time.monotonic()))
            self._connection.streams.add(self._stream)
            # While the server is at work.
            shapes = {layer: rows.shape for layer, rows in small.rows.items()}
            self._exchange = Exchange(served, asked, Landing(Delivery(list(shapes)), shapes, small.rows))
            self._places = {layer: place for place, layer in enumerate(shapes)}
        except BaseException:
            lane.leave(self._connection)
            raise

    @property
    def times(self) -> wire.ServerTimes | None:
        """See above."""
        return self._exchange.times

    def ready(self, until: float, spin_s: float) -> None:
        """Nothing can be said before `take`."""

    def take(self, until: float, spin_s: float) -> int | Came:
        """Have rows come until a layer is whole, and give its place. Raises ProtocolError, DeadlineError.

        until: 0 for what is there already. What else the call fails with is found out by whoever asks again.
        """
        connection, landing = self._connection, self._exchange.landing
        if landing.ready:
            return self._places[landing.ready.pop(0)]
        if landing.complete:
            self._answered(self._exchange.answer_bytes)
            return Came.ALL
        if connection.lost:
            return Came.NOTHING
        if until <= 0:
            return Came.LATER
        try:
            while not landing.ready:
                message = next(self._stream, None)
                if message is None:
                    landing.check_complete()
                    return Came.NOTHING
                self._exchange.add(message)
        except grpc.RpcError as failed:
            error: PoolError = from_rpc(failed, self._lane.target)
            if isinstance(error, DeadlineError):
                raise error from failed
            return Came.NOTHING
        except KeyboardInterrupt:
            connection.lose(self._stream)
            raise
        return self._places[landing.ready.pop(0)]

    def shut(self) -> None:
        """Have the thread that waits in `take`, if any does, come back soon. Any thread."""
        if not self._connection.lost:
            self._connection.cancel(self._stream)

    def let_go(self, error: BaseException | None) -> None:
        """The end, with what the lookup ended with."""
        connection = self._connection
        if not self._exchange.landing.complete:
            self.shut()
            if isinstance(error, DeadlineError):
                self._late(error)
        connection.ending.append(self._stream)
        self._lane.leave(connection)

    def pass_over(self, until: float) -> None:
        """Nothing is passed over: what nobody wants is cancelled."""
        self.let_go(None)
