"""What settings of the transport change: `python bench/transport.py`.

1. Lookups with the C library's own memory settings, and with those of `engrampool_proto.malloc` on both sides.
2. Lookups of 1024 tokens as one message, and as streams of pieces of several sizes.
3. Lookups of few tokens as one message and as a stream: where the client's STREAM_ABOVE_BYTES should lie.
4. Streams whose rows the event loop gathers, and those that a thread beside it gathers.
5. Lookups of 1024 and 4096 tokens over one connection and over several.

Tables of 1 GB in V4.1's layout, both layers, one caller, over gRPC. Every setting runs in fresh processes, several
rounds in turn. Prints Markdown tables: medians over the rounds, of the median time of a call and of the CPU time that
client and server spent on one; and each round's times, since a process may be lucky or not in how its memory lies.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import processes
from engrampool_client import Client
from engrampool_client.lanes import grpc as grpc_lane
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_server.files.synth import synth

Sent = multiprocessing.connection.Connection
Case = tuple[str, dict[str, Any]]

MEMORY: list[Case] = [
    (f"{count} tokens, {name}", {"tokens": count, "pinned": pinned})
    for count in (64, 1024)
    for name, pinned in (("C library's", False), ("pinned", True))
]
PIECES: list[Case] = [
    *((f"pieces of {size}", {"piece": size}) for size in ("512KiB", "1MiB", "2MiB", "4MiB")),
    ("one message", {"stream_above": 1 << 40}),
]
THRESHOLD: list[Case] = [
    (f"{count} tokens, {name}", {"tokens": count, "stream_above": above})
    for count in (32, 64, 128, 256)
    for name, above in (("one message", 1 << 40), ("a stream", 0))
]
THREADS: list[Case] = [
    (f"{count} tokens, {name}", {"tokens": count, "gather_threads": threads})
    for count in (256, 1024, 4096)
    for name, threads in (("event loop", 0), ("a thread", 1))
]
CONNECTIONS: list[Case] = [
    (f"{count} tokens, {connections} connections", {"tokens": count, "connections": connections})
    for count in (1024, 4096)
    for connections in (1, 2, 4)
]


def lookups(
    pipe: Sent,
    model: Path,
    tokens: int = 1024,
    pinned: bool = True,
    piece: str = "1MiB",
    stream_above: int = grpc_lane.STREAM_ABOVE_BYTES,
    gather_threads: int = 0,
    connections: int = 1,
) -> None:
    """One client of a fresh server; sends the median in ms, and CPU ms a call of client and server."""
    grpc_lane.STREAM_ABOVE_BYTES = stream_above
    pin = {"ENGRAMPOOL_PIN_MALLOC": str(pinned).lower()}
    with (
        serve_process(model, environ=pin, stream_chunk_bytes=piece, gather_threads=gather_threads) as server,
        Client(server.address, keep_memory=pinned, connections=connections, direct="off") as pool,
    ):
        ids = np.random.default_rng(0).integers(0, pool.spec.vocab_size, tokens).astype(np.int32)
        rows = pool.spec.hash(TokenBatch.of(ids))
        for _ in range(20):
            pool.lookup_rows(rows)
        seconds, client_s, server_s = [], time.process_time(), processes.cpu_s(server.process.pid)
        while len(seconds) < 60 or sum(seconds) < 1:
            begin = time.perf_counter()
            pool.lookup_rows(rows)
            seconds.append(time.perf_counter() - begin)
        spent = (time.process_time() - client_s, processes.cpu_s(server.process.pid) - server_s)
    pipe.send([1e3 * statistics.median(seconds), *(1e3 * s / len(seconds) for s in spent)])


def compare(title: str, model: Path, cases: list[Case], rounds: int) -> None:
    """Run the cases in turn, each in a process of its own, and print their table."""
    context = multiprocessing.get_context("spawn")
    seen: dict[str, list[list[float]]] = {name: [] for name, _ in cases}
    for _ in range(rounds):
        for name, changed in cases:
            ours, theirs = context.Pipe()
            process = context.Process(target=lookups, args=(theirs, model), kwargs=changed)
            process.start()
            seen[name].append(ours.recv())
            process.join()
    print(f"\n| {title} | p50 ms | client CPU ms | server CPU ms | p50 ms of each round |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, runs in seen.items():
        medians = " | ".join(f"{statistics.median(column):.2f}" for column in zip(*runs, strict=True))
        print(f"| {name} | {medians} | {', '.join(f'{run[0]:.2f}' for run in runs)} |", flush=True)


def main() -> None:
    """Run the comparisons."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    rounds = options.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        synth("deepseek-v4.1", 80_000, model, quiet=True)
        compare("memory", model, MEMORY, rounds)
        compare("answer", model, PIECES, rounds)
        compare("message or stream", model, THRESHOLD, rounds)
        compare("gathered by", model, THREADS, rounds)
        compare("connections", model, CONNECTIONS, rounds)


if __name__ == "__main__":
    main()
