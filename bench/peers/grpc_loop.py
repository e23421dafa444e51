"""A bare grpc.aio server on uvloop, as ours is built, with handlers of raw bytes. Shared by grpc_empty and grpc_raw."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@contextmanager
def serving(handlers: Mapping[str, Any]) -> Iterator[str]:
    """Serves /bench.Raw/<name> by `handlers`, which come from grpc.*_rpc_method_handler; gives the address."""
    import grpc
    import uvloop

    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server(options=OPTIONS)
        server.add_registered_method_handlers("bench.Raw", dict(handlers))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
