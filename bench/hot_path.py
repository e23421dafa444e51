"""What a decode step costs the caller of `prefetch` where the cache has all its rows: `python bench/hot_path.py`.

64 sequences of one token each, both layers of V4.1, rows in the cache: from `prefetch` to the rows of layer 14, in the
caller's thread. Beside it what bounds it: one np.take of as many rows of the same memory. Prints medians, the CPU time
of the thread, and a profile of it.
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
    with serve_process(workload.packed, workers=1) as server, Client(server.address, cache_bytes=256 << 20) as client:
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

        def step() -> None:
            client.prefetch(*batches[next(turn) % len(batches)]).rows(14)

        rows, entries = client.cache.rows, SEQUENCES * 3 * 2
        picked = [random.permutation(client.cache.filled)[:entries] for _ in batches]
        out = np.empty((entries, rows.shape[1]), np.uint8)

        def take() -> None:
            np.take(rows, picked[next(turn) % len(picked)], axis=0, out=out, mode="clip")

        timed(step, 200)
        whole, whole_cpu = timed(step, chosen.calls)
        floor, _ = timed(take, chosen.calls)
        assert client.stats.bytes["wire"] == asked, "the cache did not hold all"
        print(f"step: p50 {statistics.median(whole):.0f} us, thread CPU p50 {statistics.median(whole_cpu):.0f} us")
        print(f"np.take of its rows alone: p50 {statistics.median(floor):.0f} us")
        profile = cProfile.Profile()
        profile.enable()
        timed(step, 1000)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
