"""What a server's own part of a call costs beside the rows: `python bench/server_calls.py`.

Describe with the specification of V4.1, as a client has it over gRPC and as the handler alone has it, and the
book-keeping of one lookup of both layers over gRPC, in the way a server of several processes does it. Prints medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from engrampool_client.testing import serve_process
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer.in_flight import InFlight
from engrampool_server.answer.lookups import Limits, Lookups
from engrampool_server.answer.pool_service import PoolService
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.tables import LoadedModel
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.metrics_files import MetricsMemory
from workload import Workload

REQUEST = pool_pb2.DescribeRequest(include_spec=True)
ROWS = [(1, 24, 24 * 264), (14, 24, 24 * 264)]


def microseconds(call: Callable[[], object], calls: int, of_each: int = 1) -> float:
    """The median of `calls` calls, each of which does `of_each` things."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3 / of_each)
    return statistics.median(times)


def handler(packed: Path, metrics: Metrics) -> Callable[[], object]:
    """One call of Describe's handler, without gRPC around it."""
    lookups = Lookups(Limits(1 << 22, 1 << 30, 1 << 20), InFlight(1 << 30), metrics, 0)
    with PackedModel.open(packed) as files:
        lookups.add(LoadedModel(files.spec, files.version, {}))
    lookups.ready = True
    describe = PoolService(lookups, None, True).handlers()["Describe"].unary_unary

    def call() -> None:
        try:
            describe(REQUEST, None).send(None)
        except StopIteration:
            return

    return call


def book_keeping(metrics: Metrics) -> Callable[[], object]:
    """All that is counted of 100 lookups."""
    call = ("unary", "engrampool.v1.Pool", "Lookup")
    started, received, sent = (of.labels(*call) for of in (metrics.started, metrics.received, metrics.sent))
    handling = metrics.handling.labels(*call)

    def count() -> None:
        for _ in range(100):
            started.inc()
            received.inc()
            metrics.in_flight.set(25_344)
            handling.observe(2e-4)
            sent.inc()
            metrics.handled.labels(*call, "OK").inc()
            metrics.in_flight.set(0)
            metrics.answered("deepseek-v4.1", "Lookup", ROWS, 1e-5, 1e-4, 2e-4)

    return count


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--calls", type=int, default=300)
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    memory = MetricsMemory()
    try:
        memory.use("0")
        metrics = Metrics()
        print(f"counting a lookup: {microseconds(book_keeping(metrics), chosen.calls, 100):.1f} us")
        print(f"Describe's handler: {microseconds(handler(workload.packed, metrics), chosen.calls):.1f} us")
    finally:
        memory.close()
    with serve_process(workload.packed, workers=1) as server, grpc.insecure_channel(server.address) as channel:
        describe = channel.unary_unary("/engrampool.v1.Pool/Describe")
        message = REQUEST.SerializeToString()
        nbytes = len(describe(message))
        worker = server.worker_pids()[0]

        def cpu_s() -> float:
            """CPU time of the worker so far."""
            fields = Path(f"/proc/{worker}/schedstat").read_text().split()
            return int(fields[0]) / 1e9

        before = cpu_s()
        took = microseconds(lambda: describe(message), chosen.calls)
        of_worker = (cpu_s() - before) / chosen.calls * 1e6
        print(
            f"Describe over gRPC, {nbytes} bytes: {took:.0f} us, of them {of_worker:.0f} us of the worker's main thread"
        )


if __name__ == "__main__":
    main()
