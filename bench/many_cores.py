"""Workers and clients side by side, where there are cores for them: `python bench/many_cores.py`.

Each client is a process that makes one lookup after the other, of row ids of its own (uniform), by gRPC, the direct
lane, or from attached memory. Beside them, with as many clients: `raw-socket`, ready-made bytes, a server process for
each client; and `raw`, the loops of bench/raw_lane.py, which gather what they send. Then the gather kernel alone, in
threads. Every client compares rows first. GB/s are the rows of all clients in the time that they took together.

It wants memory for three times the tables and as much disk under --data, or memory again if that lies in /dev/shm, and
takes as long as there are cases; `--workers 1,2 --clients 1,2 --vocab-size 8000 --seconds 0.5` is a trial anywhere.
Prints Markdown that begins with the machine; `--json FILE` writes the records as well.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import peers
import processes
import report
from workload import KINDS, POOL_TOKENS, ROW_BYTES, Batch, Rows, Workload

TOKENS = (64, 1024)
RAW = ("raw-socket", "raw")
SYSTEMS = ("engrampool-direct", "engrampool-grpc", "engrampool-attach")
DIFFERENT_TOKENS = 65_536  # of each client: 0.8 GB of rows, more than caches hold
START_S, CASE_S = 300.0, 180.0
GATHERED, REPEATS = 200_000, 10  # rows of each thread


def ask(case: dict[str, Any]) -> None:
    """One client, as a child: connect, compare, warm up, say so, and ask from when it is told to."""
    processes.die_with_parent()
    workload, tokens = Workload(Path(case["workload"])), case["tokens"]
    connect = _raw_lane if case["system"] == "raw" else peers.load(case["system"]).connect
    batches = [*_batches(workload, case)]
    with connect(case["address"], workload, tokens) as fetch:
        for batch in batches[:3]:
            _check(fetch(batch), workload, batch)
        print('"ready"', flush=True)
        sys.stdin.readline()
        times: list[float] = []
        cpu_s, begin = time.process_time(), time.perf_counter()
        end = now = begin + case["seconds"]
        while len(times) < 3 or now < end:
            before = time.perf_counter()
            fetch(batches[len(times) % len(batches)])
            now = time.perf_counter()
            times.append(now - before)
        found = {"times": times, "wall_s": now - begin, "client_cpu_s": time.process_time() - cpu_s}
        print(json.dumps(found), flush=True)
        sys.stdin.readline()


def _batches(workload: Workload, case: dict[str, Any]) -> Iterator[Batch]:
    tokens = case["tokens"]
    if case["system"] == "raw-socket":  # has the answers to these, and to no others
        every = workload.batches(KINDS[0], tokens)
        yield from (next(every) for _ in workload.starts(tokens))
        return
    random = np.random.default_rng(case["seed"])
    for _ in range(max(4, min(64, DIFFERENT_TOKENS // tokens))):
        ids = {}
        for layer, heads in workload.heads.items():
            sizes = np.array(heads)
            ids[layer] = (np.cumsum(sizes) - sizes + random.integers(0, sizes, (tokens, len(sizes)))).astype(np.uint32)
        yield Batch(KINDS[0], 0, tokens, ids)


def _check(rows: Rows, workload: Workload, batch: Batch) -> None:
    for layer, ids in batch.ids.items():
        path = workload.table_directory(layer) / "shard_000.bin"
        table = np.memmap(path, np.uint8, "r", shape=(workload.num_rows(layer), ROW_BYTES))
        if not np.array_equal(np.asarray(rows[layer]).reshape(-1), table[ids].reshape(-1)):
            raise ValueError(f"wrong bytes in layer {layer} of {batch.tokens} tokens")


@contextmanager
def _raw_lane(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    from raw_lane import Connection

    connection = Connection(int(address), spinning=False)
    out = {layer: np.zeros((tokens, len(heads), ROW_BYTES), np.uint8) for layer, heads in workload.heads.items()}

    def fetch(batch: Batch) -> Rows:
        for table, (layer, rows) in enumerate(out.items()):
            connection.ask(table, batch.ids[layer])
            connection.receive(rows, 0)
        return out

    try:
        yield fetch
    finally:
        connection.close()


def serve(
    stack: ExitStack, system: str, workers: int, clients: int, workload: Workload
) -> tuple[list[str], list[processes.Child]]:
    """The address for each client, and the servers."""
    if system == "raw":
        server = stack.enter_context(processes.child("raw_lane.py", workload.directory))
        return [str(server.hear(START_S)["port"])] * clients, [server]
    settings = {} if system in RAW else {"workers": workers}
    count = clients if system in RAW else 1
    arguments = (system, workload.directory, json.dumps(settings))
    servers = [stack.enter_context(processes.child("serve.py", *arguments)) for _ in range(count)]
    addresses = [server.hear(START_S)["address"] for server in servers]
    return addresses * (clients // count), servers


def measure(
    system: str,
    workers: int | None,
    tokens: int,
    addresses: list[str],
    servers: list[processes.Child],
    workload: Workload,
    seconds: float,
) -> dict[str, Any]:
    """All clients at once."""
    with ExitStack() as stack:
        clients = []
        for seed, address in enumerate(addresses):
            case = {"system": system, "tokens": tokens, "seed": seed, "address": address, "seconds": seconds}
            case["workload"] = str(workload.directory)
            clients.append(stack.enter_context(processes.child("many_cores.py", "--ask", json.dumps(case))))
        for client in clients:
            client.hear(CASE_S)
        before = sum(processes.cpu_s(server.pid) for server in servers)
        for client in clients:
            client.say("go")
        found = [client.hear(CASE_S) for client in clients]
        server_cpu_s = sum(processes.cpu_s(server.pid) for server in servers) - before
    times = [seconds for one in found for seconds in one["times"]]
    gigabytes = len(times) * tokens * workload.token_bytes / 1e9
    return {
        "study": "many-cores",
        "system": system,
        "workers": workers,
        "clients": len(addresses),
        "tokens": tokens,
        "gb_per_s": gigabytes / max(one["wall_s"] for one in found),
        "p50_ms": 1e3 * statistics.median(times),
        "p99_ms": 1e3 * float(np.percentile(times, 99)),
        "server_cpu_s_per_gb": server_cpu_s / gigabytes,
        "client_cpu_s_per_gb": sum(one["client_cpu_s"] for one in found) / gigabytes,
        "calls": len(times),
    }


def gathers(workload: Workload) -> Iterator[dict[str, Any]]:
    """The kernel alone, in one thread and more."""
    from engrampool_proto.kernels.gather import gather  # not for clients, of which most need no compiler

    table = workload.load(workload.layers[0])
    random, cores = np.random.default_rng(1), len(os.sched_getaffinity(0))
    threads = 1
    while threads <= cores:
        ids = [random.integers(0, len(table), GATHERED).astype(np.uint32) for _ in range(threads)]
        outs = [np.zeros(GATHERED * ROW_BYTES, np.uint8) for _ in range(threads)]

        def work(ids: np.ndarray, out: np.ndarray) -> None:
            for _ in range(REPEATS):
                gather(table, ids, 0, out)

        for _ in range(2):  # the first warms up
            several = [threading.Thread(target=work, args=both) for both in zip(ids, outs, strict=True)]
            begin = time.perf_counter()
            for one in several:
                one.start()
            for one in several:
                one.join()
            seconds = time.perf_counter() - begin
        assert np.array_equal(outs[-1].reshape(-1, ROW_BYTES), table[ids[-1]])
        gb_s = threads * GATHERED * ROW_BYTES * REPEATS / seconds / 1e9
        yield {"study": "many-cores", "system": "gather", "threads": threads, "gb_per_s": gb_s}
        threads *= 2


def main() -> None:
    """Measure, and print."""
    options = parse()
    if options.ask is not None:
        ask(json.loads(options.ask))
        return
    print(f"{report.machine()}\n", flush=True)
    workload = Workload.make(options.data, options.vocab_size, options.pool_tokens)
    records: list[dict[str, Any]] = []
    print("| system | workers | clients | tokens | GB/s | / raw socket | p50 ms | p99 ms | server CPU s/GB | client |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    raw_gb_s: dict[tuple[int, int], float] = {}
    for system in options.systems:
        for workers in (None,) if system in RAW else options.workers:
            for clients in options.clients:
                with ExitStack() as stack:
                    addresses, servers = serve(stack, system, workers or 0, clients, workload)
                    for tokens in options.tokens:
                        record = measure(system, workers, tokens, addresses, servers, workload, options.seconds)
                        if system == "raw-socket":
                            raw_gb_s[clients, tokens] = record["gb_per_s"]
                        raw = raw_gb_s.get((clients, tokens))
                        cells = [system, str(workers or "-"), str(clients), str(tokens), f"{record['gb_per_s']:.2f}"]
                        cells += [f"{record['gb_per_s'] / raw:.2f}" if raw else "-"]
                        keys = ("p50_ms", "p99_ms", "server_cpu_s_per_gb", "client_cpu_s_per_gb")
                        cells += [f"{record[key]:.3f}" for key in keys]
                        print(f"| {' | '.join(cells)} |", flush=True)
                        records.append(record)
    print("\n| gather, threads | GB/s |\n| ---: | ---: |")
    for record in gathers(workload):
        print(f"| {record['threads']} | {record['gb_per_s']:.2f} |", flush=True)
        records.append(record)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The options."""

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--data", type=Path, default=Path("bench-data"), help="where tables are kept between runs")
    parser.add_argument("--vocab-size", type=int, default=320_000, help="of each head: 48 times as many rows")
    parser.add_argument("--workers", type=listed(int), default=[1, 4, 8], help="of the server, comma-separated")
    parser.add_argument("--clients", type=listed(int), default=[1, 4, 8], help="at once, comma-separated")
    parser.add_argument("--tokens", type=listed(int), default=list(TOKENS), help="of a lookup, comma-separated")
    parser.add_argument("--systems", type=listed(str), default=[*RAW, *SYSTEMS], help="comma-separated names")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data.resolve()  # children run in another directory
    unknown = [name for name in options.systems if name not in (*RAW, *SYSTEMS)]
    if unknown:
        parser.error(f"no such systems: {', '.join(unknown)}; there are {', '.join((*RAW, *SYSTEMS))}")
    return options


if __name__ == "__main__":
    main()
