"""Whether rows are there when the layers want them: what is measured, what is made of it, and what is tried against it.

Nothing here prints; doctor.py does.
"""

import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.client import Client
from engrampool_client.doctor.replay import Clock, Forward, Play, play
from engrampool_client.errors import EngrampoolError
from engrampool_client.lookup.cache import HotRows
from engrampool_client.lookup.layout import Layout, Part
from engrampool_client.pool.endpoint import SPLIT_ABOVE_BYTES
from engrampool_client.status import ClientStatus
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec

Ids = npt.NDArray[Any]
Settings = Mapping[str, Any]
CAPACITIES = tuple(1 << bits for bits in (24, 26, 28, 30, 32))
# Of the bytes that deduplication leaves; below, a cache is not worth its memory and is not tried.
WORTH = 0.1
# The cache that is tried is the smallest that saves so much of what the largest does.
_NEARLY = 0.9
# How the time given is shared out: among phases as they are, the cache's simulation, and what is tried.
_AS_IS, _SIMULATION = 0.4, 0.15
_WARM_UP = 0.6  # of a measurement, at most
_ROUND_TRIPS = 30
# Page faults of a lookup that is about as fast as later ones will be, and of how many in a row.
_WARM_FAULTS, _WARM_UP_ROUND = 32, 3


# --- judging: no clock, no network


@dataclass(frozen=True)
class Verdict:
    """Of one layer. Seconds; margins are at the percentile asked for (p50_s: the median), negative where it waited."""

    layer: int
    start_s: float
    p50_s: float
    margin_s: float
    masked_tokens: int

    @property
    def hidden(self) -> bool:
        """Whether the layer got all its rows in time, but for what the percentile leaves out."""
        return self.margin_s >= 0 and not self.masked_tokens


def judge(played: Play, percentile: float) -> list[Verdict]:
    """What became of each layer. percentile: of forwards whose rows must be in time, 50 .. 100."""
    verdicts = []
    for layer, start_s in sorted(played.starts_s.items()):
        forwards = [one for one in played.forwards if layer in one.margin_s]
        margins = sorted(one.margin_s[layer] for one in forwards)
        # So many forwards may be late; rounded, as 100 - 99.9 is not quite 0.1.
        median, at = (
            margins[min(int(round(len(margins) * (100 - q) / 100, 6)), len(margins) - 1)] for q in (50, percentile)
        )
        verdicts.append(Verdict(layer, start_s, median, at, sum(one.masked[layer] for one in forwards)))
    return verdicts


def split(played: Play, percentile: float) -> dict[str, tuple[float, float]]:
    """Where lookups spent their time: part -> seconds at the median and at the percentile, of each part by itself.

    "whole" is of all lookups, the others of those that the server was asked for and answered in full.
    """
    parts: dict[str, list[float]] = {"whole": [one.elapsed_s for one in played.forwards if one.elapsed_s is not None]}
    for one in played.forwards:
        if one.times is not None and one.elapsed_s is not None:
            queue, gather, total = (us / 1e6 for us in (one.times.queue_us, one.times.gather_us, one.times.total_us))
            for name, seconds in (
                ("server queue", queue),
                ("server gather", gather),
                ("server rest", total - queue - gather),
                ("wire and client", one.elapsed_s - total),
            ):
                parts.setdefault(name, []).append(seconds)
    parts["call of prefetch"] = [one.call_s for one in played.forwards]
    return {
        name: (float(np.percentile(values, 50)), float(np.percentile(values, percentile)))
        for name, values in parts.items()
        if values
    }


@dataclass(frozen=True)
class CacheSize:
    """What a cache of that many bytes would do. hits: share of n-grams that it has, of those that differ in a lookup.

    saved: phase -> share of the bytes that deduplication leaves to ask for. evicted: n-grams that had to make room.
    """

    nbytes: int
    hits: float
    saved: Mapping[str, float]
    evicted: int


