"""What one slow or dead replica of two costs lookups: `python bench/hedging.py`.

Two servers with all rows, of one worker each, on this machine. A client has them both; others have the second one
behind a relay that answers late (delay.py), or find it stopped (SIGSTOP) for all of their part of each round. Lookups
of both layers by row ids (uniform), one call at a time, the troubles in turn, so the first lookups that meet a trouble
count as well. Prints a Markdown table: medians of the rounds, and of the ratios to the same round without trouble.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.v1 import pool_pb2
from processes import child
from workload import ROW_BYTES, Workload


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=8_000, help="of each head: 48 times as many rows")
    parser.add_argument("--delays", default="5,50", help="of a slow replica, in milliseconds")
    parser.add_argument("--tokens", default="16,1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each trouble in each round")
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    with ExitStack() as stack:
        well, other = (stack.enter_context(serve_process(workload.packed, workers=1)) for _ in range(2))
        seconds = {"none": other.address, "stopped": other.address}
        lanes = {}
        for delay in chosen.delays.split(","):
            relay = stack.enter_context(child("delay.py", delay, other.address, _direct_address(other)))
            port, lane_port = relay.hear(20)["ports"]
            address = seconds[f"{delay} ms late"] = f"127.0.0.1:{port}"
            lanes[address] = lane_port
        _lead(lanes)
        print("| tokens | lane | the second replica | p50 ms | p99 ms | p50 / well | p99 / well | asked twice | won |")
        print("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for tokens in map(int, chosen.tokens.split(",")):
            for lane, name in (("off", "gRPC"), ("auto", "direct")):
                with ExitStack() as clients:
                    asked = {
                        trouble: clients.enter_context(
                            Client([well.address, address], direct=lane, attach="off", timeout_s=60, keep_memory=True)
                        )
                        for trouble, address in seconds.items()
                    }
                    _measure(asked, other, workload, tokens, name, chosen.rounds, chosen.seconds)


def _measure(
    clients: Mapping[str, Client],
    other: ServerProcess,
    workload: Workload,
    tokens: int,
    lane: str,
    rounds: int,
    seconds: float,
) -> None:
    out = {n: np.zeros((tokens, len(heads), ROW_BYTES), np.uint8) for n, heads in workload.heads.items()}
    batches = workload.batches("uniform", tokens)
    for client in clients.values():  # so that what is usual is known
        for _ in range(200):
            client.lookup_rows(next(batches).ids, out=out)
    found: dict[str, list[tuple[float, float]]] = {trouble: [] for trouble in clients}
    lookups = dict.fromkeys(clients, 0)
    before = {trouble: (client.stats.hedges, client.stats.hedges_won) for trouble, client in clients.items()}
    for _ in range(rounds):
        for trouble, client in clients.items():
            times = []
            with other.frozen() if trouble == "stopped" else nullcontext():
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    batch = next(batches)
                    begin = time.perf_counter()
                    client.lookup_rows(batch.ids, out=out)
                    times.append((time.perf_counter() - begin) * 1e3)
            lookups[trouble] += len(times)
            found[trouble].append((float(np.percentile(times, 50)), float(np.percentile(times, 99))))
    for trouble, client in clients.items():
        hedges, won = before[trouble]
        middle, tail = (statistics.median(times) for times in zip(*found[trouble], strict=True))
        ratios = [
            statistics.median(one[at] / well[at] for one, well in zip(found[trouble], found["none"], strict=True))
            for at in (0, 1)
        ]
        print(
            f"| {tokens} | {lane} | {trouble} | {middle:.3f} | {tail:.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
            f"{100 * (client.stats.hedges - hedges) / lookups[trouble]:.1f} % | "
            f"{client.stats.hedges_won - won} of {client.stats.hedges - hedges} |",
            flush=True,
        )


def _direct_address(server: ServerProcess) -> str:
    """Where its direct lane listens."""
    lane = GrpcLane(server.address)
    try:
        return f"127.0.0.1:{lane.open_direct(10).port}"
    finally:
        lane.close()


def _lead(ports: Mapping[str, int]) -> None:
    """Have clients enter the direct lane of these addresses by another port than the server says."""
    open_direct = GrpcLane.open_direct

    def led(lane: GrpcLane, timeout_s: float) -> pool_pb2.OpenDirectResponse:
        way_in = open_direct(lane, timeout_s)
        way_in.port = ports.get(lane.target, way_in.port)
        return way_in

    GrpcLane.open_direct = led  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
