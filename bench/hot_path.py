"""What a decode step costs where the cache has all its rows: `python bench/hot_path.py`.

64 sequences of one token each, both layers of V4.1, rows in the cache. `lookup` does all of it in one thread, which is
profiled; beside it, what `prefetch` takes until it returns and until both layers are there, and what bounds all:
np.take of as many rows of the same memory, into the same arrays. Prints medians, and the profile.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process
from workload import Workload

SEQUENCES = 64


def timed(call: Callable[[], object], calls: int) -> tuple[list[float], list[float]]:
    """Microseconds of each call, and of its thread's CPU time."""
    times, cpu = [], []
    for _ in range(calls):
        begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
        cpu.append((time.thread_time_ns() - begin_cpu) / 1e3)
    return times, cpu


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--batches", type=int, default=32, help="different steps that take turns")
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    random = np.random.default_rng(0)
    bounds = np.arange(SEQUENCES + 1, dtype=np.int32)
    with (
        serve_process(workload.packed, workers=1) as server,
        Client(server.address, cache_bytes=256 << 20, keep_memory=True) as client,
    ):
        vocabulary = client.spec.vocab_size
        batches = [
            (
                random.integers(0, vocabulary, SEQUENCES).astype(np.int32),
                bounds,
                random.integers(0, vocabulary, (SEQUENCES, 3)).astype(np.int32),
            )
            for _ in range(chosen.batches)
        ]
        for batch in batches:
            client.lookup(*batch)
        asked = client.stats.bytes["wire"]
        turn = iter(range(10**9))

        out = {layer: np.zeros((SEQUENCES, 24, 264), np.uint8) for layer in (1, 14)}

        def lookup() -> None:
            client.lookup(*batches[next(turn) % len(batches)], out=out)

        def step() -> None:
            begin = time.perf_counter_ns()
            coming = client.prefetch(*batches[next(turn) % len(batches)], out=out)
            returned.append((time.perf_counter_ns() - begin) / 1e3)
            coming.rows(1)
            coming.rows(14)

        returned: list[float] = []
        rows, entries = client.cache.rows, SEQUENCES * 3 * 2
        picked = [random.permutation(client.cache.filled)[:entries] for _ in batches]
        places = [array.reshape(-1, rows.shape[1]) for array in out.values()]

        def take() -> None:
            some = picked[next(turn) % len(picked)]
            for place, part in zip(places, np.split(some, len(places)), strict=True):
                rows.take(part, 0, place, "clip")

        timed(lookup, 200)
        whole, whole_cpu = timed(lookup, chosen.calls)
        floor, _ = timed(take, chosen.calls)
        steps, _ = timed(step, chosen.calls)
        assert client.stats.bytes["wire"] == asked, "the cache did not hold all"
        middle = statistics.median
        print(f"lookup: p50 {middle(whole):.0f} us, CPU time p50 {middle(whole_cpu):.0f} us")
        print(f"np.take of as many rows alone: p50 {middle(floor):.0f} us")
        print(
            f"prefetch: returns after p50 {middle(returned):.0f} us, both layers are there after {middle(steps):.0f} us"
        )
        profile = cProfile.Profile()
        profile.enable()
        timed(lookup, 1000)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
