"""The client's side of one case, as a child of the harness: `measure.py CASE`, a JSON object.

Connects, checks the bytes of answers, warms up, says "ready", waits for a line, measures, says what it found for each
kind of ids:

times: seconds of every call. wall_s: from the first call to the last. server_cpu_s, client_cpu_s: in that time.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import peers
import processes
from workload import Batch, Rows, Workload

Fetch = Callable[[Batch], Rows]

WARM_UP_S = 0.15
SLOW_S = 1.0  # a call that takes longer is measured when it is checked, and not made again
CHECKED = 3  # batches


class Clock:
    """What passed since it was made: time, and CPU time of this process and of the server's."""

    def __init__(self, server_pid: int | None) -> None:
        self._pid = server_pid
        self._server = processes.cpu_s(server_pid) if server_pid else None
        self._client = time.process_time()
        self._begin = time.perf_counter()

    def found(self, times: list[float]) -> dict[str, Any]:
        """What is told of calls."""
        wall_s = time.perf_counter() - self._begin
        client_cpu_s = time.process_time() - self._client
        server_cpu_s = None if self._server is None else processes.cpu_s(self._pid) - self._server
        return {"times": times, "wall_s": wall_s, "client_cpu_s": client_cpu_s, "server_cpu_s": server_cpu_s}


def check(fetch: Fetch, case: dict[str, Any], workload: Workload, kind: str) -> dict[str, Any] | None:
    """Compare the rows of some batches with what must come. Raises ValueError. Gives the measurement of a slow call."""
    answers = workload.answers(kind)
    for batch in islice(workload.batches(kind, case["tokens"]), CHECKED):
        clock = Clock(case["server_pid"])
        rows = fetch(batch)
        found = clock.found([])
        found["times"] = [found["wall_s"]]
        for layer, expected in answers.items():
            right = expected[batch.start : batch.start + batch.tokens].reshape(-1)
            if not np.array_equal(np.asarray(rows[layer]).reshape(-1), right):
                raise ValueError(f"wrong bytes in layer {layer} of {batch.tokens} tokens")
        if found["wall_s"] > SLOW_S:
            return found
    return None


def measure(fetch: Fetch, case: dict[str, Any], workload: Workload, kind: str) -> dict[str, Any]:
    """Call until the time is over, after some calls that do not count."""
    batches = workload.batches(kind, case["tokens"])
    end = time.perf_counter() + min(WARM_UP_S, case["seconds"])
    for calls, batch in enumerate(batches):
        fetch(batch)
        if calls and time.perf_counter() > end:
            break
    now = time.perf_counter
    times: list[float] = []
    clock = Clock(case["server_pid"])
    end = now() + case["seconds"]
    while len(times) < 3 or now() < end:
        batch = next(batches)
        begin = now()
        fetch(batch)
        times.append(now() - begin)
    return clock.found(times)


def main() -> None:
    """Run the case."""
    case = json.loads(sys.argv[1])
    processes.die_with_parent()
    # What a library prints must not get between the lines that the harness reads.
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    workload = Workload(Path(case["workload"]))
    peer = peers.load(case["system"])
    with peer.connect(case["address"], workload, case["tokens"]) as fetch:
        nothing = getattr(peer, "EMPTY", False)
        found = {kind: None if nothing else check(fetch, case, workload, kind) for kind in case["kinds"]}
        said.write('"ready"\n')
        sys.stdin.readline()
        found = {kind: slow or measure(fetch, case, workload, kind) for kind, slow in found.items()}
        said.write(json.dumps(found) + "\n")
        sys.stdin.readline()


if __name__ == "__main__":
    main()
