"""Streams of lookups, and playing them against the clock of a model that does nothing but wait for its rows."""

import select
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.client import Client
from engrampool_client.doctor.record import Recording
from engrampool_client.errors import BatchError
from engrampool_client.lookup.step import Step
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_proto.wire import ServerTimes

Tokens = npt.NDArray[np.int32]
# Sleeping ends late by some tens of microseconds; the rest of a wait is looked at without.
_SPIN_S = 0.3e-3
# What is kept in memory of a recording.
_MAX_RECORDED_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Forward:
    """What one forward asks for: a batch of tokens, or row ids by layer as they were recorded."""

    asked: TokenBatch | Mapping[int, npt.NDArray[Any]]

    @property
    def num_tokens(self) -> int:
        """Tokens, or the most row ids along the first axis."""
        if isinstance(self.asked, TokenBatch):
            return self.asked.num_tokens
        return max(map(len, self.asked.values()), default=0)

    def start(self, client: Client, ahead: bool = False) -> Step:
        """Prefetch it, all layers. Raises as `Client.prefetch` does."""
        if isinstance(self.asked, TokenBatch):
            batch = self.asked
            return client.prefetch(batch.tokens, batch.query_start_loc, batch.lookback, ahead=ahead)
        return client.prefetch_rows(self.asked, ahead=ahead)


@dataclass(frozen=True)
class Clock:
    """How long each of a model's layers takes in a forward of `num_tokens`.

    scales: a forward of fewer or more tokens takes as much less or more (prefill), else just as long (decode).
    """

    layer_s: tuple[float, ...]
    num_tokens: int
    scales: bool

    @classmethod
    def even(cls, total_s: float, layers: int, num_tokens: int, scales: bool) -> "Clock":
        """All layers alike."""
        return cls((total_s / layers,) * layers, num_tokens, scales)

    def starts(self, num_tokens: int) -> list[float]:
        """Seconds from a forward's start to each layer's, and last to its end."""
        scale = num_tokens / self.num_tokens if self.scales else 1.0
        return [scale * seconds for seconds in accumulate(self.layer_s, initial=0.0)]


@dataclass(frozen=True, eq=False)
class Text:
    """Sequences of tokens, one behind the other. bounds: int64 [D + 1], where each begins and the last ends."""

    tokens: Tokens
    bounds: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[Tokens]) -> "Text":
        """Of sequences from their starts; empty ones are left out."""
        given = [one for one in sequences if len(one)]
        tokens = np.concatenate(given) if given else np.empty(0, np.int32)
        return cls(tokens, np.cumsum([0, *map(len, given)]))

    def before(self, at: npt.NDArray[np.int64], width: int) -> Tokens:
        """The tokens before each position in its sequence: int32 [len(at), width], the nearest first, -1 for none."""
        first = self.bounds[np.searchsorted(self.bounds, at, "right") - 1]
        back = at[:, None] - np.arange(1, width + 1)
        return np.where(back >= first[:, None], self.tokens[np.maximum(back, 0)], np.int32(-1))


class Prefill(Sequence[Forward]):
    """tokens [start, stop) of a text in chunks; a sequence that does not fit goes on in the next, with its look-back.

    What is left behind the last whole chunk is left out, unless there is no whole one.
    """

    def __init__(self, text: Text, start: int, stop: int, chunk: int, lookback: int) -> None:
        self._text, self._start, self._stop, self._chunk, self._lookback = text, start, stop, chunk, lookback

    def __len__(self) -> int:
        return max((self._stop - self._start) // self._chunk, int(self._stop > self._start))

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        first = self._start + range(len(self))[number] * self._chunk
        stop = min(first + self._chunk, self._stop)
        bounds = self._text.bounds
        begins = np.r_[first, bounds[(bounds > first) & (bounds < stop)]]
        locations = (np.r_[begins, stop] - first).astype(np.int32)
        lookback = self._text.before(begins, self._lookback)
        return Forward(TokenBatch(self._text.tokens[first:stop], locations, lookback))


class Decode(Sequence[Forward]):
    """Tokens [start, stop) of a text, one of each of `batch` sequences a step, which go on from as many places."""

    def __init__(self, text: Text, start: int, stop: int, batch: int, lookback: int) -> None:
        self._text, self._lookback = text, lookback
        self._steps = (stop - start) // batch
        self._starts = start + self._steps * np.arange(batch)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        at = self._starts + range(len(self))[number]
        bounds = np.arange(len(at) + 1, dtype=np.int32)
        return Forward(TokenBatch(self._text.tokens[at], bounds, self._text.before(at, self._lookback)))


def phases_of_text(
    text: Text, lookback: int, prefill_tokens: int | None, decode_batch: int | None
) -> dict[str, Sequence[Forward]]:
    """The phases asked for, each of tokens of its own: what one has asked for, a cache need not have for the other.

    Raises BatchError if there are too few.
    """
    size = len(text.tokens)
    half = size // 2 if prefill_tokens and decode_batch else size if prefill_tokens else 0
    phases: dict[str, Sequence[Forward]] = {}
    if prefill_tokens:
        phases["prefill"] = Prefill(text, 0, half, prefill_tokens, lookback)
    if decode_batch:
        phases["decode"] = Decode(text, half, size, decode_batch, lookback)
    for name, forwards in phases.items():
        if not len(forwards):
            raise BatchError(f"{size} tokens are too few for a forward of {name}: give more, or a smaller batch")
    return phases


def phases_of_recording(
    recording: Recording, spec: ModelSpec, heads: tuple[int, int] | None, clocks: Mapping[str, Clock]
) -> dict[str, Sequence[Forward]]:
    """The recorded lookups, each in the phase whose number of tokens it is nearer to, as a ratio.

    heads: of each token only these columns, as the client that replays them is to ask for. Raises RecordError.
    """
    phases: dict[str, list[Forward]] = {name: [] for name in clocks}
    nbytes = 0
    for recorded in recording.of(spec):
        if not recorded.num_tokens:
            continue
        name = min(clocks, key=lambda name: abs(np.log(recorded.num_tokens / clocks[name].num_tokens)))
        ids = {layer: _columns(ids, spec.table(layer).heads, heads) for layer, ids in recorded.ids.items()}
        phases[name].append(Forward(ids))
        nbytes += sum(array.nbytes for array in ids.values())
        if nbytes > _MAX_RECORDED_BYTES:
            break
    return {name: forwards for name, forwards in phases.items() if forwards}


def _columns(ids: npt.NDArray[Any], heads: int, wanted: tuple[int, int] | None) -> npt.NDArray[Any]:
    whole = ids.ndim == 2 and ids.shape[1] == heads
    return np.ascontiguousarray(ids[:, slice(*wanted)]) if whole and wanted is not None else ids


@dataclass(frozen=True)
class Played:
    """One forward. Times in seconds.

    call_s: what `prefetch` itself held the model up. margin_s: layer -> from when its rows could be used to its start;
    negative if it had to wait, by how long. masked: layer -> tokens that it went without.
    elapsed_s: until the last row, None if some never came. times: the server's, None if it was not asked.
    """

    num_tokens: int
    call_s: float
    margin_s: Mapping[int, float]
    masked: Mapping[int, int]
    elapsed_s: float | None
    times: ServerTimes | None


@dataclass
class Play:
    """A phase that was played. starts_s: layer -> from a forward's start to the layer's, of the largest forward.

    lookups: those that were started. cpu_s: processor time of the client, all its threads, for them. bytes: of their
    rows, by source.
    """

    forwards: list[Played] = field(default_factory=list)
    starts_s: dict[int, float] = field(default_factory=dict)
    cpu_s: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)
    lookups: int = 0


