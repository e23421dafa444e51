"""The engrampool client: asks a pool for embedding rows ahead of the layers that read them.

with Client("memory-node:50051") as pool:
    step = pool.prefetch(tokens)        # int32 [T]; returns at once
    rows = step.rows(1)                 # uint8 [T, heads, row_bytes], when layer 1 runs
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engrampool_proto import __version__

if TYPE_CHECKING:
    from engrampool_client.aio import AsyncClient, AsyncStep
    from engrampool_client.client import Client, Step
    from engrampool_client.errors import (
        BatchError,
        CacheFileError,
        DeadlineError,
        EngrampoolError,
        FingerprintError,
        ForbiddenError,
        ForkedError,
        OverloadedError,
        PoolError,
        ProtocolError,
        RecordError,
        RejectedError,
        SpecError,
        StepCancelledError,
        TlsError,
        UnauthenticatedError,
        UnavailableError,
        UnknownModelError,
        UnknownVersionError,
    )

__all__ = [
    "AsyncClient",
    "AsyncStep",
    "BatchError",
    "CacheFileError",
    "Client",
    "DeadlineError",
    "EngrampoolError",
    "FingerprintError",
    "ForbiddenError",
    "ForkedError",
    "OverloadedError",
    "PoolError",
    "ProtocolError",
    "RecordError",
    "RejectedError",
    "SpecError",
    "Step",
    "StepCancelledError",
    "TlsError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownModelError",
    "UnknownVersionError",
    "__version__",
]

# The others are errors. Each is imported when it is first asked for: a command line's help does not wait for gRPC.
_MODULES = {"AsyncClient": "aio", "AsyncStep": "aio", "Client": "client", "Step": "client"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
    if name == "errors":  # without an import of its own, as it was always there
        return import_module(f"{__name__}.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
