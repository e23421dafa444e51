"""Whether rows are there when the layers want them: what is measured, what is made of it, and what is tried against it.

Nothing here prints; doctor.py does.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.cache import HotRows
from engrampool_client.client import Client
from engrampool_client.errors import EngrampoolError
from engrampool_client.plan import Layout, Part
from engrampool_client.replay import Clock, Forward, Play, play
from engrampool_client.settings import SPLIT_ABOVE_BYTES
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
_ROUND_TRIPS = 30


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
        margins = [one.margin_s[layer] for one in forwards]
        median, at = (float(np.percentile(margins, 100 - q, method="lower")) for q in (50, percentile))
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
    for name, forwards in phases.items():
        until = time.monotonic() + seconds / len(phases)
        for forward in forwards:
            entries = _entries(spec, layout, forward)
            if entries is None:
                continue
            keys, groups, nbytes = entries
            asked[name] += int(nbytes.sum())
            for at, cache in enumerate(caches):
                found = cache.find(keys, groups) >= 0
                saved[name][at] += int(nbytes[found].sum())
                missing = ~found
                cache.put(keys[missing], groups[missing], np.zeros((int(missing.sum()), 1), np.uint8))
            if time.monotonic() > until:
                break
    results: list[CacheSize] = []
    for at, (size, cache) in enumerate(zip(sizes, caches, strict=True)):
        if not cache.hits + cache.misses or (results and not results[-1].evicted):
            break
        shares = {name: saved[name][at] / asked[name] for name in phases if asked[name]}
        results.append(CacheSize(size, cache.hits / (cache.hits + cache.misses), shares, cache.evicted))
    return results


def best_size(sizes: Sequence[CacheSize], phase: str) -> int | None:
    """Bytes of the smallest cache that does nearly what the largest does for a phase; None if none is worth it."""
    most = max((size.saved.get(phase, 0.0) for size in sizes), default=0.0)
    if most < WORTH:
        return None
    return next(size.nbytes for size in sizes if size.saved.get(phase, 0.0) >= _NEARLY * most)


def _entries(spec: ModelSpec, layout: Layout, forward: Forward) -> tuple[Ids, Ids, Ids] | None:
    """Keys, groups and bytes of the distinct entries of one lookup: each [N]. None for ids that have no keys."""
    keys: list[Ids] = []
    groups: list[Ids] = []
    nbytes: list[Ids] = []
    for part, of_part in _keys(spec, layout, forward):
        if of_part is None:
            return None
        for at, row in enumerate(of_part):
            distinct = np.unique(row)
            keys.append(distinct)
            groups.append(np.full(len(distinct), part.number + at, np.uint8))
            nbytes.append(np.full(len(distinct), part.entry_bytes))
    return (np.concatenate(keys), np.concatenate(groups), np.concatenate(nbytes)) if keys else None


def _keys(spec: ModelSpec, layout: Layout, forward: Forward) -> Iterable[tuple[Part, Ids | None]]:
    """Of each part of each layer: int64 [groups, T], None if there are none."""
    asked = forward.asked
    if isinstance(asked, TokenBatch):
        windows = asked.windows(spec.lookback, None if spec.token_map is None else spec.token_map.ids)
        for table in spec.tables:
            found = table.hash.keys(windows)
            for part in layout.parts[table.layer]:
                yield part, found[part.groups[0] : part.groups[-1] + 1]
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
    """One phase as measured. client_cpu_s: processor time of the client's process for a lookup, on average."""

    name: str
    forwards: int
    num_tokens: int
    forward_s: float
    verdicts: list[Verdict]
    split: Mapping[str, tuple[float, float]]
    client_cpu_s: float
    bytes: Mapping[str, int]

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

    lane: what lookups went over. round_trip_s: of a lookup of one row, less the server's time, at the median; None
    where the server is not asked. cache: by size, ascending. notes: of what was not tried, and why.
    """

    model: str
    version: str
    server: str
    percentile: float
    lane: str
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
        return {**document, "hidden": self.hidden}

    @staticmethod
    def _complete(phase: Phase, plain: dict[str, Any]) -> None:
        plain["hidden"] = phase.hidden
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
            lane, attachable, direct = lane_of(client), client.served.attach, client.served.direct
        sizes = simulate(spec, heads, self._phases, _SIMULATION * self._seconds)
        notes: list[str] = []
        trials = [
            (phase, trial) for phase in measured for trial in self._trials(phase, sizes, lane, attachable, direct)
        ]
        tried = []
        for phase, trial in trials:
            try:
                tried.append(Tried(trial, self._try(phase, trial, len(trials))))
            except EngrampoolError as error:  # what is only tried must not take the measured verdict away
                notes.append(f"{trial.name} could not be tried for {phase.name}: {error}")
        target = str(self._settings["target"])
        return Report(spec.name, version, target, self._percentile, lane, round_trip_s, measured, sizes, tried, notes)

    def _measure(self, client: Client, name: str, seconds: float, *, ahead: bool = False) -> Phase:
        forwards, clock = self._phases[name], self._clocks[name]
        # The first lookup of its size finds no memory that fits, and no connection that has carried as much.
        forwards[0].start(client).wait()
        played = play(client, forwards[1:] if len(forwards) > 3 else forwards, clock, seconds, ahead=ahead)
        num_tokens = max(one.num_tokens for one in played.forwards)
        return Phase(
            name,
            len(played.forwards),
            num_tokens,
            clock.starts(num_tokens)[-1],
            judge(played, self._percentile),
            split(played, self._percentile),
            played.cpu_s / len(played.forwards),
            played.bytes,
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
        wire_bytes = phase.bytes["wire"] / phase.forwards
        if settings.get("connections", 1) == 1 and wire_bytes > SPLIT_ABOVE_BYTES:
            trials.append(Trial("connections=2", {"connections": 2}))
        if phase.name == "prefill" and len(self._phases[phase.name]) > 3:
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
            for at in range(1 + phase.forwards if name == phase.name else 0, len(forwards)):
                yield forwards[at]


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


def lane_of(client: Client) -> str:
    """What lookups go over now: "attached", "direct" or "grpc"."""
    if client.attached:
        return "attached"
    return "direct" if client.direct else "grpc"
