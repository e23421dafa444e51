"""A lane without a server, for tests of whatever uses lanes; tests hold it to the same as the real ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import PoolError, UnavailableError
from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto.wire import ServerTimes


class FakeLane:
    """Answers from a function. Thread-safe as far as that is.

    rows: gives of a layer the rows of ids [N], uint8 [N, row_bytes].
    error: what requests fail with from now on, None for nothing. free: whether it takes requests.
    asked: what came, (layer, ids [N]) of each request. abandoned: requests that were.
    """

    def __init__(self, rows: Callable[[int, npt.NDArray[Any]], Rows]) -> None:
        self._rows_of = rows
        self.error: PoolError | None = None
        self.free = True
        self.asked: list[tuple[tuple[int, npt.NDArray[Any]], ...]] = []
        self.abandoned = 0
        self._closed = False

    def ask(self, exchange: Exchange, deadline: float, *, spin_s: float = 0.0) -> "FakeRequest | None":
        """See `Lane`. None for tokens, which it cannot hash, and while it is not free."""
        tables = exchange.asked_tables
        if tables is None or not self.free:
            return None
        self.asked.append(tables)
        return FakeRequest(self, exchange)

    def answer(self, exchange: Exchange) -> None:
        """Write every row that is missing to where it belongs. Raises PoolError."""
        if self._closed:
            raise UnavailableError("the lane is closed")
        if self.error is not None:
            raise self.error
        landing, missing = exchange.landing, dict(exchange.landing.missing())
        for layer, ids in sorted(exchange.asked_tables or (), key=lambda one: one[0]):
            if layer in missing:
                rows = np.ascontiguousarray(self._rows_of(layer, ids)).reshape(-1)
                with exchange.delivery.writing():
                    landing.destination(layer, 0, rows.size)[:] = rows.data
                landing.received(layer, rows.size)
                landing.hand_over()
        exchange.times = ServerTimes(0, 0, 0)
        landing.check_complete()

    def forked(self) -> None:
        """See `Lane`."""
        self._closed = True

    def stop(self) -> None:
        """See `Lane`."""
        self._closed = True

    def close(self) -> None:
        """See `Lane`."""
        self._closed = True


class FakeRequest:
    """A request that is answered when it is received."""

    def __init__(self, lane: FakeLane, exchange: Exchange) -> None:
        self._lane, self._exchange = lane, exchange

    def receive(self) -> bool:
        """See `Request`."""
        self._lane.answer(self._exchange)
        return True

    def abandon(self) -> None:
        """See `Request`."""
        self._lane.abandoned += 1
