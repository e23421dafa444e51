"""Metrics that cost next to nothing to count in: plain numbers, which `flush` brings to Prometheus.

prometheus_client's own take a lock for each number, and write it to a file where a server is several processes: for a
lookup, which counts in twenty of them, that took a third of its time.

One thread counts in a series, and any may flush it: what is counted only grows, and what is flushed is how much it grew
since. A collection by a registry flushes first.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector


class _Series(Protocol):
    def flush(self) -> None: ...


S = TypeVar("S", bound=_Series)


class Count:
    """One series of a counter."""

    __slots__ = ("_counter", "_shown", "_total")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._total = self._shown = 0

    def inc(self, amount: int = 1) -> None:
        """Count `amount`, which is not negative."""
        self._total += amount

    def flush(self) -> None:
        """Have the counter say what was counted by now."""
        total = self._total
        if total != self._shown:
            self._counter.inc(total - self._shown)
            self._shown = total


class Times:
    """One series of a histogram."""

    __slots__ = ("_bounds", "_counts", "_histogram", "_shown", "_shown_sum", "_sum")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._bounds = histogram._upper_bounds[:-1]  # what is above all of them is in a last one
        self._counts = [0] * len(histogram._buckets)
        self._shown = list(self._counts)
        self._sum = self._shown_sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count an observation, a finite number."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def flush(self) -> None:
        """Have the histogram say what was observed by now."""
        counts, total = list(self._counts), self._sum
        if counts == self._shown:
            return
        # The one way to say many observations at once.
        for bucket, count, shown in zip(self._histogram._buckets, counts, self._shown, strict=True):
            if count != shown:
                bucket.inc(count - shown)
        self._histogram._sum.inc(total - self._shown_sum)
        self._shown, self._shown_sum = counts, total


class SharedCount:
    """One series of a counter that compiled code counts in, in whichever thread. cell: int64 [1]; it only grows."""

    __slots__ = ("_cell", "_counter", "_shown")

    def __init__(self, counter: Counter, cell: npt.NDArray[np.int64]) -> None:
        self._counter, self._cell = counter, cell
        self._shown = 0

    def flush(self) -> None:
        """Have the counter say what was counted by now."""
        total = int(self._cell[0])
        if total != self._shown:
            self._counter.inc(total - self._shown)
            self._shown = total


class SharedTimes:
    """One series of a histogram, likewise. cells: int64 [1 + buckets]: the sum in microseconds; counts by bucket."""

    __slots__ = ("_cells", "_histogram", "_shown")

    def __init__(self, histogram: Histogram, cells: npt.NDArray[np.int64]) -> None:
        self._histogram, self._cells = histogram, cells
        self._shown = [0] * len(cells)

    def flush(self) -> None:
        """Have the histogram say what was observed by now."""
        cells = self._cells.tolist()
        if cells == self._shown:
            return
        for bucket, count, shown in zip(self._histogram._buckets, cells[1:], self._shown[1:], strict=True):
            if count != shown:
                bucket.inc(count - shown)
        self._histogram._sum.inc((cells[0] - self._shown[0]) / 1e6)
        self._shown = cells


class Level:
    """The one series of a gauge."""

    __slots__ = ("_gauge", "_read", "_shown", "_value")

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._value = self._shown = 0
        self._read: Callable[[], int] | None = None

    def follow(self, read: Callable[[], int]) -> None:
        """Take what `read` gives for the value, whenever it is flushed."""
        self._read = read

    def set(self, value: int) -> None:
        """Take this for the value."""
        self._value = value

    def flush(self) -> None:
        """Have the gauge say the value."""
        value = self._value if self._read is None else self._read()
        if value != self._shown:
            self._gauge.set(value)
            self._shown = value


class Counted(Collector, Generic[S]):
    """A metric of `registry` whose series are counted in plain numbers.

    metric: prometheus_client's, which is in no registry. series: makes one of those above of one of its series.
    """

    def __init__(
        self, registry: CollectorRegistry, metric: Counter | Gauge | Histogram, series: Callable[..., S]
    ) -> None:
        self._metric, self._make = metric, series
        self._series: dict[tuple[str, ...], S] = {}
        self._shared: list[SharedCount | SharedTimes] = []
        self._lock = threading.Lock()
        registry.register(self)

    def labels(self, *values: str) -> S:
        """The series of these labels; no labels are the one of a metric that has none."""
        found = self._series.get(values)
        if found is None:
            made = self._make(self._metric.labels(*values) if values else self._metric)
            found = self._series.setdefault(values, made)
        return found

    def share(self, kind: "type[SharedCount | SharedTimes]", cells: npt.NDArray[np.int64], *values: str) -> None:
        """Count what is in `cells` in the series of these labels, too."""
        self._shared.append(kind(self._metric.labels(*values), cells))  # type: ignore[arg-type]

    def flush(self) -> None:
        """Have Prometheus see what was counted by now."""
        with self._lock:
            for one in [*self._series.values(), *self._shared]:
                one.flush()

    def describe(self) -> Iterable[Metric]:
        """What prometheus_client says of the metric."""
        return self._metric.describe()

    def collect(self) -> Iterable[Metric]:
        """Its samples, with what was counted by now."""
        self.flush()
        return self._metric.collect()
