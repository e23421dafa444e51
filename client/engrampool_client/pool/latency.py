"""How long servers take of late, and how much may be asked twice because one is late.

After Dean and Barroso, "The Tail at Scale" (CACM 56, 2, 2013): the same request goes to a second replica once the first
has taken longer than nearly all do, which costs little more than what is late anyway; and after gRPC's retry throttling
(proposal A6): tokens that every request earns a fraction of bound what is asked twice, so that a pool that is slow
because it is overloaded is not asked for more.
"""

import threading
from bisect import bisect_left, insort
from collections import deque

# An answer is late when 98 % of so many before it were there; nobody knows before there are that few. Fewer are late
# then than may be asked for twice, so that there is something left for when a server is in trouble.
_KEPT, _FEWEST, _LATE = 256, 20, 0.98
# What a lookup earns, and what may be saved up, where to ask twice costs 1.
_EARNED, _MOST_TOKENS = 0.05, 10.0
# What a server is compared by: the median of so many, and of none before there are that few.
_RECENT, _FEWEST_RECENT = 5, 3
# Smaller answers than this take as long as one of this size.
_SMALL_BITS = 14
# One that is slow is asked first once in so many lookups, and not more often than this.
_TRY_ONE_IN, _TRY_EVERY_S = 200, 1.0


class Latency:
    """What one server took for its last answers, by size: each class is twice the one before. Thread-safe.

    A lookup costs it some microseconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: dict[int, _Times] = {}
        self._whole: dict[int, _Times] = {}
        self._tries: dict[int, tuple[int, float]] = {}  # lookups since, and when

    def began(self, nbytes: int, seconds: float) -> None:
        """Note how long the first byte took of an answer of `nbytes`; or has taken, where it did not come."""
        self._note(self._first, nbytes, seconds)

    def ended(self, nbytes: int, seconds: float) -> None:
        """Note how long the whole answer took; inf if it was not waited for to its end."""
        self._note(self._whole, nbytes, seconds)

    def recent_s(self, nbytes: int) -> float | None:
        """What an answer of that size takes now: the median of the last few. None if they are too few."""
        times = self._whole.get(_size_class(nbytes))
        return None if times is None else times.recent_s

    def late_s(self, nbytes: int, *, whole: bool) -> float | None:
        """When an answer of that size is late, whole or its first byte. None if there were too few."""
        times = (self._whole if whole else self._first).get(_size_class(nbytes))
        return None if times is None else times.late_s

    def due(self, nbytes: int, now: float) -> bool:
        """Count a lookup that passes over this server, as it is slow; whether it is to be tried instead."""
        with self._lock:
            passed, tried = self._tries.get(_size_class(nbytes), (0, now))
            due = passed + 1 >= _TRY_ONE_IN and now - tried >= _TRY_EVERY_S
            self._tries[_size_class(nbytes)] = (0, now) if due else (passed + 1, tried)
            return due

    def _note(self, times: "dict[int, _Times]", nbytes: int, seconds: float) -> None:
        size = _size_class(nbytes)
        with self._lock:
            if size not in times:
                times[size] = _Times()
            times[size].add(seconds)


class _Times:
    """The last few of them. recent_s, late_s: see `Latency`."""

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._sorted: list[float] = []
        self.recent_s: float | None = None
        self.late_s: float | None = None

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        if len(self._last) > _KEPT:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        count = len(self._last)
        if count >= _FEWEST_RECENT:
            self.recent_s = sorted(self._recent)[len(self._recent) // 2]
        if count >= _FEWEST:
            self.late_s = self._sorted[int(_LATE * count)]


class HedgeBudget:
    """What bounds how many lookups are asked for twice: one in 20, and a few at once. Thread-safe.

    Threads that find it ready at the same moment may all spend: they have to earn that later.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = 0.0

    @property
    def ready(self) -> bool:
        """Whether one may be asked for twice now."""
        return self._tokens >= 1

    def earn(self) -> None:
        """Count a lookup."""
        with self._lock:
            self._tokens = min(_MOST_TOKENS, self._tokens + _EARNED)

    def spend(self) -> None:
        """Count one that was asked for twice."""
        with self._lock:
            self._tokens -= 1


def _size_class(nbytes: int) -> int:
    return max(_SMALL_BITS, nbytes.bit_length())
