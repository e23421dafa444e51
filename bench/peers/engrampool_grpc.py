"""engrampool over gRPC: `engrampool serve` and the blocking client, as installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from workload import ROW_BYTES, Batch, Rows, Workload


def missing() -> None:
    """Runs everywhere."""


@contextmanager
def serve(workload: Workload, **settings: Any) -> Iterator[str]:
    """The server's defaults, but for `settings`."""
    from engrampool_client.testing import serve_process

    with serve_process(workload.packed, **settings) as server:
        yield server.address


@contextmanager
def connect(address: str, workload: Workload, tokens: int, **options: Any) -> Iterator[Callable[[Batch], Rows]]:
    """options: of the client. Every row is asked for, as of the other systems; they land in arrays that are there."""
    from engrampool_client import Client

    shapes = {layer: (tokens, len(heads), ROW_BYTES) for layer, heads in workload.heads.items()}
    out = {layer: np.zeros(shape, np.uint8) for layer, shape in shapes.items()}
    plain = {"direct": "off", "attach": "off", "dedupe": False, "keep_memory": True}
    with Client(address, timeout_s=60, **{**plain, **options}) as pool:
        yield lambda batch: pool.lookup_rows(batch.ids, out=out)
