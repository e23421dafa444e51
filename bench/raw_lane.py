"""What a lookup costs without Python on its way: loops without the GIL over plain sockets, for bench/decode.py.

As a child of a bench, `raw_lane.py WORKLOAD`, it is the server: it says {"port": ...}, gives every connection a thread,
and serves until its input ends. `RawLane` is the client. Nothing is refused, counted or checked: it is what a lane is
measured by, and nothing to serve with.

A connection begins with a uint32, how often the server looks before it sleeps. A request is two uint32, which table and
how many ids, and the ids; the answer is their rows.
"""

import json
import queue
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numba import njit, types

from engrampool_proto.hashing import TokenBatch
from engrampool_proto.kernels.gather import gather
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec
from workload import Workload

PIECE_ROWS = 512  # gathered, then sent
SMALL_TOKENS = 512  # more go over several connections a layer, each with a thread
CONNECTIONS = 4
SERVER_SPINS, CLIENT_SPINS = 200, 20_000  # of who looks before sleeping
_DONTWAIT, _NOSIGNAL = int(socket.MSG_DONTWAIT), int(socket.MSG_NOSIGNAL)
_MOST_IDS = 1 << 20

_call = types.int64(types.int32, types.uint64, types.uint64, types.int32)
_recv, _send = types.ExternalFunction("recv", _call), types.ExternalFunction("send", _call)


@njit(nogil=True, cache=True)
def receive(fd, at, nbytes, spins):
    """Fill `nbytes` from address `at`; False if the other side closed. Looks `spins` times before it sleeps."""
    done, looked = 0, 0
    while done < nbytes:
        flags = _DONTWAIT if looked < spins else 0
        received = _recv(np.int32(fd), np.uint64(at + np.uint64(done)), np.uint64(nbytes - done), np.int32(flags))
        if received > 0:
            done += received
        elif received == 0 or looked >= spins:
            return False
        else:
            looked += 1
    return True


@njit(nogil=True, cache=True)
def send(fd, at, nbytes):
    """Send all; False if the other side closed."""
    done = 0
    while done < nbytes:
        sent = _send(np.int32(fd), np.uint64(at + np.uint64(done)), np.uint64(nbytes - done), np.int32(_NOSIGNAL))
        if sent <= 0:
            return False
        done += sent
    return True


@njit(nogil=True, cache=True)
def answer(fd, first, second, request, out, spins):
    """Serve one connection until it is closed. first, second: the tables. request, out: to work in."""
    width, words = first.shape[1], np.uint64(request.ctypes.data)
    while receive(fd, words, 8, spins):
        count = np.int64(request[1])
        if not receive(fd, words + np.uint64(8), count * 4, spins):
            return
        at = 0
        while at < count:
            rows = min(PIECE_ROWS, count - at)
            ids = request[2 + at : 2 + at + rows]
            if request[0] == 0:
                gather(first, ids, 0, out)
            else:
                gather(second, ids, 0, out)
            if not send(fd, np.uint64(out.ctypes.data), rows * width):
                return
            at += rows


@njit(nogil=True, cache=True)
def ask(fd, request, table, ids):
    """Send a request for the rows `ids` [N]. request: to write it in."""
    request[0], request[1] = table, ids.size
    request[2 : 2 + ids.size] = ids
    return send(fd, np.uint64(request.ctypes.data), 8 + 4 * ids.size)


@njit(nogil=True, cache=True)
def receive_rows(fd, out, spins):
    """Fill `out`."""
    return receive(fd, np.uint64(out.ctypes.data), out.size, spins)


class Connection:
    """One socket to the server."""

    def __init__(self, port: int, spinning: bool) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(np.uint32(SERVER_SPINS if spinning else 0).tobytes())
        self._request = np.zeros(2 + _MOST_IDS, np.uint32)

    def ask(self, table: int, ids: np.ndarray) -> None:
        """Send a request for rows of the first or the second table."""
        if not ask(self._socket.fileno(), self._request, table, ids.reshape(-1)):
            raise ConnectionError("the raw lane's server closed the connection")

    def receive(self, out: np.ndarray, spins: int) -> None:
        """The rows asked for."""
        if not receive_rows(self._socket.fileno(), out.reshape(-1), spins):
            raise ConnectionError("the raw lane's server closed the connection")

    def close(self) -> None:
        """Close."""
        self._socket.close()


class RawLane:
    """The client: `start` hashes and sends in the caller's thread, `rows` receives there; of large batches, threads do.

    spinning: whether both sides look for bytes for a while before they sleep. One batch at a time.
    """

    def __init__(self, port: int, spec: ModelSpec, spinning: bool) -> None:
        self._hasher = Hasher(spec)
        self._spins = CLIENT_SPINS if spinning else 0
        self._connections = {n: [Connection(port, spinning) for _ in range(CONNECTIONS)] for n in spec.layers}
        self._work = {one: queue.SimpleQueue() for several in self._connections.values() for one in several}
        self._done = {layer: threading.Semaphore(0) for layer in spec.layers}
        self._threads = [threading.Thread(target=self._run, args=work, daemon=True) for work in self._work.items()]
        for thread in self._threads:
            thread.start()
        self._out: Mapping[int, np.ndarray] = {}
        self._large = False

    def start(self, batch: TokenBatch, out: Mapping[int, np.ndarray]) -> None:
        """Ask for the rows of all layers, to be written into `out`."""
        self._out, self._large = out, batch.num_tokens > SMALL_TOKENS
        ids = self._hasher.rows(batch)
        for table, (layer, several) in enumerate(self._connections.items()):
            if not self._large:
                several[0].ask(table, ids[layer])
                continue
            bounds = np.linspace(0, batch.num_tokens, CONNECTIONS + 1).astype(int)
            for one, begin, end in zip(several, bounds[:-1], bounds[1:], strict=True):
                self._work[one].put((table, ids[layer][begin:end], out[layer][begin:end], self._done[layer]))

    def rows(self, layer: int) -> np.ndarray:
        """Wait for a layer's rows. Once a layer."""
        out = self._out[layer]
        if self._large:
            for _ in range(CONNECTIONS):
                self._done[layer].acquire()
        else:
            self._connections[layer][0].receive(out, self._spins)
        return out

    def _run(self, connection: Connection, work: queue.SimpleQueue) -> None:
        while (asked := work.get()) is not None:
            table, ids, out, done = asked
            connection.ask(table, ids)
            connection.receive(out, self._spins)
            done.release()

    def close(self) -> None:
        """Close the connections, which ends the server's threads, and end this side's."""
        for work in self._work.values():
            work.put(None)
        for thread in self._threads:
            thread.join()
        for connection in self._work:
            connection.close()


def _answer(connection: socket.socket, tables: list[np.ndarray]) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        spins = np.frombuffer(connection.recv(4, socket.MSG_WAITALL), np.uint32)
        request, out = np.zeros(2 + _MOST_IDS, np.uint32), np.zeros(PIECE_ROWS * tables[0].shape[1], np.uint8)
        answer(connection.fileno(), *tables, request, out, int(spins[0]))


def _accept(listener: socket.socket, tables: list[np.ndarray]) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, tables), daemon=True).start()


def main() -> None:
    """Serve."""
    workload = Workload(Path(sys.argv[1]))
    tables = [workload.load(layer) for layer in workload.layers]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threading.Thread(target=_accept, args=(listener, tables), daemon=True).start()
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
