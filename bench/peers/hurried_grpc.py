"""A plain grpcio service with `repeated` fields: what somebody in a hurry would write."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from peers import not_installed
from workload import Batch, Rows, Workload

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def missing() -> str | None:
    """Needs grpcio-tools, which compiles the .proto when it is imported."""
    return not_installed("grpc_tools")


def _generated() -> tuple[Any, Any]:
    import grpc

    return grpc.protos_and_services("peers/hurried.proto")


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """The threaded server of grpcio's tutorial, with its ten threads."""
    import grpc

    messages, services = _generated()
    tables = {layer: workload.load(layer) for layer in workload.layers}

    class Service(services.RowsServicer):
        def Lookup(self, request: Any, context: Any) -> Any:  # noqa: N802
            return messages.Answer(
                layers=[
                    messages.LayerRows(layer=wanted.layer, rows=[tables[wanted.layer][i].tobytes() for i in wanted.ids])
                    for wanted in request.layers
                ]
            )

    server = grpc.server(ThreadPoolExecutor(10), options=_OPTIONS)
    services.add_RowsServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """Joins the rows, since a model wants an array."""
    import grpc

    messages, services = _generated()
    with grpc.insecure_channel(address, _OPTIONS) as channel:
        stub = services.RowsStub(channel)

        def fetch(batch: Batch) -> Rows:
            layers = [messages.Ids(layer=layer, ids=ids.reshape(-1).tolist()) for layer, ids in batch.ids.items()]
            answer = stub.Lookup(messages.Request(layers=layers))
            return {part.layer: np.frombuffer(b"".join(part.rows), np.uint8) for part in answer.layers}

        yield fetch
