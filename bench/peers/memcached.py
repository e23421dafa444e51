"""memcached: get_multi through pylibmc (libmemcached) where it is installed, else pymemcache."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from peers import key_value, not_installed
from workload import Batch, Rows, Workload

SMALL = key_value.SMALL


def missing() -> str | None:
    """Needs memcached and pymemcache, which loads the rows."""
    return not_installed("pymemcache") or (
        None if shutil.which("memcached") else "not installed: memcached (Debian: apt-get install memcached)"
    )


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """With room for every row, and memcached's four threads."""
    from pymemcache.client.base import Client

    port = key_value.free_port()
    megabytes = 64 + workload.table_rows * 400 // 1_000_000
    words = ["memcached", "-l", "127.0.0.1", "-p", str(port), "-m", str(megabytes), "-u", "nobody"]
    with key_value.program(words, port):
        client = Client(f"127.0.0.1:{port}")
        for rows in key_value.entries(workload, 10_000):
            client.set_many(rows, noreply=True)
        if client.stats()[b"curr_items"] != workload.table_rows:
            raise RuntimeError("memcached does not hold every row")
        client.close()
        yield f"127.0.0.1:{port}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """One get_multi a layer. A row asked for twice comes once, which the answers of real text gain by."""
    if importlib.util.find_spec("pylibmc"):
        import pylibmc

        client = pylibmc.Client([address], behaviors={"tcp_nodelay": True, "verify_keys": False})
        get = client.get_multi
    else:
        from pymemcache.client.base import Client

        get = Client(address, no_delay=True).get_many

    def fetch(batch: Batch) -> Rows:
        rows = {}
        for layer, ids in batch.ids.items():
            names = key_value.keys(layer, ids)
            found = get(names)
            rows[layer] = np.frombuffer(b"".join(map(found.__getitem__, names)), np.uint8)
        return rows

    yield fetch
