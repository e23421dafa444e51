"""Lookups in attached memory beside the same gather without a client, and beside gRPC: `python bench/attach.py`.

A server holds its tables in /dev/shm; this process attaches them. In turn, on row ids of both layers (uniform): np.take
from the very memory that is attached, into arrays that are there; the kernel that gathers rows, likewise, in one
thread; `Client.lookup_rows` attached, by one thread and by as many as it takes by itself; and over gRPC. Prints a
Markdown table of medians, and the medians of each round's ratios.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.kernels.gather import gather
from workload import ROW_BYTES, Batch, Workload

SIZES = (1, 64, 1024, 8192)
RATIOS = (("one thread", "kernel"), ("attached", "kernel"), ("one thread", "attached"), ("grpc", "attached"))


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each system in each round")
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    directory = Path(tempfile.mkdtemp(prefix="engrampool-bench-", dir="/dev/shm"))
    settings: dict[str, Any] = {"timeout_s": 60, "keep_memory": True}
    try:
        with (
            serve_process(workload.packed, memory=f"file:{directory}") as server,
            Client(server.address, **settings) as attached,
            Client(server.address, **settings) as alone,
            Client(server.address, **settings, attach="off", direct="off", dedupe=False) as over_grpc,
        ):
            assert attached.attached, "not attached"
            lane = attached._shards._sets[0].replicas[0]._attach
            alone._shards._sets[0].replicas[0]._attach.ways = 1
            tables = {layer: table.rows for layer, table in lane._lease.tables.items()}
            for table in tables.values():  # every page is in this process's page table from here on
                np.add.reduce(table[:: 4096 // ROW_BYTES, 0])
            titles = [
                "tokens",
                "np.take ms",
                "kernel ms",
                "one thread ms",
                f"attached, {lane.ways} threads, ms",
                "gRPC ms",
            ]
            print(f"| {' | '.join(titles + [f'{above} / {below}' for above, below in RATIOS])} |")
            print("| ---: " * (len(titles) + len(RATIOS)) + "|")
            for tokens in SIZES:
                out = {n: np.zeros((tokens, len(heads), ROW_BYTES), np.uint8) for n, heads in workload.heads.items()}

                def take(batch: Batch, out: dict[int, np.ndarray] = out) -> None:
                    for layer, ids in batch.ids.items():
                        np.take(tables[layer], ids, axis=0, out=out[layer], mode="clip")

                def kernel(batch: Batch, out: dict[int, np.ndarray] = out) -> None:
                    for layer, ids in batch.ids.items():
                        gather(tables[layer], ids.reshape(-1), 0, out[layer].reshape(-1))

                systems: dict[str, Callable[[Batch], object]] = {
                    "take": take,
                    "kernel": kernel,
                    "one thread": lambda batch, out=out: alone.lookup_rows(batch.ids, out=out),
                    "attached": lambda batch, out=out: attached.lookup_rows(batch.ids, out=out),
                    "grpc": lambda batch, out=out: over_grpc.lookup_rows(batch.ids, out=out),
                }
                batches = workload.batches("uniform", tokens)
                rounds: dict[str, list[float]] = {name: [] for name in systems}
                for _ in range(chosen.rounds):
                    for name, call in systems.items():
                        times = []
                        end = time.perf_counter() + chosen.seconds
                        while time.perf_counter() < end:
                            batch = next(batches)
                            begin = time.perf_counter()
                            call(batch)
                            times.append(time.perf_counter() - begin)
                        rounds[name].append(statistics.median(times) * 1e3)
                cells = [f"{statistics.median(times):.3f}" for times in rounds.values()]
                for above, below in RATIOS:
                    ratios = [a / b for a, b in zip(rounds[above], rounds[below], strict=True)]
                    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
                print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
