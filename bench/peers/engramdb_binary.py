"""EngramDB's binary server and its client, as the package's page shows them. Its files lie in the page cache."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from peers import not_installed
from workload import ROW_BYTES, Batch, Rows, Workload


def missing() -> str | None:
    """Needs engramdb-python."""
    return not_installed("engramdb")


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """One table a layer, one shard a table."""
    from engramdb import Database, EngramDBBinaryServer

    database = Database(workload.directory / "tables")
    with EngramDBBinaryServer(database, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield "{}:{}".format(*server.server_address)
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """One fetch_raw a layer."""
    from engramdb import EngramDBClient

    host, _, port = address.rpartition(":")
    with EngramDBClient(host, int(port), timeout=60) as client:

        def fetch(batch: Batch) -> Rows:
            return {
                layer: np.frombuffer(
                    client.fetch_raw(str(layer), ids.reshape(-1).tolist(), 1, workload.num_rows(layer), ROW_BYTES),
                    np.uint8,
                )
                for layer, ids in batch.ids.items()
            }

        yield fetch
