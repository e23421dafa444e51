"""Another commit beside this one: the same lookups, slice by slice in turn, in one run.

    git worktree add --detach ../before COMMIT
    python bench/compare.py ../before PACKED_MODEL

A server and a client of each tree run all the while, used by the public API that both have. Every measurement is a
short slice of one tree beside one of the other, each first in turn, so that what else the machine does falls on both.
Printed are medians over slices: of each tree's median time, of the ratio of the two, with the quarter below and above,
and of the ratio of the client's processor time a lookup. Lookups go back to back, or with the pauses that decoding has
between two steps; of a step, `prefetch` and then `rows`, it is the time until the first layer's rows were there,
and that until all were.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

LANES = {"direct": {"attach": "off"}, "grpc": {"attach": "off", "direct": "off"}, "attached": {}}
TOKENS = (1, 8, 64, 1024)
# Shards, and servers of each, on the direct lane.
CLUSTERS = {"2 shards": (2, 1), "2 replicas": (1, 2)}
CLUSTER_TOKENS = (1, 8, 64)
PAUSE_S = 0.008
LEAST = 5  # lookups a slice


def answer(options: argparse.Namespace) -> None:
    """Measure what each line of the input names, and print the medians: microseconds, and those of the processor."""
    from engrampool_client import Client
    from engrampool_client.testing import serve_process

    with ExitStack() as stack:
        server = stack.enter_context(serve_process(options.model, workers=1, memory=f"file:{options.tables}"))
        calls: dict[str, tuple[Callable[[np.ndarray], float], list[np.ndarray], float]] = {}
        for lane in options.lanes:
            client = stack.enter_context(Client(server.address, keep_memory=True, **LANES[lane]))
            random = np.random.default_rng(1)
            for count in options.tokens:
                batches = [random.integers(0, client.spec.vocab_size, count).astype(np.int32) for _ in range(16)]
                for one in batches:
                    client.lookup(one)
                calls[f"{lane}, {count}, back to back"] = _lookup(client), batches, 0.0
                for pause_s, pauses in ((PAUSE_S, ""), (0.0, ", back to back")):
                    calls[f"{lane}, {count}, a step's first layer{pauses}"] = _step(client, True), batches, pause_s
                    calls[f"{lane}, {count}, a step{pauses}"] = _step(client, False), batches, pause_s
        for name, (shards, replicas) in CLUSTERS.items():
            servers = [
                stack.enter_context(
                    serve_process(
                        options.model, workers=1, memory=f"file:{options.tables}", **_part(number % shards, shards)
                    )
                )
                for number in range(shards * replicas)
            ]
            client = stack.enter_context(Client([one.address for one in servers], attach="off"))
            for count in CLUSTER_TOKENS:
                random = np.random.default_rng(1)
                batches = [random.integers(0, client.spec.vocab_size, count).astype(np.int32) for _ in range(16)]
                for one in batches:
                    client.lookup(one)
                calls[f"{name}, {count}, a step's first layer"] = _step(client, True), batches, PAUSE_S
                calls[f"{name}, {count}, a step"] = _step(client, False), batches, PAUSE_S
        client = stack.enter_context(Client(server.address, keep_memory=True, attach="off", cache_bytes=64 << 20))
        cached = [np.arange(64, dtype=np.int32)]
        for _ in range(5):
            client.lookup(cached[0])
        calls["all cached, 64, a step"] = _step(client, False), cached, 0.002
        print(json.dumps(list(calls)), flush=True)
        for line in sys.stdin:
            name, seconds = json.loads(line)
            print(json.dumps(_slice(*calls[name], seconds)), flush=True)


def _part(number: int, shards: int) -> dict[str, str]:
    return {"shard": f"{number}/{shards}"} if shards > 1 else {}


def _lookup(client) -> Callable[[np.ndarray], float]:
    def lookup(batch: np.ndarray) -> float:
        begin = time.perf_counter()
        client.lookup(batch)
        return time.perf_counter() - begin

    return lookup


def _step(client, to_first: bool) -> Callable[[np.ndarray], float]:
    first, *others = client.spec.layers

    def step(batch: np.ndarray) -> float:
        begin = time.perf_counter()
        step = client.prefetch(batch)
        step.rows(first)
        came = time.perf_counter()
        for layer in others:
            step.rows(layer)
        return (came if to_first else time.perf_counter()) - begin

    return step


def _slice(
    call: Callable[[np.ndarray], float], batches: list[np.ndarray], pause_s: float, seconds: float
) -> tuple[float, float]:
    took, end, cpu = [], time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end or len(took) < LEAST:
        if pause_s:
            time.sleep(pause_s)
        took.append(call(batches[len(took) % len(batches)]))
    return statistics.median(took) * 1e6, (time.process_time() - cpu) / len(took) * 1e6


class Tree:
    """A server and a client of one tree, in a process of their own."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        path = os.pathsep.join(str(root / part) for part in ("proto", "server", "client"))
        command = [sys.executable, __file__, str(root), str(options.model.resolve()), "--answer"]
        command += ["--lanes", ",".join(options.lanes), "--tokens", ",".join(map(str, options.tokens))]
        self._process = subprocess.Popen(
            [*command, "--tables", str(options.tables)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = self._line()

    def measure(self, name: str, seconds: float) -> list[float]:
        """The time of a lookup and the processor's, in microseconds."""
        print(json.dumps([name, seconds]), file=self._process.stdin, flush=True)
        found: list[float] = self._line()
        return found

    def _line(self):
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End client and server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the root of the other tree")
    parser.add_argument("model", type=Path, help="a packed model")
    parser.add_argument("--rounds", type=int, default=20, help="slices of each measurement and tree")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each slice")
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--tables", type=Path, default=Path("/dev/shm"), help="where servers keep tables")
    parser.add_argument("--lanes", type=lambda text: text.split(","), default=list(LANES), help="comma-separated")
    parser.add_argument("--tokens", type=lambda text: [int(word) for word in text.split(",")], default=list(TOKENS))
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(options)
        return
    with ExitStack() as stack:
        before = Tree(options.before.resolve(), options)
        stack.callback(before.close)
        now = Tree(Path(__file__).resolve().parents[1], options)
        stack.callback(now.close)
        print(f"{'what':45} {'before us':>10} {'now us':>8} {'now / before (quarters)':>25} {'processor':>10}")
        for what in [name for name in now.names if options.only in name]:
            found: dict[Tree, list[list[float]]] = {before: [], now: []}
            for number in range(options.rounds):
                # Whoever comes second may have the better or the worse of it.
                for tree in (before, now) if number % 2 == 0 else (now, before):
                    found[tree].append(tree.measure(what, options.seconds))
            times, processor = (
                [
                    (one[at], other[at], other[at] / one[at])
                    for one, other in zip(found[before], found[now], strict=True)
                ]
                for at in (0, 1)
            )
            was, is_now, _ = (statistics.median(column) for column in zip(*times, strict=True))
            low, middle, high = statistics.quantiles([ratio for *_, ratio in times], n=4)
            used = statistics.median(ratio for *_, ratio in processor)
            print(
                f"{what:45} {was:10.0f} {is_now:8.0f} {middle:11.2f} ({low:.2f} - {high:.2f}) {used:10.2f}", flush=True
            )


if __name__ == "__main__":
    main()
