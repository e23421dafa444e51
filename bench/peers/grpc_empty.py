"""An empty unary call over grpcio: what any call costs before there is anything in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peers import grpc_loop, not_installed
from workload import Batch, Rows, Workload

EMPTY = True  # no rows to check, and nothing that depends on the batch


def missing() -> str | None:
    """Needs uvloop, as our server does."""
    return not_installed("uvloop")


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """Answers nothing to nothing."""
    import grpc

    async def empty(request: bytes, context: object) -> bytes:
        return b""

    with grpc_loop.serving({"Empty": grpc.unary_unary_rpc_method_handler(empty)}) as address:
        yield address


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """The blocking stub."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/bench.Raw/Empty")

        def fetch(batch: Batch) -> Rows:
            call(b"")
            return {}

        yield fetch
