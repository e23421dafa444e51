"""The ceiling: the same bytes ready-made over a blocking TCP connection, received in place. Nothing is looked up."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from workload import KINDS, Batch, Rows, Workload

REQUEST = struct.Struct("<BII")  # kind, first token, tokens


def missing() -> None:
    """Runs everywhere."""


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """Answers from memory that the rows of every answer lie in, in order."""
    ready = []
    for kind in KINDS:
        answers = [np.array(array) for array in workload.answers(kind).values()]
        ready.append([(memoryview(array.reshape(-1)), array[0].size) for array in answers])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, ready), daemon=True).start()
        yield "{}:{}".format(*listener.getsockname())


def _accept(listener: socket.socket, ready: list[list[tuple[memoryview, int]]]) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, ready), daemon=True).start()


def _answer(connection: socket.socket, ready: list[list[tuple[memoryview, int]]]) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while len(request := connection.recv(REQUEST.size, socket.MSG_WAITALL)) == REQUEST.size:
            kind, start, tokens = REQUEST.unpack(request)
            parts = [view[start * size : (start + tokens) * size] for view, size in ready[kind]]
            sent = connection.sendmsg(parts)
            for part in parts:
                if sent < len(part):
                    connection.sendall(part[sent:])
                sent = max(0, sent - len(part))


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """Receives into one buffer, with recv_into."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = np.zeros(tokens * workload.token_bytes, np.uint8)
        sizes = {layer: array[0].size * tokens for layer, array in workload.answers(KINDS[0]).items()}
        ends = np.cumsum(list(sizes.values()))
        rows = {layer: buffer[end - size : end] for (layer, size), end in zip(sizes.items(), ends, strict=True)}
        view = memoryview(buffer)

        def fetch(batch: Batch) -> Rows:
            connection.sendall(REQUEST.pack(KINDS.index(batch.kind), batch.start, batch.tokens))
            done = 0
            while done < len(view):
                received = connection.recv_into(view[done:])
                if not received:
                    raise ConnectionError("the server closed the connection")
                done += received
            return rows

        yield fetch
