"""Metrics as a server's call Stats has them, and what two readings of them say of the time between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isnan

from engrampool_proto.v1 import pool_pb2

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """One reading. unix_s: when the server read them. values: metric -> labels -> value."""

    unix_s: float = 0.0
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: pool_pb2.StatsResponse) -> "Samples":
        """What a server answered."""
        return cls.read(answer.unix_s, ((one.name, one.labels, one.value) for one in answer.samples))

    @classmethod
    def read(cls, unix_s: float, samples: Iterable[tuple[str, Mapping[str, str], float]]) -> "Samples":
        """Of (name, labels, value)."""
        values: dict[str, dict[Labels, float]] = {}
        for name, labels, value in samples:
            values.setdefault(name, {})[frozenset(labels.items())] = value
        return cls(unix_s, values)

    def labelled(self, name: str) -> list[dict[str, str]]:
        """The labels of a metric's series, those of a value that is not 0."""
        return [dict(labels) for labels, value in self.values.get(name, {}).items() if value]

    def sum(self, name: str, **labels: str) -> float | None:
        """The sum of a metric's series that have these labels; None without any."""
        found = [value for have, value in self.values.get(name, {}).items() if have >= labels.items()]
        return sum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """A metric's sums by the values of one label."""
        sums: dict[str, float] = {}
        for labels, value in self.values.get(name, {}).items():
            key = dict(labels).get(label, "")
            sums[key] = sums.get(key, 0.0) + value
        return sums


@dataclass(frozen=True)
class Between:
    """Two readings of one process, the earlier first. A counter that went back began again at 0."""

    before: Samples
    after: Samples

    @property
    def seconds(self) -> float:
        """From one to the other."""
        return self.after.unix_s - self.before.unix_s

    def grew(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """By how much a counter's series with these labels grew, summed by the values of one label ("" without it)."""
        earlier = self.before.values.get(name, {})
        sums: dict[str, float] = {}
        for have, value in self.after.values.get(name, {}).items():
            if have >= labels.items():
                key, was = dict(have).get(label, ""), earlier.get(have, 0.0)
                sums[key] = sums.get(key, 0.0) + (value - was if value >= was else value)
        return sums

    def rate(self, name: str, **labels: str) -> float | None:
        """A counter's growth in a second; None where no time passed."""
        return sum(self.grew(name, "", **labels).values()) / self.seconds if self.seconds > 0 else None

    def mean_s(self, histogram: str, label: str = "", **labels: str) -> dict[str, float]:
        """The mean of what a histogram observed meanwhile, by the values of one label; not where that is nothing."""
        counts, sums = (self.grew(f"{histogram}_{part}", label, **labels) for part in ("count", "sum"))
        return {key: sums.get(key, 0.0) / count for key, count in counts.items() if count > 0}

    def quantile_s(self, histogram: str, quantile: float, label: str = "", **labels: str) -> dict[str, float]:
        """A quantile of what a histogram observed meanwhile, by the values of one label, as Prometheus estimates it."""
        found = {}
        for key in self.grew(f"{histogram}_bucket", label, **labels):
            of_key = {**labels, label: key} if label else labels
            counts = sorted((float(le), n) for le, n in self.grew(f"{histogram}_bucket", "le", **of_key).items())
            if not counts or counts[-1][1] <= 0:
                continue
            found[key] = _quantile(counts, quantile)
        return found


def _quantile(counts: list[tuple[float, float]], quantile: float) -> float:
    """counts: (upper bound, how many are no larger), ascending; the last bound is infinite."""
    rank, below, lower = quantile * counts[-1][1], 0.0, 0.0
    for upper, count in counts:
        if count >= rank:
            if upper == inf or isnan(upper):
                return lower
            return lower + (upper - lower) * ((rank - below) / (count - below) if count > below else 1.0)
        below, lower = count, upper
    return lower
