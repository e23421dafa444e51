"""Another commit beside this one: the same lookups, in turn, in one run.

    git worktree add --detach ../before COMMIT
    python bench/compare.py ../before PACKED_MODEL

Each round starts a server and a client of one tree and then of the other, by the public API that both have. Printed are
medians over rounds of each tree's median time, and of the ratios; lookups back to back, and steps with the pauses that
decoding has between two of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LANES = {"direct": {"attach": "off"}, "grpc": {"attach": "off", "direct": "off"}, "attached": {}}
TOKENS = (1, 8, 64, 1024)
PAUSE_S = 0.008


def measure(model: Path, tables: Path, seconds: float) -> dict[str, float]:
    """Median times in microseconds, by what was measured."""
    from engrampool_client import Client
    from engrampool_client.testing import serve_process

    found = {}
    with serve_process(model, workers=1, memory=f"file:{tables}") as server:
        for lane, how in LANES.items():
            with Client(server.address, keep_memory=True, **how) as client:
                random = np.random.default_rng(1)
                for count in TOKENS:
                    batches = [random.integers(0, client.spec.vocab_size, count).astype(np.int32) for _ in range(16)]
                    for one in batches:
                        client.lookup(one)
                    found[f"{lane}, {count}, back to back"] = _median_us(batches, client.lookup, seconds, 0.0)
                    step = lambda batch, client=client: client.prefetch(batch).rows(14)  # noqa: E731
                    found[f"{lane}, {count}, a step"] = _median_us(batches, step, seconds, PAUSE_S)
        with Client(server.address, keep_memory=True, attach="off", cache_bytes=64 << 20) as client:
            batches = [np.arange(64, dtype=np.int32)]
            for _ in range(5):
                client.lookup(batches[0])
            step = lambda batch: client.prefetch(batch).rows(14)  # noqa: E731
            found["all cached, 64, a step"] = _median_us(batches, step, seconds, 0.002)
    return found


def _median_us(batches: list[np.ndarray], call, seconds: float, pause_s: float) -> float:
    took, end, at = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < end or len(took) < 20:
        if pause_s:
            time.sleep(pause_s)
        begin = time.perf_counter()
        call(batches[at % len(batches)])
        took.append(time.perf_counter() - begin)
        at += 1
    return statistics.median(took) * 1e6


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the root of the other tree")
    parser.add_argument("model", type=Path, help="a packed model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    parser.add_argument("--tables", type=Path, default=Path("/dev/shm"), help="where servers keep tables")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.model, options.tables, options.seconds)))
        return
    trees = {"before": options.before.resolve(), "now": Path(__file__).resolve().parents[1]}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(options.rounds):
        # Whoever comes second may have the better or the worse of it.
        for name in sorted(trees, reverse=number % 2 == 1):
            results[name].append(_of(trees[name], options))
    print(f"{'what':36} {'before us':>10} {'now us':>10} {'now / before (least - most)':>28}")
    for what in results["now"][0]:
        before, now = ([one[what] for one in results[name]] for name in ("before", "now"))
        ratios = sorted(b / a for a, b in zip(before, now, strict=True))
        print(
            f"{what:36} {statistics.median(before):10.0f} {statistics.median(now):10.0f} "
            f"{statistics.median(ratios):12.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
        )


def _of(tree: Path, options: argparse.Namespace) -> dict[str, float]:
    path = os.pathsep.join(str(tree / root) for root in ("proto", "server", "client"))
    command = [sys.executable, __file__, str(options.before), str(options.model.resolve()), "--measure"]
    command += ["--seconds", str(options.seconds), "--tables", str(options.tables)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
