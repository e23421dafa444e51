"""Lookups as a decode step makes them, one after a pause, beside raw sockets and local memory: python bench/decode.py.

A step takes 8 to 20 ms, so its lookup comes to processes that are asleep and to caches that hold something else. Every
lookup here is made after such a pause. Meanwhile the process does nothing else, or another Python thread of it keeps
the GIL busy. Three times are taken of each lookup, from before `prefetch`: when it returned, when the rows of the first
Engram layer were there, when all were. Up to 512 tokens are a decode step, one token a sequence; more are a prefill,
all of one sequence. Tokens are random, the rows are new to everybody, and nothing is cached but where said.

- grpc, direct, attached: engrampool, a client of each way to one server. `Client.prefetch`, then `Step.rows`.
- cached, half: by name only. The direct lane, of a client with a cache that has all of a batch, or the half of it.
- raw, raw-spin: bench/raw_lane.py, loops without the GIL over sockets, with nothing else on the way; hashed and sent
  where `prefetch` is. Both sides sleep until bytes come, or look for them for a while.
- take: hashed, then `np.take` from tables in this process. It stands for pinned memory of this machine.

All of them run all the while, and are measured in turn, slice by slice, so that what else the machine does falls on
all. Bytes are compared before. Medians and p99 are over all lookups; ratios are of a round's medians, to raw's time for
all rows (of `prefetch`: to its own), and their median is shown. Processor time is that of the server's processes, the
pauses included, for a GB of rows. Prints Markdown; `--json FILE` writes the records as well.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import processes
import report
from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec
from engrampool_server.files.table_files import PackedModel
from raw_lane import SMALL_TOKENS, RawLane
from workload import POOL_TOKENS, Workload

WAYS: dict[str, dict[str, Any]] = {
    "grpc": {"attach": "off", "direct": "off"},
    "direct": {"attach": "off"},
    "attached": {},
}
# Over the direct lane, with a cache: of batches that it has, or whose second half of the requests is new each time.
CACHED = ("cached", "half")
CACHE_BYTES = 512 << 20
SYSTEMS = (*WAYS, "raw", "raw-spin", "take")
TOKENS = (1, 8, 64, 256, 1024, 8192)
THREADS = ("idle", "busy")
DIFFERENT_TOKENS = 16_384  # batches are repeated after so many: 0.2 GB of rows
LEAST = 2  # lookups a slice
START_S = 180.0

Rows = Mapping[int, np.ndarray]
Start = Callable[[TokenBatch, Rows], Callable[[int], object]]  # -> waits for a layer


@dataclass
class System:
    """start: begins a lookup into `out`, and gives what waits for a layer. server: the process, if there is one."""

    start: Start
    server: int | None = None


@dataclass
class Case:
    """What was found of one system: each slice's lookups, as seconds until prefetch returned, one layer, all rows."""

    slices: list[list[tuple[float, float, float]]] = field(default_factory=list)
    server_cpu_s: float = 0.0

    def medians(self, part: int) -> list[float]:
        """Of each slice."""
        return [statistics.median(times[part] for times in one) for one in self.slices]

    def all(self, part: int) -> list[float]:
        """Of every lookup."""
        return [times[part] for one in self.slices for times in one]


@contextmanager
def busy_thread() -> Iterator[None]:
    """A Python thread that wants the GIL all the time."""
    end = threading.Event()

    def count() -> None:
        while not end.is_set():
            for _ in range(1000):
                pass

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def opened(
    stack: ExitStack, workload: Workload, spec: ModelSpec, tables: Rows, options: argparse.Namespace
) -> dict[str, System]:
    """The systems that are asked for, served until the stack is closed."""
    systems = {}
    if {*WAYS, *CACHED} & set(options.systems):
        memory = tempfile.mkdtemp(prefix="engrampool-bench-", dir="/dev/shm")
        stack.callback(shutil.rmtree, memory)
        server = stack.enter_context(serve_process(workload.packed, workers=options.workers, memory=f"file:{memory}"))
    if {"raw", "raw-spin"} & set(options.systems):
        raw = stack.enter_context(processes.child("raw_lane.py", workload.directory))
        port = raw.hear(START_S)["port"]
    for name in options.systems:
        if name in WAYS:
            client = stack.enter_context(Client(server.address, timeout_s=60, **WAYS[name]))
            assert (client.direct, client.attached) == (name != "grpc", name == "attached"), f"not {name}"
            systems[name] = System(_product(client), server.process.pid)
        elif name in CACHED:
            client = stack.enter_context(Client(server.address, timeout_s=60, attach="off", cache_bytes=CACHE_BYTES))
            systems[name] = System(_product(client), server.process.pid)
        elif name == "take":
            systems[name] = System(_take(spec, tables))
        else:
            lane = RawLane(port, spec, spinning=name == "raw-spin")
            stack.callback(lane.close)
            systems[name] = System(_raw(lane), raw.pid)
    return systems


