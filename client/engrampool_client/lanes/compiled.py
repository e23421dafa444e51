"""A connection of the direct lane whose answers are received by kernels: without the GIL, whoever else wants it."""

import time
from contextlib import nullcontext

import numpy as np

from engrampool_client.lanes.connection import Connection, SilentError
from engrampool_client.lanes.dial import Secure
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Places
from engrampool_proto import frames
from engrampool_proto.kernels import receive
from engrampool_proto.v1 import pool_pb2

# A thread is in compiled code, where Ctrl-C waits, for no longer than this.
_SLICE_S = 0.05
_SECOND_NS = 1_000_000_000
_IN_ORDER = np.empty(0, np.int64)


class CompiledConnection(Connection):
    """See `Connection`."""

    def __init__(self, way_in: pool_pb2.OpenDirectResponse, target: str, secure: Secure | None = None) -> None:
        """See `Connection`."""
        self._state = np.zeros(receive.STATE_WORDS, np.int64)  # of the answer that is being received
        super().__init__(way_in, target, secure)

    def await_some(self, exchange: Exchange, deadline: float, at_once: int, spin_s: float) -> None:
        """Wait for the beginning of a long answer, or all of a short one, unless that comes bit by bit."""
        state, begin, since = self._state, time.perf_counter(), time.monotonic()
        state[:], nbytes = 0, 1
        if self._is_short(exchange):
            missing = exchange.landing.missing()
            nbytes = sum(size for _, size in missing) + (len(missing) + 1) * frames.HEADER.size + frames.TIMES.size
        spin_ns = int(spin_s * _SECOND_NS) if self.quick else 0
        while True:
            got = receive.fill(self.line(), self.memory, state, min(nbytes, at_once), _slice_ns(deadline), spin_ns)
            if got == receive.LOST or state[receive.END]:
                break
            self._check_time(deadline, since)
            spin_ns = 0
        self.start, self.stop = 0, int(state[receive.END])
        self.quick = time.perf_counter() - begin < 2 * spin_s
        if not self.stop:
            raise ConnectionError("the server closed the connection")

    def take_rows(self, exchange: Exchange, deadline: float) -> None:
        """Of a long answer, receive what comes before the first frame that has no rows; see `Connection.receive`."""
        if self._is_short(exchange):  # nobody waits for the network with the caller's memory in hand
            return
        landing, delivery, state = exchange.landing, exchange.delivery, self._state
        layers = [layer for layer, _ in landing.missing()]
        entries = np.empty((len(layers), receive.ENTRY_WORDS), np.int64)
        for place, layer in enumerate(layers):
            places = landing.by_places(layer)
            if places is None:
                places = Places(landing.array(layer).reshape(-1, landing.shapes[layer][-1]), _IN_ORDER, 1)
            receive.lay(entries, place, layer, places.rows, places.first, places.run)
            entries[place, receive.HAVE] = landing.have(layer)
        state[:] = 0
        state[receive.START], state[receive.END] = self.start, self.stop
        came, since = 0, time.monotonic()
        while True:
            with nullcontext() if landing.owned else delivery.writing():
                got = receive.take(
                    self.line(), self.memory, state, entries, np.uint64(self.number), _slice_ns(deadline), 0
                )
            for layer, have in zip(layers, entries[:, receive.HAVE].tolist(), strict=True):
                landing.received(layer, have - landing.have(layer))
            landing.hand_over()
            if got == receive.LOST:
                raise ConnectionError("the server closed the connection")
            if got in (receive.ANSWERED, receive.ODD):
                self.start, self.stop = int(state[receive.START]), int(state[receive.END])
                return
            if state[receive.CAME] > came:
                came, since = int(state[receive.CAME]), time.monotonic()
            self._check_time(deadline, since)

    def _is_short(self, exchange: Exchange) -> bool:
        return exchange.answer_bytes <= len(self.memory) // 2

    def _check_time(self, deadline: float, since: float) -> None:
        """Raise TimeoutError at the deadline, SilentError if nothing has come since then for too long."""
        if time.monotonic() >= deadline:
            raise TimeoutError
        if self.silent(since):
            raise SilentError("nothing came for too long")


def _slice_ns(deadline: float) -> int:
    """Until when to be in compiled code, by time.monotonic_ns."""
    return int(min(deadline, time.monotonic() + _SLICE_S) * _SECOND_NS)
