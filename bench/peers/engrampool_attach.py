"""engrampool with the server's tables attached in the client's process: the same client, and tables in /dev/shm."""

import inspect
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peers import engrampool_grpc
from workload import Batch, Rows, Workload


def missing() -> str | None:
    """Needs a client that can attach."""
    from engrampool_client import Client

    return None if "attach" in inspect.signature(Client).parameters else "this version cannot attach"


@contextmanager
def serve(workload: Workload, **settings: Any) -> Iterator[str]:
    """As over gRPC, but for the memory, of which nothing stays. Gives where lookups and metrics are answered."""
    from engrampool_client.testing import serve_process

    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as directory,
        serve_process(workload.packed, **{"memory": f"file:{directory}", **settings}) as server,
    ):
        yield f"{server.address} {server.metrics_address}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """As over gRPC, but for the attachment. Raises RuntimeError if the server was asked for rows."""
    lookups, metrics = address.split()
    with engrampool_grpc.connect(lookups, workload, tokens, attach="auto") as fetch:
        yield fetch
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as response:
        seen = response.read().decode()
    if "engrampool_lookup_seconds_count" in seen:
        raise RuntimeError("some lookups did not read the attached tables")
