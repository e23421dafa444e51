"""The floor of a server whose rows lie scattered: as raw_socket, but for rows that are gathered before they are sent.

By our kernel, a piece that stays in the processor's cache at a time, over a blocking TCP connection. Where the rows lie
is known beforehand: no ids go over, and nothing is checked or counted.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from peers import not_installed, raw_socket
from workload import KINDS, ROW_BYTES, Workload

connect = raw_socket.connect


def missing() -> str | None:
    """Needs numba, as our server does."""
    return not_installed("numba")


@contextmanager
def serve(workload: Workload, piece_rows: int = 992) -> Iterator[str]:
    """Answers from the tables, in this process's memory. piece_rows: gathered, then sent."""
    tables = [workload.load(layer) for layer in workload.layers]
    ids = [[np.load(workload.directory / f"ids-{kind}-{n}.npy") for n in workload.layers] for kind in KINDS]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, tables, ids, piece_rows), daemon=True).start()
        yield "{}:{}".format(*listener.getsockname())


def _accept(listener: socket.socket, *served: Any) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, *served), daemon=True).start()


def _answer(connection: socket.socket, tables: list[np.ndarray], ids: list[list[np.ndarray]], piece_rows: int) -> None:
    from engrampool_proto.kernels.gather import gather

    gathered = np.empty(piece_rows * ROW_BYTES, np.uint8)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while len(request := connection.recv(raw_socket.REQUEST.size, socket.MSG_WAITALL)) == raw_socket.REQUEST.size:
            kind, start, tokens = raw_socket.REQUEST.unpack(request)
            for table, pool in zip(tables, ids[kind], strict=True):
                wanted = pool[start : start + tokens].reshape(-1)
                for at in range(0, len(wanted), piece_rows):
                    some = wanted[at : at + piece_rows]
                    gather(table, some, 0, gathered)
                    connection.sendall(gathered.data[: len(some) * ROW_BYTES])
