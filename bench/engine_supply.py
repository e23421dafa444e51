"""What an engine's adapter takes itself where rows are there: `python bench/engine_supply.py MODEL [--profile]`.

The engine's thread has a forward of decoding (so many requests of one token, whose rows were asked for when they were
sampled) or of a prompt's chunk (asked for when it came), waits until all of it has come, and then is timed: what it
learns, `start` and `wait`. Copies to a device are not made: they are counted. Prints medians in milliseconds, by the
clock and of the calling thread's processor time, beside what a client alone takes of the thread for the same rows.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from engrampool_client import Client
from engrampool_client.integrations.forwards.history import Histories
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.step import Step
from engrampool_client.testing import serve_process
from engrampool_proto.spec import ModelSpec

# Tokens of a request at most.
LONGEST = 20_000


class Nowhere:
    """A landing that copies go nowhere of."""

    def __init__(self, spec: ModelSpec, max_tokens: int) -> None:
        self.layers, self.max_tokens = spec.layers, max_tokens
        self.row_shape = {layer: (spec.table(layer).heads, spec.table(layer).row_bytes) for layer in spec.layers}

    def memory(self, tokens: int) -> dict[int, np.ndarray]:
        """Memory of the process."""
        return {layer: np.zeros((tokens, *shape), np.uint8) for layer, shape in self.row_shape.items()}

    def event(self) -> "Nowhere":
        """Copies have ended when they begin."""
        return self

    def record(self) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""

    def query(self) -> bool:
        """Always."""
        return True

    def copy(self, *_: int) -> None:
        """Nothing."""

    def clear(self, *_: object) -> None:
        """Nothing."""

    def landed(self, layer: int) -> Any:
        """Nothing."""


class Instant:
    """In the place of a client: its rows are there, whatever they are, and no thread but the caller's does anything."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.stats = spec, SimpleNamespace(in_flight=0)

    def prefetch(self, *_: Any, out: Any, layers: Any = None, **__: Any) -> Step:
        """All of it, at once."""
        delivery = Delivery(tuple(out))
        delivery.arrived(out)
        delivery.end(None)
        return Step(delivery)


def timed(call: Callable[[], object]) -> np.ndarray:
    """Milliseconds, and of this thread's CPU time."""
    begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
    call()
    return np.array([time.perf_counter_ns() - begin, time.thread_time_ns() - begin_cpu]) / 1e6


def measure(
    client: Client | Instant, requests: int, tokens: int, seconds: float, profile: cProfile.Profile | None
) -> list[Any]:
    """The adapter's times, and the client's, of forwards of so many requests with a chunk of `tokens` each."""
    random, vocab = np.random.default_rng(0), client.spec.vocab_size
    landing = Nowhere(client.spec, 8192)
    alone = {layer: np.zeros((8192, *shape), np.uint8) for layer, shape in landing.row_shape.items()}
    supply = Supply(client, landing, Histories(64, LONGEST, 3, compiled=True), timeout_s=60, ahead_tokens=8192)
    numbers, ones = np.arange(requests), np.ones(requests, np.int64)
    counts = ones * tokens
    for number in numbers.tolist():
        supply.add(number, random.integers(0, vocab, 8), 7)
    if tokens == 1:
        supply.start(numbers, ones * 7, ones)
        supply.wait()
    found: list[Any] = []
    until = time.monotonic() + seconds
    for position in range(8, LONGEST):
        ids = random.integers(0, vocab, (requests, 1))
        if tokens == 1:
            supply.sampled(lambda ids=ids: (ids, ones))
        else:
            supply.add(0, random.integers(0, vocab, tokens), 0)
        while client.stats.in_flight or supply.sampling:
            time.sleep(0 if isinstance(client, Instant) else 1e-3)

        starts = ones * (position if tokens == 1 else 0)

        def forward(starts: np.ndarray = starts, learned: np.ndarray = ids[:, 0]) -> None:
            if tokens == 1:
                supply.learn(numbers, starts, ones, learned)
            supply.start(numbers, starts, counts)
            supply.wait()

        batch = random.integers(0, vocab, requests * tokens).astype(np.int32)
        out = {layer: rows[: len(batch)] for layer, rows in alone.items()}
        bounds = np.arange(0, len(batch) + 1, tokens, dtype=np.int32)

        def by_client(batch: Any = batch, bounds: Any = bounds, out: Any = out) -> None:
            client.prefetch(batch, bounds, out=out).wait()

        if profile is not None and position % 2:
            profile.runcall(forward)
        else:
            found.append((*timed(forward), *timed(by_client)))
        if time.monotonic() > until and len(found) > 5:
            break
    supply.release()
    return found[2:]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed model of V4.1's layout")
    parser.add_argument("--seconds", type=float, default=15, help="for each kind of forward")
    parser.add_argument("--profile", action="store_true", help="profile half of the forwards, and say where time goes")
    parser.add_argument("--instant", action="store_true", help="without a client, whose threads compete for the cores")
    chosen = parser.parse_args()
    profile = cProfile.Profile() if chosen.profile else None
    print("| forward | forwards | adapter | adapter, CPU | client alone | client alone, CPU |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with serve_process(chosen.model) as server, Client(server.address) as client:
        asked = Instant(client.spec) if chosen.instant else client
        for name, requests, tokens in (("64 requests decode", 64, 1), ("a chunk of 8192", 1, 8192)):
            found = measure(asked, requests, tokens, chosen.seconds, profile)
            cells = [f"{statistics.median(column):.3f}" for column in zip(*found, strict=True)]
            print(f"| {name} | {len(found)} | {' | '.join(cells)} |", flush=True)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
