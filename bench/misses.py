"""What a cache that has none of a lookup's rows costs, and a step whose server is away: `python bench/misses.py`.

Lookups of tokens that never repeat, one sequence each, both layers of V4.1: by a client with a cache, and in turn by
one without. Then the server is stopped, and steps of a client with `on_failure="mask"` are timed once its breaker is
open: from `prefetch` until both layers were handed out. Prints medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process
from workload import Workload


def timed(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=20_000, help="of each head: 48 times as many rows")
    parser.add_argument("--calls", type=int, default=300)
    chosen = parser.parse_args()
    workload, random = Workload.make(chosen.data, chosen.vocab_size), np.random.default_rng(0)

    def batch(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        drawn = random.integers(0, vocabulary, (4, tokens)).astype(np.int32)
        return drawn[0], np.arange(tokens + 1, dtype=np.int32), drawn[1:].T.copy()

    with serve_process(workload.packed, workers=1) as server:
        for lane, direct in (("direct lane", "auto"), ("gRPC", "off")):
            with (
                Client(server.address, attach="off", direct=direct) as plain,
                Client(server.address, attach="off", direct=direct, cache_bytes=64 << 20) as cached,
            ):
                vocabulary = plain.spec.vocab_size
                for tokens in (1, 8, 64, 512, 2048):
                    took: tuple[list[float], list[float]] = ([], [])
                    for _ in range(max(20, chosen.calls // max(1, tokens // 64))):
                        asked = batch(tokens)
                        for client, times in zip((plain, cached), took, strict=True):
                            times.append(timed(lambda client=client, asked=asked: client.lookup(*asked)))
                    without, with_cache = (statistics.median(times[5:]) for times in took)
                    print(
                        f"{lane}, {tokens} tokens: {without:.0f} us without a cache, {with_cache:.0f} with one that"
                        f" has nothing of it: {with_cache / without:.2f} times"
                    )
        masks = Client(server.address, attach="off", on_failure="mask", timeout_s=0.2)
    with masks:
        while not masks.breaker_open:
            masks.lookup(np.array([1], np.int32))
        for tokens in (1, 64, 2048):
            out = {layer: np.zeros((tokens, 24, 264), np.uint8) for layer in (1, 14)}
            steps = []
            for asked in [batch(tokens) for _ in range(chosen.calls)]:
                steps.append(timed(lambda asked=asked, out=out: masks.prefetch(*asked, out=out).wait()))
            print(f"the server away, {tokens} tokens: {statistics.median(steps):.0f} us a masked step")


if __name__ == "__main__":
    main()
