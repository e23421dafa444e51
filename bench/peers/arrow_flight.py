"""Arrow Flight: do_get with the ids in the ticket; rows come back as record batches of fixed-size binary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from peers import not_installed
from workload import ROW_BYTES, Batch, Rows, Workload


def missing() -> str | None:
    """Needs pyarrow."""
    return not_installed("pyarrow")


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """One record batch a layer, gathered by np.take: cut into smaller batches it was no faster."""
    import pyarrow
    from pyarrow import flight

    tables = {layer: workload.load(layer) for layer in workload.layers}
    schema = pyarrow.schema([("rows", pyarrow.binary(ROW_BYTES))])

    class Server(flight.FlightServerBase):
        def do_get(self, context: Any, ticket: Any) -> Any:
            ids = np.frombuffer(ticket.ticket, np.uint32).reshape(len(tables), -1)

            def batches() -> Iterator[Any]:
                for table, wanted in zip(tables.values(), ids, strict=True):
                    rows = np.empty((len(wanted), ROW_BYTES), np.uint8)
                    np.take(table, wanted, axis=0, out=rows, mode="clip")
                    buffers = [None, pyarrow.py_buffer(rows)]
                    column = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(ROW_BYTES), len(wanted), buffers)
                    yield pyarrow.record_batch([column], schema)

            return flight.GeneratorStream(schema, batches())

    with Server("grpc://127.0.0.1:0") as server:
        yield f"grpc://127.0.0.1:{server.port}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """Rows are views of what Arrow received: no copy."""
    from pyarrow import flight

    with flight.connect(address) as client:

        def fetch(batch: Batch) -> Rows:
            ticket = flight.Ticket(b"".join(ids.tobytes() for ids in batch.ids.values()))
            reader = client.do_get(ticket)
            rows = {}
            for layer in batch.ids:
                column = reader.read_chunk().data.column(0)
                start = column.offset * ROW_BYTES
                rows[layer] = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * ROW_BYTES]
            return rows

        yield fetch