def _product(client: Client) -> Start:
    return lambda batch, out: client.prefetch(batch.tokens, batch.query_start_loc, batch.lookback, out=out).rows


def _raw(lane: RawLane) -> Start:
    def start(batch: TokenBatch, out: Rows) -> Callable[[int], object]:
        lane.start(batch, out)
        return lane.rows

    return start


def _take(spec: ModelSpec, tables: Rows) -> Start:
    hasher = Hasher(spec)

    def start(batch: TokenBatch, out: Rows) -> Callable[[int], object]:
        ids = hasher.rows(batch)
        return lambda layer: np.take(tables[layer], ids[layer], axis=0, out=out[layer], mode="clip")

    return start


def drawn(spec: ModelSpec, tokens: int) -> list[TokenBatch]:
    """Batches of so many tokens each."""
    random = np.random.default_rng(tokens)
    requests = tokens if tokens <= SMALL_TOKENS else 1
    bounds = np.linspace(0, tokens, requests + 1).astype(np.int32)

    def batch() -> TokenBatch:
        lookback = random.integers(0, spec.vocab_size, (requests, spec.lookback)).astype(np.int32)
        return TokenBatch(random.integers(0, spec.vocab_size, tokens).astype(np.int32), bounds, lookback)

    return [batch() for _ in range(min(64, max(2, DIFFERENT_TOKENS // tokens)))]


def check(systems: Mapping[str, System], spec: ModelSpec, tables: Rows, batches: list[TokenBatch], out: Rows) -> None:
    """Compare some rows of every system with the tables, byte for byte. Ends the program if they differ."""
    for batch in batches[:3]:
        expected = {layer: tables[layer][ids] for layer, ids in spec.hash(batch).items()}
        for name, system in systems.items():
            for rows in out.values():
                rows.fill(0xA5)
            wait = system.start(batch, out)
            for layer, rows in expected.items():
                wait(layer)
                if not np.array_equal(out[layer], rows):
                    sys.exit(f"{name}: wrong bytes in layer {layer} of {batch.num_tokens} tokens")


def measure(
    case: Case, system: System, batches: Iterator[TokenBatch], out: Rows, pause_s: float, seconds: float
) -> None:
    """One slice: lookups for so long. The first does not count, as it is the one that changes to this system."""
    layers, now = list(out), time.perf_counter
    found: list[tuple[float, float, float]] = []
    end, cpu_s = now() + seconds, 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            cpu_s = processes.cpu_s(system.server) if system.server else 0.0
        if pause_s:
            time.sleep(pause_s)
        begin = now()
        wait = system.start(batch, out)
        started = now()
        wait(layers[0])
        first = now()
        for layer in layers[1:]:
            wait(layer)
        done = now()
        if number:
            found.append((started - begin, first - begin, done - begin))
        if len(found) >= LEAST and done > end:
            break
    case.slices.append(found)
    if system.server:
        case.server_cpu_s += processes.cpu_s(system.server) - cpu_s


def round_about(batches: list[TokenBatch]) -> Iterator[TokenBatch]:
    """Batch after batch, without end."""
    while True:
        yield from batches


def half_new(spec: ModelSpec, batches: list[TokenBatch]) -> Iterator[TokenBatch]:
    """The same, the second half of whose tokens is new each time."""
    random = np.random.default_rng(1)
    for batch in round_about(batches):
        tokens = batch.tokens.copy()
        new = tokens[len(tokens) // 2 :]
        new[...] = random.integers(0, spec.vocab_size, len(new))
        yield TokenBatch(tokens, batch.query_start_loc, batch.lookback)


def records(
    cases: Mapping[str, Case], systems: Mapping[str, System], workload: Workload, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """As the JSON has it. Milliseconds of all lookups; ratios by round."""
    token_rows = workload.token_bytes // 264
    for name, case in cases.items():
        calls = len(case.all(0))
        nbytes = about["tokens"] * workload.token_bytes
        record = {
            "study": "decode",
            "system": name,
            **about,
            "layers": len(workload.layers),
            "rows": about["tokens"] * token_rows,
            "ids": "uniform",
            "table_rows": workload.table_rows,
            "repeats": len(case.slices),
            "calls": calls,
            "gb_per_s": nbytes / statistics.median(case.all(2)) / 1e9,
            "server_cpu_s_per_gb": case.server_cpu_s / (calls * nbytes / 1e9) if systems[name].server else None,
        }
        for part, key in enumerate(("prefetch_", "first_layer_", "")):
            record[f"{key}p50_ms"] = 1e3 * statistics.median(case.all(part))
            record[f"{key}p99_ms"] = 1e3 * float(np.percentile(case.all(part), 99))
            record[f"{key}p50_ms_rounds"] = [1e3 * seconds for seconds in case.medians(part)]
            base = cases["raw"].medians(2 if part else 0) if "raw" in cases else None
            ratios = base and [a / b for a, b in zip(case.medians(part), base, strict=True)]
            record[f"{key}to_raw"] = ratios and statistics.median(ratios)
        yield record


def main() -> None:
    """Measure, and print."""
    options = parse()
    found: list[dict[str, Any]] = []
    workload = Workload.make(options.data, options.vocab_size, options.pool_tokens)
    tables = {layer: workload.load(layer) for layer in workload.layers}
    with PackedModel.open(workload.packed) as packed:
        spec = packed.spec
    with ExitStack() as stack:
        systems = opened(stack, workload, spec, tables, options)
        for tokens in options.tokens:
            batches = drawn(spec, tokens)
            out = {table.layer: np.zeros((tokens, table.heads, table.row_bytes), np.uint8) for table in spec.tables}
            check(systems, spec, tables, batches, out)
            following = {name: round_about(batches) for name in systems}
            for name in set(CACHED) & set(systems):
                for batch in batches:
                    systems[name].start(batch, out)(spec.layers[-1])
            if "half" in systems:
                following["half"] = half_new(spec, batches)
            for pause_ms in options.pauses_ms:
                for thread in options.threads:
                    cases = {name: Case() for name in systems}
                    print(f"{tokens} tokens, {pause_ms:g} ms between, thread {thread}", file=sys.stderr, flush=True)
                    with busy_thread() if thread == "busy" else nullcontext():
                        for turn in range(options.rounds if tokens <= SMALL_TOKENS else -(-options.rounds // 3)):
                            # Every round begins with another system, so that none always follows the same one.
                            order = [*systems][turn % len(systems) :] + [*systems][: turn % len(systems)]
                            for name in order:
                                case, system = cases[name], systems[name]
                                measure(case, system, following[name], out, pause_ms / 1e3, options.seconds)
                    about = {"tokens": tokens, "pause_ms": pause_ms, "thread": thread}
                    found += records(cases, systems, workload, about)
    print(report.decode(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The options."""

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter slices, small tables")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--data", type=Path, default=Path("bench-data"), help="where tables are kept between runs")
    parser.add_argument("--systems", type=listed(str), default=list(SYSTEMS), help="comma-separated names")
    parser.add_argument("--tokens", type=listed(int), default=list(TOKENS), help="comma-separated sizes of batches")
    parser.add_argument("--threads", type=listed(str), default=list(THREADS), help="what another thread does meanwhile")
    parser.add_argument(
        "--pauses-ms", type=listed(float), default=[8.0], help="between lookups, comma-separated; 0 is back to back"
    )
    parser.add_argument("--workers", type=int, default=2, help="of the server")
    parser.add_argument("--rounds", type=int, help="slices of each system and case")
    parser.add_argument("--seconds", type=float, help="for each slice")
    parser.add_argument("--vocab-size", type=int, help="of each head: 48 times as many rows")
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data.resolve()  # children run in another directory
    for name, quick, whole in (("rounds", 3, 7), ("seconds", 0.1, 0.3), ("vocab_size", 8_000, 80_000)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    for name, known in (("systems", (*SYSTEMS, *CACHED)), ("threads", THREADS)):
        unknown = [word for word in getattr(options, name) if word not in known]
        if unknown:
            parser.error(f"no such {name}: {', '.join(unknown)}; there are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
