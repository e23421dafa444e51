"""Memory that is emulated (setting `emulate`): when rows would be there, for all processes of a server together."""

import asyncio
import ctypes
import heapq
import os
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Self

import numpy as np
import numpy.typing as npt

from engrampool_proto.kernels.tier import GROUP, LATENCY, LINK, RATE, TIER_WORDS, due_of, turn_of
from engrampool_proto.tiers.tier import Tier
from engrampool_server.answer.in_flight import int64s

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLOCK_MONOTONIC, _NONBLOCK, _CLOEXEC, _ABSOLUTE = 1, os.O_NONBLOCK, os.O_CLOEXEC, 1
_PR_SET_TIMERSLACK, _SLACK_NS = 29, 1_000


class Emulation:
    """A tier, and the link that all processes share that were forked since this was made.

    words: as the kernels of `kernels.tier` take them.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._link = np.frombuffer(int64s(1), np.int64)
        self.words: npt.NDArray[np.int64] = np.zeros(TIER_WORDS, np.int64)
        self.words[LATENCY], self.words[GROUP], self.words[RATE] = tier.latency_ns, tier.group_bytes, tier.bytes_per_s
        self.words[LINK] = self._link.ctypes.data

    @classmethod
    def of(cls, name_or_file: str) -> Self | None:
        """As the setting says; None for "off". Raises TierError."""
        return None if name_or_file == "off" else cls(Tier.of(name_or_file))

    def read(self, nbytes: int, begin_ns: int) -> "Reading":
        """A request for so many bytes of rows begins, by time.monotonic_ns."""
        return Reading(self, begin_ns, int(turn_of(self.words, nbytes, begin_ns)))


@dataclass
class Reading:
    """One request's way through the tier; its pieces come one after the other."""

    emulation: Emulation
    begin_ns: int
    turn_ns: int
    _so_far: int = field(default=0, init=False)

    def due_ns(self, nbytes: int, start_ns: int) -> int:
        """When so many bytes that are read from then on are there, by time.monotonic_ns."""
        self._so_far += nbytes
        return int(due_of(self.emulation.words, self.begin_ns, self.turn_ns, self._so_far, start_ns, nbytes))


class Alarms:
    """Sleeping in an event loop until a nanosecond; the loops' own timers know milliseconds. To be closed.

    To be made, used and closed by the loop's thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer = _LIBC.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK | _CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = count()  # futures cannot be ordered
        self._loop.add_reader(self._timer, self._ring)

    async def until(self, due_ns: int) -> None:
        """Return then, by time.monotonic_ns, or when it is cancelled."""
        if due_ns <= time.monotonic_ns():
            return
        future = self._loop.create_future()
        heapq.heappush(self._waiting, (due_ns, next(self._numbers), future))
        if self._waiting[0][2] is future:
            self._set()
        await future

    def close(self) -> None:
        """Those who still wait are cancelled."""
        self._loop.remove_reader(self._timer)
        os.close(self._timer)
        for _, _, future in self._waiting:
            future.cancel()

    def _ring(self) -> None:
        try:
            os.read(self._timer, 8)
        except BlockingIOError:  # it was set anew just now
            return
        now_ns = time.monotonic_ns()
        while self._waiting and (self._waiting[0][0] <= now_ns or self._waiting[0][2].done()):
            future = heapq.heappop(self._waiting)[2]
            if not future.done():  # who was cancelled waits no more
                future.set_result(None)
        if self._waiting:
            self._set()

    def _set(self) -> None:
        seconds, nanoseconds = divmod(self._waiting[0][0], 1_000_000_000)
        spec = (ctypes.c_int64 * 4)(0, 0, seconds, nanoseconds)  # no interval; when first
        if _LIBC.timerfd_settime(self._timer, _ABSOLUTE, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def wake_promptly() -> None:
    """Have the system wake this thread as near to when it asked for as it can: 50 us later is all the same to it."""
    _LIBC.prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)
