"""What a server's processes take beside its tables: `python bench/footprint.py`.

The sum of all its processes' PSS less the tables, with small tables, one worker and four: once it serves, and after
eight clients at a time have looked 8192 tokens up again and again, over the direct lane and then over gRPC.
"""

import argparse
import threading
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import ServerProcess, serve_process
from workload import Workload

TOKENS, CLIENTS = 8192, 8


def pss_bytes(pid: int) -> int:
    """Of a process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return own + sum(pss_bytes(int(child)) for child in children)


def load(server: ServerProcess, direct: str, lookups: int) -> None:
    """Large lookups, by several clients at a time."""

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        with Client(server.address, attach="off", direct=direct) as client:
            for _ in range(lookups):
                client.lookup(random.integers(0, client.spec.vocab_size, TOKENS).astype(np.int32))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=20_000, help="of each head: 48 times as many rows")
    parser.add_argument("--lookups", type=int, default=20, help="by each client and lane")
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    tables = sum(workload.num_rows(layer) for layer in workload.layers) * 264
    for workers in (1, 4):
        with serve_process(workload.packed, workers=workers) as server:

            def beside(when: str, server: ServerProcess = server, workers: int = workers) -> None:
                mib = (pss_bytes(server.process.pid) - tables) / (1 << 20)
                print(f"{workers} workers, {when}: {mib:.0f} MiB beside {tables / (1 << 20):.0f} MiB of tables")

            beside("serving")
            for lane, direct in (("the direct lane", "auto"), ("gRPC", "off")):
                load(server, direct, chosen.lookups)
                beside(f"after lookups over {lane}")


if __name__ == "__main__":
    main()