def simulate(
    spec: ModelSpec,
    heads: tuple[int, int] | None,
    phases: Mapping[str, Sequence[Forward]],
    seconds: float,
    capacities: Sequence[int] = CAPACITIES,
) -> list[CacheSize]:
    """Run a stream's keys through caches of several sizes, which all start empty; phases share them, in order.

    seconds: for all of it; each phase gets its share of them, and goes no further. The sizes that follow one which lost
    nothing are left out. Gives nothing for a stream without keys (ids that no hash gives).
    """
    layout = Layout(spec, None if heads is None else slice(*heads))
    ways_bytes = 8 * (layout.entry_bytes + 16)
    sizes = [nbytes for nbytes in capacities if nbytes >= ways_bytes]
    # As many sets, but entries of one byte: it is only asked what it has.
    caches = [HotRows(nbytes // ways_bytes * 8 * (1 + 16), 1) for nbytes in sizes]
    asked = dict.fromkeys(phases, 0)
    saved = {name: [0] * len(sizes) for name in phases}
    distinct, hits = 0, [0] * len(sizes)
    for name, forwards in phases.items():
        until = time.monotonic() + seconds / len(phases)
        for forward in forwards:
            entries = _entries(spec, layout, forward)
            asked[name] += sum(one.nbytes for one in entries)
            distinct += sum(len(one.keys) for one in entries)
            for at, cache in enumerate(caches):
                nbytes, count = _ask(cache, entries)
                saved[name][at] += nbytes
                hits[at] += count
            if time.monotonic() > until:
                break
    results: list[CacheSize] = []
    for at, (size, cache) in enumerate(zip(sizes, caches, strict=True)):
        if not distinct or (results and not results[-1].evicted):
            break
        shares = {name: saved[name][at] / asked[name] for name in phases if asked[name]}
        results.append(CacheSize(size, hits[at] / distinct, shares, cache.evicted))
    return results


def best_size(sizes: Sequence[CacheSize], phase: str) -> int | None:
    """Bytes of the smallest cache that does nearly what the largest does for a phase; None if none is worth it."""
    most = max((size.saved.get(phase, 0.0) for size in sizes), default=0.0)
    if most < WORTH:
        return None
    return next(size.nbytes for size in sizes if size.saved.get(phase, 0.0) >= _NEARLY * most)


@dataclass(frozen=True, eq=False)
class _Entries:
    """Those of one part in one lookup.

    every: keys [T, groups]. keys, groups: of the distinct ones, [N]. at: where one of each is in `every`.
    """

    part: Part
    every: Ids
    keys: Ids
    groups: Ids
    at: Ids

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct entries' rows."""
        return len(self.keys) * self.part.entry_bytes


def _entries(spec: ModelSpec, layout: Layout, forward: Forward) -> list[_Entries]:
    """By part. Nothing for ids that have no keys."""
    entries = []
    for part, keys in _keys(spec, layout, forward):
        if keys is None:
            return []
        found = [np.unique(row, return_index=True) for row in keys]
        groups = np.repeat(np.arange(part.number, part.number + len(keys), dtype=np.uint8), [len(f[0]) for f in found])
        at = np.concatenate([tokens * len(keys) + group for group, (_, tokens) in enumerate(found)])
        entries.append(_Entries(part, keys.T, np.concatenate([f[0] for f in found]), groups, at))
    return entries


def _ask(cache: HotRows, entries: Sequence[_Entries]) -> tuple[int, int]:
    """Ask as a lookup does: for every token's, then put what was missing. Gives bytes and number of what it had."""
    if not entries:
        return 0, 0
    of_all = [
        (one.every.reshape(-1), np.tile(np.arange(one.part.number, one.part.number + n, dtype=np.uint8), tokens))
        for one in entries
        for tokens, n in (one.every.shape,)
    ]
    found = cache.find(np.concatenate([keys for keys, _ in of_all]), np.concatenate([of for _, of in of_all])) >= 0
    nbytes = count = start = 0
    for one in entries:
        had = found[start : start + one.every.size][one.at]
        start += one.every.size
        nbytes += int(had.sum()) * one.part.entry_bytes
        count += int(had.sum())
        missing = one.keys[~had]
        cache.put(missing, one.groups[~had], np.zeros((len(missing), 1), np.uint8))
    return nbytes, count


def _keys(spec: ModelSpec, layout: Layout, forward: Forward) -> Iterable[tuple[Part, Ids | None]]:
    """Of each part of each layer: int64 [groups, T], None if there are none."""
    asked = forward.asked
    if isinstance(asked, TokenBatch):
        windows = asked.windows(spec.lookback, None if spec.token_map is None else spec.token_map.ids)
        for table in spec.tables:
            found = table.hash.keys(windows)
            for part in layout.parts[table.layer]:
                yield part, part.pick(found)
        return
    for layer, ids in asked.items():
        table = spec.table(layer)
        columns = layout.columns(table)
        for part in layout.parts[layer]:
            of_part: list[Ids] | None = []
            for at, span in enumerate(part.columns):
                first = part.first + at * part.width
                if ids.ndim != 2 or ids.shape[1] != columns.stop - columns.start:
                    keys = None
                else:
                    keys = table.hash.keys_of(span, ids[:, first : first + part.width], table.head_offsets)
                of_part = None if keys is None or of_part is None else [*of_part, keys]
            yield part, None if of_part is None else np.stack(of_part)


# --- measuring


@dataclass(frozen=True)
class Trial:
    """Something that might change a verdict.

    settings: of the client. ahead: the next forward's rows are prefetched as one starts.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    ahead: bool = False


@dataclass(frozen=True)
class Phase:
    """One phase as measured.

    first, forwards: the first that was played of the stream's, and how many. num_tokens, forward_s: of the largest.
    split: as the function. client_cpu_s: processor time of this process for a lookup, on average, playing apart.
    bytes: of a lookup's rows, on average, by source. settled: whether lookups before it touched hardly any new memory.
    """

    name: str
    first: int
    forwards: int
    num_tokens: int
    forward_s: float
    verdicts: list[Verdict]
    split: Mapping[str, tuple[float, float]]
    client_cpu_s: float
    bytes: Mapping[str, float]
    settled: bool

    @property
    def hidden(self) -> bool:
        """Whether all layers are."""
        return all(verdict.hidden for verdict in self.verdicts)


@dataclass(frozen=True)
class Tried:
    """A trial of a phase."""

    trial: Trial
    phase: Phase


@dataclass(frozen=True)
class Report:
    """All that there is to say.

    status: of the client, after what was measured. round_trip_s: of a lookup of one row, less the server's time, at the
    median; None where the server is not asked. cache: by size, ascending. notes: of what was not tried, and why.
    """

    model: str
    version: str
    status: ClientStatus
    percentile: float
    round_trip_s: float | None
    phases: list[Phase]
    cache: list[CacheSize]
    tried: list[Tried]
    notes: list[str]

    @property
    def hidden(self) -> bool:
        """Whether all layers of all phases are."""
        return all(phase.hidden for phase in self.phases)

    def remedies(self, phase: str) -> list[str]:
        """Names of the trials that hid every layer of a phase."""
        return [one.trial.name for one in self.tried if one.phase.name == phase and one.phase.hidden]

    def to_json(self) -> dict[str, Any]:
        """JSON types, with what is worked out of them."""
        document = asdict(self)
        for phase, plain in zip(self.phases, document["phases"], strict=True):
            self._complete(phase, plain)
            plain["remedies"] = self.remedies(phase.name)
        for tried, plain in zip(self.tried, document["tried"], strict=True):
            self._complete(tried.phase, plain["phase"])
        server, lane = self.status["target"], self.status["lane"]
        return {**document, "server": server, "lane": lane, "hidden": self.hidden}

    @staticmethod
    def _complete(phase: Phase, plain: dict[str, Any]) -> None:
        plain["hidden"] = phase.hidden
        plain["split"] = {name: list(seconds) for name, seconds in phase.split.items()}
        for verdict, one in zip(phase.verdicts, plain["verdicts"], strict=True):
            one["hidden"] = verdict.hidden


class Doctor:
    """Measures phases of a stream with one client's settings, and then with others.

    settings: keywords of `Client`. clocks, phases: by name of the phase. seconds: for all of it, connecting apart.
    Raises what `Client` and its lookups raise.
    """

    def __init__(
        self,
        settings: Settings,
        clocks: Mapping[str, Clock],
        phases: Mapping[str, Sequence[Forward]],
        percentile: float = 99.0,
        seconds: float = 30.0,
    ) -> None:
        self._settings, self._clocks, self._phases = dict(settings), clocks, phases
        self._percentile, self._seconds = percentile, seconds

    def examine(self) -> Report:
        """Measure, simulate, try."""
        with Client(**self._settings) as client:
            spec, version, heads = client.spec, client.version, self._settings.get("heads")
            round_trip_s = round_trip(client)
            budget_s = _AS_IS * self._seconds / len(self._phases)
            measured = [self._measure(client, name, budget_s) for name in self._phases]
            status, attachable, direct = client.status(), client.served.attach, client.served.direct
        sizes = simulate(spec, heads, self._phases, _SIMULATION * self._seconds)
        notes: list[str] = []
        trials = [
            (phase, trial)
            for phase in measured
            for trial in self._trials(phase, sizes, status["lane"], attachable, direct)
        ]
        tried = []
        for phase, trial in trials:
            try:
                tried.append(Tried(trial, self._try(phase, trial, len(trials))))
            except EngrampoolError as error:  # what is only tried must not take the measured verdict away
                notes.append(f"{trial.name} could not be tried for {phase.name}: {error}")
        return Report(spec.name, version, status, self._percentile, round_trip_s, measured, sizes, tried, notes)

    def _measure(self, client: Client, name: str, seconds: float, *, ahead: bool = False) -> Phase:
        forwards, clock = self._phases[name], self._clocks[name]
        until = time.monotonic() + seconds
        first, settled = _warm_up(client, forwards, clock, _WARM_UP * seconds, ahead)
        stream = (forwards[at] for at in range(first, len(forwards)))
        played = play(client, stream, clock, until - time.monotonic(), ahead=ahead)
        num_tokens = max(one.num_tokens for one in played.forwards)
        return Phase(
            name,
            first,
            len(played.forwards),
            num_tokens,
            clock.starts(num_tokens)[-1],
            judge(played, self._percentile),
            split(played, self._percentile),
            played.cpu_s / played.lookups,
            {source: nbytes / played.lookups for source, nbytes in played.bytes.items()},
            settled,
        )

    def _trials(
        self, phase: Phase, sizes: Sequence[CacheSize], lane: str, attachable: bool, direct: bool
    ) -> list[Trial]:
        """What promises something for a phase."""
        settings, exposed = self._settings, not phase.hidden
        trials = []
        size = best_size(sizes, phase.name)
        if size is not None and lane != "attached" and size > settings.get("cache_bytes", 0):
            trials.append(Trial(f"cache_bytes={size}", {"cache_bytes": size}))
        if not exposed:
            return trials
        if settings.get("attach") == "off" and attachable:
            trials.insert(0, Trial('attach="auto"', {"attach": "auto"}))
        if settings.get("direct") == "off" and direct:
            trials.append(Trial('direct="auto"', {"direct": "auto"}))
        if not settings.get("dedupe", True):
            trials.append(Trial("dedupe=True", {"dedupe": True}))
        if settings.get("connections", 1) == 1 and phase.bytes["wire"] > SPLIT_ABOVE_BYTES:
            trials.append(Trial("connections=2", {"connections": 2}))
        if phase.name == "prefill" and len(self._phases[phase.name]) > 4:
            trials.append(Trial("prefetch(..., ahead=True) of the next chunk as one starts", ahead=True))
        return trials

    def _try(self, phase: Phase, trial: Trial, trials: int) -> Phase:
        """Play the same forwards again. A cache gets to know others of the stream first, as one in use would."""
        until = time.monotonic() + (1 - _AS_IS - _SIMULATION) * self._seconds / trials
        with Client(**{**self._settings, **trial.settings}) as client:
            if client.cache is not None:
                half = time.monotonic() + (until - time.monotonic()) / 2
                for forward in self._others(phase):
                    forward.start(client).wait()
                    if time.monotonic() > half:
                        break
            return self._measure(client, phase.name, until - time.monotonic(), ahead=trial.ahead)

    def _others(self, phase: Phase) -> Iterable[Forward]:
        """Forwards of the stream that were not played in this phase."""
        for name, forwards in self._phases.items():
            for at in range(phase.first + phase.forwards if name == phase.name else 0, len(forwards)):
                yield forwards[at]


def _warm_up(
    client: Client, forwards: Sequence[Forward], clock: Clock, seconds: float, ahead: bool
) -> tuple[int, bool]:
    """Play forwards without their layers' times until they touch hardly any new memory.

    The first lookups of a size make the process as large as it will be, which may cost many times what they cost later.
    Gives how many forwards are used up by that, at most half of them, and whether it came to an end.
    """
    at_once = Clock((0.0,) * len(clock.layer_s), clock.num_tokens, clock.scales)
    until = time.monotonic() + seconds
    at, most = 0, len(forwards) // 2
    while True:
        some = forwards[at : at + _WARM_UP_ROUND] if at < most else forwards[:1]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        play(client, some, at_once, 0.0, ahead=ahead)
        touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        at = min(at + len(some), most)
        settled = touched < _WARM_FAULTS * len(some)
        if settled or at == most or time.monotonic() > until:
            return at, settled


def round_trip(client: Client) -> float | None:
    """Seconds at the median that a prefetch of one row takes beside the server's own time; None if it is not asked."""
    ids = {client.spec.layers[0]: np.zeros(1, np.uint32)}
    beside = []
    for _ in range(_ROUND_TRIPS):
        step = client.prefetch_rows(ids)
        step.wait()
        if step.times is not None and step.elapsed_s is not None:
            beside.append(step.elapsed_s - step.times.total_us / 1e6)
    return float(np.median(beside)) if beside else None
