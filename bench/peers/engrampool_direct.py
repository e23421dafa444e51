"""engrampool over its direct lane: the same server and client, with `direct` on."""

import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peers import engrampool_grpc
from workload import Batch, Rows, Workload


def missing() -> None:
    """Runs everywhere."""


@contextmanager
def serve(workload: Workload, **settings: Any) -> Iterator[str]:
    """As over gRPC. Gives where lookups are answered and where metrics are."""
    from engrampool_client.testing import serve_process

    with serve_process(workload.packed, **settings) as server:
        yield f"{server.address} {server.metrics_address}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """As over gRPC, but for the lane. Raises RuntimeError if any lookup fell back to gRPC, measured elsewhere."""
    lookups, metrics = address.split()
    with engrampool_grpc.connect(lookups, workload, tokens, direct="auto") as fetch:
        yield fetch
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as response:
        seen = response.read().decode()
    if 'engrampool_lookup_seconds_count{method="Direct"' not in seen or "LookupStream" in seen or '"Lookup"' in seen:
        raise RuntimeError("some lookups did not take the direct lane")
