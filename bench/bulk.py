"""Large lookups back to back: bytes a second, and what a gigabyte costs, beside the same bytes over raw sockets.

    python bench/bulk.py [--tokens 1024,4096] [--rounds 7] [--cases raw-socket,raw-gather,direct,...] [--workers N]

One client process, one call at a time, and a server process for each system; the systems take turns slice by slice, and
all have the same rows in the same order. `raw-socket` sends ready-made bytes, `raw-gather` gathers them first, which no
server of scattered rows can do without. `direct` is a blocking `lookup_rows` into arrays that are there, `direct-2` and
`direct-4` the same over so many connections; `fresh` has the client make the arrays; `tokens` is a `lookup` of tokens,
which hashes, and asks for each n-gram once. Prints one JSON object for each case and size; ratios are medians over the
rounds. User and system time of the server is from /proc/PID/stat, of all its processes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

import peers
import processes
from engrampool_client import Client
from peers import engrampool_grpc
from processes import family
from workload import ROW_BYTES, Batch, Rows, Workload, random_tokens

START_S = 120.0
WARM_UP = 3  # calls that do not count, at the beginning of each slice
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
CASES = ("raw-socket", "raw-gather", "direct", "direct-2", "direct-4", "fresh", "tokens")
Fetch = Callable[[Batch], Rows]


class Case:
    """One system at one size: what each slice took."""

    def __init__(self, fetch: Fetch, server: int, batches: Iterator[Batch]) -> None:
        self.fetch, self.server, self.batches = fetch, server, batches
        self.medians: list[float] = []
        self.cpu: list[list[float]] = []  # by slice, a call: user and system time of the server, of this process

    def slice(self, seconds: float) -> None:
        """Calls for so long."""
        for batch in islice(self.batches, WARM_UP):
            self.fetch(batch)
        times, now = [], time.perf_counter
        before, end = self._spent(), now() + seconds
        while now() < end:
            batch = next(self.batches)
            begin = now()
            self.fetch(batch)
            times.append(now() - begin)
        self.medians.append(statistics.median(times))
        self.cpu.append([(after - was) / len(times) for after, was in zip(self._spent(), before, strict=True)])

    def _spent(self) -> list[float]:
        user = system = 0
        for pid in family(self.server):
            fields = (Path(f"/proc/{pid}/stat")).read_text().rpartition(")")[2].split()
            user, system = user + int(fields[11]), system + int(fields[12])
        own = os.times()
        return [user * TICK_S, system * TICK_S, own.user, own.system]


def check(fetch: Fetch, workload: Workload, batches: Iterator[Batch], name: str) -> None:
    """Compare some answers, byte for byte. Ends the program if they differ."""
    answers = workload.answers("uniform")
    for batch in islice(batches, 2):
        rows = fetch(batch)
        for layer, expected in answers.items():
            right = expected[batch.start : batch.start + batch.tokens].reshape(-1)
            if not np.array_equal(np.asarray(rows[layer]).reshape(-1), right):
                sys.exit(f"{name}: wrong bytes in layer {layer} of {batch.tokens} tokens")


def connect(stack: ExitStack, name: str, address: str, workload: Workload, tokens: int) -> Fetch:
    """What fetches a batch by that case."""
    if name in peers.SYSTEMS:
        return stack.enter_context(peers.load(name).connect(address, workload, tokens))
    lookups = address.split()[0]
    if name.startswith("direct"):
        ways = int(name.partition("-")[2] or 1)
        options = {"direct": "auto", "connections": ways}
        return stack.enter_context(engrampool_grpc.connect(lookups, workload, tokens, **options))
    client = stack.enter_context(Client(lookups, timeout_s=60, attach="off", keep_memory=True, dedupe=name == "tokens"))
    if name == "fresh":
        return lambda batch: client.lookup_rows(batch.ids)
    pool = random_tokens(client.spec.vocab_size, workload.pool_tokens)
    shapes = {layer: (tokens, len(heads), ROW_BYTES) for layer, heads in workload.heads.items()}
    out = {layer: np.zeros(shape, np.uint8) for layer, shape in shapes.items()}
    lookback = client.spec.lookback

    def fetch(batch: Batch) -> Rows:
        before = np.full((1, lookback), -1, np.int32)
        before[0, : batch.start] = pool[max(0, batch.start - lookback) : batch.start][::-1]
        return client.lookup(pool[batch.start : batch.start + tokens], lookback=before, out=out)

    return fetch


def record(name: str, tokens: int, case: Case, raw: dict[str, Case], nbytes: int) -> dict[str, object]:
    """What is printed of a case."""
    gb = nbytes / 1e9
    cpu = [sum(values) / len(case.cpu) / gb for values in zip(*case.cpu, strict=True)]
    found: dict[str, object] = {
        "case": name,
        "tokens": tokens,
        "p50_ms": round(1e3 * statistics.median(case.medians), 3),
        "gb_per_s": round(gb / statistics.median(case.medians), 3),
    }
    names = ("server_user", "server_system", "client_user", "client_system")
    found["cpu_s_per_gb"] = {what: round(value, 3) for what, value in zip(names, cpu, strict=True)}
    for beside, other in raw.items():
        ratios = sorted(theirs / ours for ours, theirs in zip(case.medians, other.medians, strict=True))
        found[f"gb_per_s of {beside}'s"] = [
            round(statistics.median(ratios), 3),
            round(ratios[0], 3),
            round(ratios[-1], 3),
        ]
        spent = [sum(one[0] + one[1] for one in each.cpu) for each in (case, other)]
        found[f"server cpu of {beside}'s"] = round(spent[0] / spent[1], 2)
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", default="1024,4096", help="comma-separated sizes")
    parser.add_argument("--cases", default=",".join(CASES[:3]), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a slice")
    parser.add_argument("--workers", type=int, default=1, help="of the server of engrampool")
    parser.add_argument("--vocab-size", type=int, default=8000, help="48 times as many rows")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent / "bench-data")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"no such cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
    workload = Workload.make(options.data, options.vocab_size)
    with ExitStack() as servers:
        addresses = {}
        for name in cases:
            system = name if name in peers.SYSTEMS else "engrampool-direct"
            settings = {} if name in peers.SYSTEMS else {"workers": options.workers}
            if system not in addresses:
                child = servers.enter_context(
                    processes.child("serve.py", system, workload.directory, json.dumps(settings))
                )
                addresses[system] = child.hear(START_S)["address"], child.pid
        for tokens in map(int, options.tokens.split(",")):
            with ExitStack() as clients:
                measured = {}
                for name in cases:
                    address, pid = addresses[name if name in peers.SYSTEMS else "engrampool-direct"]
                    fetch = connect(clients, name, address, workload, tokens)
                    check(fetch, workload, workload.batches("uniform", tokens), name)
                    measured[name] = Case(fetch, pid, workload.batches("uniform", tokens))
                for turn in range(options.rounds):
                    for name in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
                        measured[name].slice(options.seconds)
                raw = {name: case for name, case in measured.items() if name.startswith("raw")}
                for name, case in measured.items():
                    print(json.dumps(record(name, tokens, case, raw, tokens * workload.token_bytes)), flush=True)


if __name__ == "__main__":
    main()
