"""What redis and memcached share: a program as child process, and rows as entries."""

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from workload import Workload

SMALL = True  # A table of 1 GB would take a minute to load, row by row, in every round.


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def program(words: Sequence[str], port: int) -> Iterator[None]:
    """Runs a server until the block ends, waiting until it accepts connections. It dies with this process."""
    prctl = ctypes.CDLL(None).prctl
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{words[0]} did not start (exit code {process.poll()})") from None
                time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def keys(layer: int, ids: npt.NDArray[np.uint32]) -> list[bytes]:
    """Key of each row. Hexadecimal, since memcached's keys may hold no control characters or spaces."""
    text = ids.astype(">u4").tobytes().hex().encode()
    head = b"%x:" % layer
    return [head + text[at : at + 8] for at in range(0, len(text), 8)]


def entries(workload: Workload, count: int) -> Iterator[dict[bytes, bytes]]:
    """All rows of all tables, `count` at a time."""
    for layer in workload.layers:
        table = workload.load(layer)
        for start in range(0, len(table), count):
            part = table[start : start + count]
            row_ids = np.arange(start, start + len(part), dtype=np.uint32)
            yield dict(zip(keys(layer, row_ids), map(bytes, part), strict=True))
