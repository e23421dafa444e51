"""Arrow Flight: do_get with the ids in the ticket; rows come back as record batches of fixed-size binary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from peers import not_installed
from workload import ROW_BYTES, Batch, Rows, Workload

_BATCH_ROWS = 4096  # 1 MiB: faster than one batch a layer, even though the client then has to put rows together


def missing() -> str | None:
    """Needs pyarrow."""
    return not_installed("pyarrow")


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """Rows are gathered by np.take, a record batch at a time."""
    import pyarrow
    from pyarrow import flight

    tables = {layer: workload.load(layer) for layer in workload.layers}
    schema = pyarrow.schema([("rows", pyarrow.binary(ROW_BYTES))])

    class Server(flight.FlightServerBase):
        def do_get(self, context: Any, ticket: Any) -> Any:
            ids = np.frombuffer(ticket.ticket, np.uint32).reshape(len(tables), -1)

            def batches() -> Iterator[Any]:
                for table, wanted in zip(tables.values(), ids, strict=True):
                    for start in range(0, len(wanted), _BATCH_ROWS):
                        part = wanted[start : start + _BATCH_ROWS]
                        rows = np.empty((len(part), ROW_BYTES), np.uint8)
                        np.take(table, part, axis=0, out=rows, mode="clip")
                        buffers = [None, pyarrow.py_buffer(rows)]
                        column = pyarrow.FixedSizeBinaryArray.from_buffers(schema[0].type, len(part), buffers)
                        yield pyarrow.record_batch([column], schema)

            return flight.GeneratorStream(schema, batches())

    with Server("grpc://127.0.0.1:0") as server:
        yield f"grpc://127.0.0.1:{server.port}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """Rows of a layer that came in one batch are a view of it; those of several are put together."""
    from pyarrow import flight

    out = {layer: np.zeros(tokens * len(heads) * ROW_BYTES, np.uint8) for layer, heads in workload.heads.items()}
    with flight.connect(address) as client:

        def fetch(batch: Batch) -> Rows:
            ticket = flight.Ticket(b"".join(ids.tobytes() for ids in batch.ids.values()))
            reader = client.do_get(ticket)
            rows = {}
            for layer, ids in batch.ids.items():
                rows[layer] = out[layer]
                for start in range(0, ids.size, _BATCH_ROWS):
                    column = reader.read_chunk().data.column(0)
                    begin = column.offset * ROW_BYTES
                    part = np.frombuffer(column.buffers()[1], np.uint8)[begin : begin + len(column) * ROW_BYTES]
                    if ids.size <= _BATCH_ROWS:
                        rows[layer] = part
                    else:
                        out[layer][start * ROW_BYTES :][: len(part)] = part
            return rows

        yield fetch
