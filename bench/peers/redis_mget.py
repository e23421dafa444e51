"""Redis: rows as strings, MGET pipelined through redis-py with its hiredis parser, against Debian's redis-server."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from peers import key_value, not_installed
from workload import Batch, Rows, Workload

SMALL = key_value.SMALL
_KEYS = 1000  # in one MGET: the server works on one command at a time


def missing() -> str | None:
    """Needs redis-server and redis-py."""
    return not_installed("redis", "hiredis") or (
        None if shutil.which("redis-server") else "not installed: redis-server (Debian: apt-get install redis-server)"
    )


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """Without snapshots, which are of no use to a table that is read only."""
    import redis

    port = key_value.free_port()
    words = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with key_value.program(words, port):
        with redis.Redis(port=port) as client:
            for rows in key_value.entries(workload, 10_000):
                client.mset(rows)
        yield f"127.0.0.1:{port}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """One pipeline of MGETs a call; rows are joined, since a model wants an array."""
    import redis

    host, _, port = address.rpartition(":")
    with redis.Redis(host, int(port)) as client:

        def fetch(batch: Batch) -> Rows:
            pipeline = client.pipeline(transaction=False)
            calls = []
            for layer, ids in batch.ids.items():
                names = key_value.keys(layer, ids)
                for start in range(0, len(names), _KEYS):
                    pipeline.mget(names[start : start + _KEYS])
                    calls.append(layer)
            parts: dict[int, list[bytes]] = {layer: [] for layer in batch.ids}
            for layer, values in zip(calls, pipeline.execute(), strict=True):
                parts[layer] += values
            return {layer: np.frombuffer(b"".join(values), np.uint8) for layer, values in parts.items()}

        yield fetch
