"""What staging for an engine costs beside the client alone: `python bench/engine_staging.py MODEL`; needs torch.

Row ids of both layers of V4.1, new ones in each forward, into memory that lasts. The client alone: `prefetch_rows` and
`rows` of each layer. Staging: `start` and `rows` of each layer, of tensors of the CPU. They take turns. Prints medians
in milliseconds, by the clock and of the calling thread's CPU time, and of differences of two that follow each other.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engrampool_client import Client
from engrampool_client.integrations.staging import Staging
from engrampool_client.testing import serve_process


def timed(call: Callable[[], object]) -> np.ndarray:
    """Milliseconds, and of this thread's CPU time."""
    begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
    call()
    return np.array([time.perf_counter_ns() - begin, time.thread_time_ns() - begin_cpu]) / 1e6


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed model of V4.1's layout")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of tokens")
    chosen = parser.parse_args()
    random = np.random.default_rng(0)
    columns = ("client", "staging", "difference", "client, CPU", "staging, CPU", "difference, CPU")
    print(f"| tokens | forwards | {' | '.join(columns)} |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with serve_process(chosen.model) as server, Client(server.address) as client:
        layers, heads = client.spec.layers, client.spec.tables[0].heads
        rows = min(table.num_rows for table in client.spec.tables)
        for tokens in (1, 64, 8192):
            staging = Staging(client, layers, heads, tokens, torch.device("cpu"))
            widths = {layer: client.spec.table(layer).row_bytes for layer in layers}
            # Of PyTorch's, as staging's are: numpy asks for huge pages, which are another matter.
            out = {
                layer: torch.zeros((tokens, heads, width), dtype=torch.uint8).numpy() for layer, width in widths.items()
            }

            def alone(ids: np.ndarray, out: dict[int, np.ndarray] = out) -> None:
                step = client.prefetch_rows({layer: ids[:, at] for at, layer in enumerate(layers)}, out=out)
                for layer in layers:
                    step.rows(layer)

            def staged(ids: np.ndarray, staging: Staging = staging) -> None:
                given = torch.from_numpy(ids)
                for at, layer in enumerate(layers):
                    staging.start(layer, given[:, at])
                for layer in layers:
                    staging.rows(layer)

            found, until = [], time.monotonic() + chosen.seconds
            while time.monotonic() < until or len(found) < 6:
                order = (alone, staged) if len(found) % 2 else (staged, alone)
                taken = {}
                for call in order:
                    ids = random.integers(0, rows, (tokens, len(layers), heads)).astype(np.int32)
                    taken[call] = timed(lambda call=call, ids=ids: call(ids))
                found.append((*taken[alone], *taken[staged]))
            wall, cpu, wall_staged, cpu_staged = (list(column) for column in zip(*found[2:], strict=True))
            cells = []
            for before, after in ((wall, wall_staged), (cpu, cpu_staged)):
                apart = [b - a for a, b in zip(before, after, strict=True)]
                cells += [f"{statistics.median(one):.3f}" for one in (before, after, apart)]
            print(f"| {tokens} | {len(wall)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
