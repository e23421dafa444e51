"""What tests read packed models from: an HTTP server that knows ranges, a real S3 endpoint, and a line to cut."""

import re
import socket
import threading
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# A fault, given the bytes of an answer: what to send of them before the line is cut, or a status to answer instead.
Fault = Callable[[bytes], bytes] | int


class HttpFiles:
    """Files of a directory over HTTP, as a static web server gives them.

    asked: (method, name, first byte, one past the last) of each request, in order.
    faults: by name, what befalls the next GETs of it, one each.
    e_tags: whether answers have one.
    """

    def __init__(self, e_tags: bool) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, int, int]] = []
        self.faults: dict[str, deque[Fault]] = {}
        self.e_tags = e_tags
        self.url = ""
        self.queries: list[str] = []
        self._lock = threading.Lock()

    def add(self, directory: Path, prefix: str) -> None:
        """Serve what lies in `directory`."""
        self.files |= {f"{prefix}/{path.name}": path.read_bytes() for path in directory.iterdir()}

    def gets(self, name: str) -> list[tuple[int, int]]:
        """The ranges that were asked for, in order."""
        return [(start, stop) for method, asked, start, stop in self.asked if (method, asked) == ("GET", name)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        name = unquote(parts.path).lstrip("/")
        body = self.files.get(name)
        if body is None:
            self._send(request, 404, b"")
            return
        given = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        start, stop = (int(given[1]), min(int(given[2]) + 1, len(body))) if given else (0, len(body))
        tag = f'"{hash(body)}"'
        with self._lock:
            self.asked.append((request.command, name, start, stop))
            self.queries.append(parts.query)
            waiting = self.faults.get(name)
            fault = waiting.popleft() if waiting and request.command == "GET" else None
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"} if given else {}
        headers |= {"ETag": tag} if self.e_tags else {}
        if isinstance(fault, int):
            self._send(request, fault, b"<Error><Code>Busy</Code><Why>sig=topsecret</Why></Error>")
        elif request.headers.get("If-Match", tag) != tag:
            self._send(request, 412, b"")
        else:
            self._send(request, 206 if given else 200, body[start:stop], headers, fault)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        fault: Fault | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Last-Modified", "Tue, 24 Nov 2026 16:00:00 GMT")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if callable(fault):
            sent = fault(body)
            request.wfile.write(sent)
            request.close_connection = len(sent) < len(body)
        else:
            request.wfile.write(body)


@contextmanager
def http_files(e_tags: bool = True) -> Iterator[HttpFiles]:
    """A running server of files."""
    files = HttpFiles(e_tags)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(ConnectionError):
                files.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    files.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class S3:
    """A real S3 endpoint, of moto. endpoint: its URL."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def call(self, method: str, path: str, data: bytes | None = None) -> None:
        """A plain request."""
        request = urllib.request.Request(
            self.endpoint + path, data, {"Content-Type": "text/plain", "x-amz-acl": "public-read"}, method=method
        )
        urllib.request.urlopen(request).read()

    def upload(self, directory: Path, where: str) -> None:
        """Put the files of `directory` under BUCKET/PREFIX, in a bucket that is made for it."""
        self.call("PUT", f"/{where.split('/')[0]}")
        for path in directory.iterdir():
            self.call("PUT", f"/{where}/{path.name}", path.read_bytes())

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Believe nobody's credentials."""
        self.call("POST", "/moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self.call("POST", "/moto-api/reset-auth", b"1000000000")

    @property
    def environ(self) -> dict[str, str]:
        """What a process needs to read from it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "topsecret",
        }


@contextmanager
def s3_server() -> Iterator[S3]:
    """A running endpoint, empty."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3(f"http://{host}:{port}")
    finally:
        server.stop()


class Line:
    """A TCP proxy. cuts: after how many further bytes of answers to cut the connection that they go over, in turn.

    address: HOST:PORT of it. passed: bytes of answers so far. connections: how many there were.
    """

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self.cuts: deque[int] = deque()
        self.counts: Counter[str] = Counter()
        self.is_down = False
        self._since_cut = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Cut every connection now, and each new one at once."""
        self.is_down = True
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End, with all connections."""
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.counts["connections"] += 1
            if self.is_down:
                client.close()
                continue
            server = socket.create_connection(self._to)
            with self._lock:
                self._open |= {client, server}
                if self.is_down:  # since that was asked
                    with suppress(OSError):
                        client.shutdown(socket.SHUT_RDWR)
            for target in (self._up, self._down):
                self._threads.append(threading.Thread(target=target, args=(client, server)))
                self._threads[-1].start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                with self._lock:
                    ends = bool(self.cuts) and self._since_cut + len(data) >= self.cuts[0]
                    if ends:
                        data = data[: self.cuts.popleft() - self._since_cut]
                        self._since_cut = 0
                        self.counts["cuts"] += 1
                    else:
                        self._since_cut += len(data)
                client.sendall(data)
                if ends:
                    break
        with self._lock:
            self._open -= {client, server}
        for one in (client, server):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextmanager
def line_to(endpoint: str) -> Iterator[Line]:
    """A proxy to the server at a URL."""
    host, port = urlsplit(endpoint).netloc.split(":")
    line = Line((host, int(port)))
    try:
        yield line
    finally:
        line.close()
