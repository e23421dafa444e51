"""engrampool over its direct lane: the same client, with `direct` on."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager

from peers import engrampool_grpc
from workload import Batch, Rows, Workload

serve = engrampool_grpc.serve


def missing() -> str | None:
    """Needs a client that has the lane."""
    from engrampool_client import Client

    return None if "direct" in inspect.signature(Client).parameters else "this version has no direct lane"


def connect(address: str, workload: Workload, tokens: int) -> AbstractContextManager[Callable[[Batch], Rows]]:
    """As over gRPC, but for the lane."""
    return engrampool_grpc.connect(address, workload, tokens, direct="auto")