def play(client: Client, forwards: Iterable[Forward], clock: Clock, seconds: float, *, ahead: bool = False) -> Play:
    """Run forwards one after the other against the clock for so long, three at least.

    Each layer starts when those before it have taken their time, and waited for their rows. ahead: the next forward's
    rows are prefetched as a forward starts, rather than when it starts itself; the first, which none can be ahead of,
    is left out.
    Raises what a lookup failed with, unless the client masks it.
    """
    played = Play()
    before = dict(client.stats.bytes)
    begin, cpu = time.perf_counter(), time.process_time() - time.thread_time()
    coming = iter(forwards)
    started: list[tuple[Forward, Step, float, float]] = []
    inside = 0.0

    def start(later: bool) -> None:
        nonlocal inside
        forward = next(coming, None)
        if forward is None:
            return
        at, cpu_at = time.perf_counter(), time.thread_time()
        step = forward.start(client, later)
        inside += time.thread_time() - cpu_at
        started.append((forward, step, at, time.perf_counter() - at))
        played.lookups += 1

    while len(played.forwards) < 3 or time.perf_counter() < begin + seconds:
        if not started:
            start(False)
        if not started:
            break
        forward, step, asked_at, call_s = started.pop(0)
        # One that was prefetched ahead starts now, any other one did when it was asked for.
        start_at = time.perf_counter() if ahead else asked_at
        first = ahead and played.lookups == 1
        if ahead:
            start(True)
        starts = clock.starts(forward.num_tokens)
        margins, masked, late = {}, {}, 0.0
        for layer in step.layers:
            due = start_at + starts[layer] + late
            _wait_until(due)
            cpu_at, called = time.thread_time(), time.perf_counter()
            step.rows(layer)
            back = time.perf_counter()
            inside += time.thread_time() - cpu_at
            masked[layer] = int(np.count_nonzero(~step.valid(layer))) if step.error is not None else 0
            # Asked for a little before the step's own clock began: what copying the batch takes.
            arrived = asked_at + step.arrived_s.get(layer, inf)
            ready = arrived if arrived <= called else back
            margins[layer] = due - ready
            late += max(0.0, ready - due)
        _wait_until(start_at + starts[-1] + late)
        step.wait()  # the last rows are handed over a moment before the step knows its times
        if not first:
            played.forwards.append(Played(forward.num_tokens, call_s, margins, masked, step.elapsed_s, step.times))
    for _, unplayed, *_ in started:
        unplayed.cancel()
    starts = clock.starts(max((one.num_tokens for one in played.forwards), default=0))
    played.starts_s = {layer: starts[layer] for one in played.forwards for layer in one.margin_s}
    played.cpu_s = time.process_time() - time.thread_time() - cpu + inside
    played.bytes = {source: count - before[source] for source, count in client.stats.bytes.items()}
    return played


def _wait_until(at: float) -> None:
    while (left := at - time.perf_counter()) > 0:
        # Without the interpreter's lock either way: the client's threads are at work meanwhile. To sleep for no time
        # takes as long as to sleep for some.
        if left > _SPIN_S:
            time.sleep(left - _SPIN_S)
        else:
            select.select([], [], [], 0)
