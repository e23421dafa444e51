"""A small lookup on a connection of the direct lane: received by kernels, in whichever thread comes for its rows."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from engrampool_client.errors import DeadlineError, PoolError, ProtocolError
from engrampool_client.lanes.connection import Connection
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.sent import Came
from engrampool_proto import frames, wire
from engrampool_proto.kernels import receive

_SECOND_NS = 1_000_000_000


class SmallRequest:
    """A request that was sent on a connection, which is its own until `let_go`. To be used by one thread at a time.

    times: the server's, once all was answered. small: whether the answer fits into memory of ours, so that rows are
    only written where they belong when all of them are there.
    """

    timed = True

    def __init__(
        self,
        lane: NativeLane,
        connection: Connection,
        rows: Mapping[int, Rows],
        answered: Callable[[int], None],
        late: Callable[[DeadlineError], None],
    ) -> None:
        """rows: layer -> where its rows belong, uint8 [N, row_bytes], C-contiguous.

        answered: told of the bytes of rows, once all are there. late: told where the server let a deadline pass.
        """
        self.times: wire.ServerTimes | None = None
        self._lane, self._connection, self._answered, self._late = lane, connection, answered, late
        self._rows = list(rows.values())  # they live as long as this does
        self._layers, self._nbytes = np.empty((len(rows), receive.ENTRY_WORDS), np.int64), 0
        for place, layer in enumerate(rows):
            self._nbytes += receive.lay(self._layers, place, layer, self._rows[place])
        self._state = np.zeros(receive.STATE_WORDS, np.int64)
        # An answer of one frame a layer, as servers send it.
        self._whole = self._nbytes + len(rows) * frames.HEADER.size + frames.HEADER.size + frames.TIMES.size
        self._waits = self.small = self._whole <= connection.memory.size // 2
        self._came, self._heard_at = 0, connection.asked_at
        self._silent, self._turn = False, connection.turn

    def ready(self, until: float, spin_s: float) -> Came | None:
        """Wait for a small answer; None if `take` is to follow. until: by time.monotonic."""
        state = self._state
        if not self._waits:
            return None
        connection, begin = self._connection, time.perf_counter()
        until_ns, spin_ns = int(until * _SECOND_NS), int(spin_s * _SECOND_NS) if connection.quick else 0
        got = receive.fill(connection.fileno(), connection.memory, state, self._whole, until_ns, spin_ns)
        connection.quick = time.perf_counter() - begin < 2 * spin_s
        if got != 1:
            return self._why(got)
        self._waits = False
        return None

    def take(self, until: float, spin_s: float) -> "int | Came":
        """Have rows come where they belong until a layer is whole, and give its place; or what else there is to say.

        Raises ProtocolError for an answer that is none to this request.
        """
        connection = self._connection
        got = receive.take(
            connection.fileno(),
            connection.memory,
            self._state,
            self._layers,
            np.uint64(connection.number),
            int(until * _SECOND_NS),
            int(spin_s * _SECOND_NS) if connection.quick and not self._came else 0,
        )
        return got if got >= 0 else self._why(got)

    def _why(self, got: int) -> Came:
        state, connection = self._state, self._connection
        if got == receive.LATER:
            if state[receive.CAME] > self._came:
                self._came, self._heard_at = int(state[receive.CAME]), time.monotonic()
            self._silent = connection.silent(self._heard_at)
            return Came.NOTHING if self._silent else Came.LATER
        if got == receive.LOST:
            return Came.NOTHING
        try:
            self.times = connection.end(int(state[receive.START]), int(state[receive.END]), got == receive.ANSWERED)
        except ProtocolError:
            raise
        except (PoolError, OSError):
            return Came.NOTHING
        if self.times is None:
            return Came.NOTHING
        self._answered(self._nbytes)
        return Came.ALL

    def shut(self) -> None:
        """Have the thread that waits in `ready` or `take`, if any does, come back soon. Any thread."""
        self._connection.give_up(self._turn)

    def let_go(self, error: BaseException | None) -> None:
        """Let others have the connection, as far as it is good. error: what the lookup ended with."""
        lane, connection = self._lane, self._connection
        if not connection.answering:
            lane.answered(connection)
            return
        if isinstance(error, DeadlineError) and not connection.promises():
            lane.distrust(connection, time.monotonic() - connection.asked_at)
            self._late(error)
        elif self._silent:
            lane.distrust(connection)
            lane.silent()
        else:
            lane.drop(connection)

    def pass_over(self, until: float) -> None:
        """Receive what nobody wants any more, until then at most, so that the connection is as good as before."""
        self._rows = [np.empty_like(rows) for rows in self._rows]
        for place, rows in enumerate(self._rows):
            self._layers[place, receive.ADDRESS] = rows.__array_interface__["data"][0]
        came: int | Came = Came.LATER
        try:
            while self._connection.answering and came is not Came.NOTHING and time.monotonic() < until:
                came = self.take(until, 0.0)
        except PoolError:
            pass
        self.let_go(None)
