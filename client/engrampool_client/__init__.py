"""The engrampool client: asks a pool for embedding rows ahead of the layers that read them.

with Client("memory-node:50051") as pool:
    step = pool.prefetch(tokens)        # int32 [T]; returns at once
    rows = step.rows(1)                 # uint8 [T, heads, row_bytes], when layer 1 runs
"""

from engrampool_client.aio import AsyncClient, AsyncStep
from engrampool_client.client import Client, Step
from engrampool_client.errors import (
    BatchError,
    CacheFileError,
    DeadlineError,
    EngrampoolError,
    FingerprintError,
    ForkedError,
    OverloadedError,
    PoolError,
    ProtocolError,
    RecordError,
    RejectedError,
    SpecError,
    StepCancelledError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
)
from engrampool_proto import __version__

__all__ = [
    "AsyncClient",
    "AsyncStep",
    "BatchError",
    "CacheFileError",
    "Client",
    "DeadlineError",
    "EngrampoolError",
    "FingerprintError",
    "ForkedError",
    "OverloadedError",
    "PoolError",
    "ProtocolError",
    "RecordError",
    "RejectedError",
    "SpecError",
    "Step",
    "StepCancelledError",
    "UnavailableError",
    "UnknownModelError",
    "UnknownVersionError",
    "__version__",
]
