"""A way to a server that forgets connections without a word, as NATs, load balancers and sidecars do."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_HOST = "127.0.0.2"  # this machine, by an address that servers of tests do not listen on
_READ_BYTES = 1 << 20


class Proxy:
    """Passes on what comes to its address, on the ports of a server, to 127.0.0.1.

    What was forgotten stays open and is read, and nothing of it is passed on. cut_next: so many connections that come
    are forgotten from their beginning. asked: how many came so far to the first port.
    """

    def __init__(self, *ports: int) -> None:
        self.address = f"{_HOST}:{ports[0]}"
        self.cut_next = self.asked = 0
        self._first = ports[0]
        self._selector = selectors.DefaultSelector()
        self._partners: dict[socket.socket, socket.socket] = {}
        self._forgotten: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = False
        for port in ports:
            self._selector.register(socket.create_server((_HOST, port)), selectors.EVENT_READ, port)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Pass on nothing more of the connections that there are."""
        with self._lock:
            self._forgotten.update(self._partners)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        for one in [*self._partners, *(key.fileobj for key in self._selector.get_map().values())]:
            one.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if key.data is None:
                        self._pass_on(key.fileobj)
                    else:
                        self._accept(key.fileobj, key.data)

    def _accept(self, listener: socket.socket, port: int) -> None:
        caller, _ = listener.accept()
        self.asked += port == self._first
        try:
            server = socket.create_connection(("127.0.0.1", port))
        except OSError:
            caller.close()
            return
        for one, other in ((caller, server), (server, caller)):
            self._partners[one] = other
            self._selector.register(one, selectors.EVENT_READ)
        if self.cut_next:
            self.cut_next -= 1
            self._forgotten.update((caller, server))

    def _pass_on(self, source: socket.socket) -> None:
        if source not in self._partners:  # its partner ended just now
            return
        data = b""
        with suppress(OSError):
            data = source.recv(_READ_BYTES)
        if source in self._forgotten:
            if not data:
                self._selector.unregister(source)
            return
        try:
            self._partners[source].sendall(data)
        except OSError:
            data = b""
        if not data:
            for one in (source, self._partners[source]):
                del self._partners[one]
                self._selector.unregister(one)
                one.close()


@contextmanager
def proxy(*ports: int) -> Iterator[Proxy]:
    """One to these ports; the first is that of gRPC."""
    made = Proxy(*ports)
    try:
        yield made
    finally:
        made.close()
