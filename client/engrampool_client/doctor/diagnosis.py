"""Whether rows are there when the layers want them: what is measured, what is made of it, and what is tried against it.

Nothing here prints; command.py does.
"""

import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engrampool_client.client import Client
from engrampool_client.doctor.cache_sizes import CacheSize, best_size, simulate
from engrampool_client.doctor.replay import Clock, Forward, Play, play
from engrampool_client.errors import EngrampoolError
from engrampool_client.pool.endpoint import SPLIT_ABOVE_BYTES, connections_of
from engrampool_client.status import ClientStatus
from engrampool_proto.tiers.tier import Tier

Settings = Mapping[str, Any]
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
    emulated: the tier whose memory was emulated, None for memory as it is.
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
    emulated: str | None = None

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


def trials(
    settings: Settings,
    phase: Phase,
    stream: Sequence[Forward],
    sizes: Sequence[CacheSize],
    *,
    lane: str,
    attachable: bool,
    direct: bool,
) -> list[Trial]:
    """Trials that promise something for a phase, measured with `settings` over `lane`.

    stream: all forwards of the phase. sizes: what caches would do. attachable, direct: whether the servers offer that.
    """
    chosen = []
    size = best_size(sizes, phase.name)
    if size is not None and lane != "attached" and size > settings.get("cache_bytes", 0):
        chosen.append(Trial(f"cache_bytes={size}", {"cache_bytes": size}))
    if phase.hidden:
        return chosen
    if settings.get("attach") == "off" and attachable:
        chosen.insert(0, Trial('attach="auto"', {"attach": "auto"}))
    if settings.get("direct") == "off" and direct:
        chosen.append(Trial('direct="auto"', {"direct": "auto"}))
    if not settings.get("dedupe", True):
        chosen.append(Trial("dedupe=True", {"dedupe": True}))
    if connections_of(settings.get("connections", "auto"), lane) == 1 and phase.bytes["wire"] > SPLIT_ABOVE_BYTES:
        chosen.append(Trial("connections=2", {"connections": 2}))
    if phase.name == "prefill" and len(stream) > 4:
        chosen.append(Trial("prefetch(..., ahead=True) of the next chunk as one starts", ahead=True))
    return chosen


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
        tried = []
        to_try: list[tuple[Phase, Trial]] = []
        for phase in measured:
            stream, lane = self._phases[phase.name], status["lane"]
            chosen = trials(self._settings, phase, stream, sizes, lane=lane, attachable=attachable, direct=direct)
            to_try += [(phase, trial) for trial in chosen]
        for phase, trial in to_try:
            try:
                tried.append(Tried(trial, self._try(phase, trial, len(to_try))))
            except EngrampoolError as error:  # what is only tried must not take the measured verdict away
                notes.append(f"{trial.name} could not be tried for {phase.name}: {error}")
        tier = self._settings.get("emulate")
        emulated = None if tier is None else str(Tier.of(tier))
        return Report(
            spec.name, version, status, self._percentile, round_trip_s, measured, sizes, tried, notes, emulated
        )

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

    def _try(self, phase: Phase, trial: Trial, among: int) -> Phase:
        """Play the same forwards again. A cache gets to know others of the stream first, as one in use would."""
        until = time.monotonic() + (1 - _AS_IS - _SIMULATION) * self._seconds / among
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
