"""engrampool with the server's tables attached in the client's process."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager

from peers import engrampool_grpc
from workload import Batch, Rows, Workload

serve = engrampool_grpc.serve


def missing() -> str | None:
    """Needs a client that can attach."""
    from engrampool_client import Client

    return None if "attach" in inspect.signature(Client).parameters else "this version cannot attach"


def connect(address: str, workload: Workload, tokens: int) -> AbstractContextManager[Callable[[Batch], Rows]]:
    """As over gRPC, but for the attachment."""
    return engrampool_grpc.connect(address, workload, tokens, attach="auto")
