"""A small lookup on a connection of the direct lane: received by kernels, in whichever thread comes for its rows."""

import time
from collections.abc import Callable

import numpy as np

from engrampool_client.errors import DeadlineError, EngrampoolError, PoolError, ProtocolError
from engrampool_client.lanes.connection import Connection
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.small import Small
from engrampool_client.stats import Answered
from engrampool_proto import frames, wire
from engrampool_proto.kernels import ask, receive

_SECOND_NS = 1_000_000_000
_IN_ORDER = np.empty(0, np.int64)


class SmallRequest:
    """A request that was sent on a connection, which is its own until `let_go`. To be used by one thread at a time.

    connection: that it is on. times: the server's, once all was answered. small: whether the answer fits into memory of
    ours, so that rows are only written where they belong when all of them are there.
    """

    timed = True

    def __init__(
        self,
        lane: NativeLane,
        connection: Connection,
        small: Small,
        answered: Answered,
        late: Callable[[DeadlineError], None],
    ) -> None:
        """small: what was asked for, and where its rows belong.

        answered: told once all rows are there. late: told where the server let a deadline pass.
        """
        self.times: wire.ServerTimes | None = None
        self._lane, self.connection, self._answered, self._late = lane, connection, answered, late
        rows, places = small.rows, small.places
        self._order, self._rows, self._places = list(rows), list(rows.values()), places  # which are kept alive
        self._layers, self._nbytes = np.empty((len(rows), receive.ENTRY_WORDS), np.int64), 0
        for place, layer in enumerate(rows):
            theirs = places.get(layer, _IN_ORDER)
            self._nbytes += receive.lay(self._layers, place, layer, self._rows[place], theirs, 1)
        self._state = np.zeros(receive.STATE_WORDS, np.int64)
        # An answer of one frame a layer, as servers send it.
        self._whole = self._nbytes + len(rows) * frames.HEADER.size + frames.HEADER.size + frames.TIMES.size
        self._waits = self.small = self._whole <= connection.memory.size // 2
        self._came, self._heard_at = 0, connection.asked_at
        self._silent, self._turn = False, connection.turn

    @staticmethod
    def send_now(connection: Connection, small: Small, left_s: float) -> bool:
        """Ask for it, as far as the system takes all of that at once; else the connection is of no use any more.

        left_s: until the answer must be there. Raises OSError if the connection broke.
        """
        handle = connection.begin(small.what)
        if handle is None:
            return False
        timeout_us = max(1, int(left_s * 1e6))
        connection.number = ask.send_lookup(connection.line(), handle, timeout_us, small.counts, small.ids)
        return connection.number != 0

    def ready(self, until: float, spin_s: float) -> Came | None:
        """Wait for a small answer; None if `take` is to follow. until: by time.monotonic."""
        state = self._state
        if not self._waits:
            return None
        connection, begin = self.connection, time.perf_counter()
        until_ns, spin_ns = int(until * _SECOND_NS), int(spin_s * _SECOND_NS) if connection.quick else 0
        got = receive.fill(connection.line(), connection.memory, state, self._whole, until_ns, spin_ns)
        connection.quick = time.perf_counter() - begin < 2 * spin_s
        if got != 1:
            return self._why(got)
        self._waits = False
        return None

    def take(self, until: float, spin_s: float) -> "int | Came":
        """Have rows come where they belong until a layer is whole, and give its place; or what else there is to say.

        Raises ProtocolError for an answer that is none to this request.
        """
        connection = self.connection
        got = receive.take(
            connection.line(),
            connection.memory,
            self._state,
            self._layers,
            np.uint64(connection.number),
            int(until * _SECOND_NS),
            int(spin_s * _SECOND_NS) if connection.quick and not self._came else 0,
        )
        return got if got >= 0 else self._why(got)

    def _why(self, got: int) -> Came:
        state, connection = self._state, self.connection
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
        # Its end may be taken in long after it came, and what the system has no room for is only sent then.
        first_at = int(state[receive.FIRST_AT])
        first_s = first_at / _SECOND_NS - connection.asked_at if first_at else None
        self._answered(self._nbytes, self.times, first_s, connection.number)
        return Came.ALL

    @property
    def begun(self) -> bool:
        """Whether any of the answer was received."""
        return bool(self._state[receive.CAME])

    def whole(self, layer: int) -> bool:
        """Whether all rows of a layer are there."""
        entry = self._layers[self._order.index(layer)]
        return bool(entry[receive.HAVE] == entry[receive.BYTES])

    def listen(self) -> None:
        """As of `Answering`: `shut` is for whoever gives it up."""

    def abandon(self) -> None:
        """Do without the answer: the connection can serve no other request."""
        self._lane.drop(self.connection)

    def shut(self) -> None:
        """Have the thread that waits in `ready` or `take`, if any does, come back soon. Any thread."""
        self.connection.give_up(self._turn)

    def late(self, error: DeadlineError) -> None:
        """As of `Request`."""
        if self.connection.answering and not self.begun and not self.connection.promises():
            self._late(error)

    def let_go(self, error: BaseException | None) -> None:
        """Let others have the connection, as far as it is good. error: what the lookup ended with."""
        lane, connection = self._lane, self.connection
        if not connection.answering:
            lane.answered(connection)
            return
        if isinstance(error, DeadlineError) and not connection.promises():
            lane.distrust(connection, time.monotonic() - connection.asked_at)
        elif self._silent:
            lane.distrust(connection)
            lane.silent()
        else:
            lane.drop(connection)

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        """As of `Request`: the connection is as good as before, then."""
        self._rows = [np.empty_like(rows) for rows in self._rows]
        for place, rows in enumerate(self._rows):
            self._layers[place, receive.ADDRESS] = rows.__array_interface__["data"][0]
        came: int | Came = Came.LATER
        try:
            while self.connection.answering and came is not Came.NOTHING and time.monotonic() < until:
                came = self.take(until, 0.0)
        except PoolError:
            pass
        self.let_go(None if self.begun else error)
