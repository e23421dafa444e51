"""Mooncake's EngramStore over TCP: a master, a process that holds the tables, and a client that holds none.

A row is 66 float32 to it: EngramStore of the releases on PyPI knows no other type. Their bits come back unchanged.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peers import key_value
from workload import ROW_BYTES, Batch, Rows, Workload

_BUFFER_BYTES = 256 << 20


def missing() -> str | None:
    """Needs a wheel that has EngramStore, and the libraries that it links."""
    if not importlib.util.find_spec("mooncake"):
        return "not installed: mooncake-transfer-engine-non-cuda"
    try:
        from mooncake.store import EngramStore  # noqa: F401
    except ImportError as error:
        return f"mooncake.store does not load: {error} (Debian: apt-get install libibverbs1 libnuma1)"
    return None


@contextmanager
def _store(master: str, held_bytes: int) -> Iterator[Any]:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    failed = store.setup("127.0.0.1", "P2PHANDSHAKE", held_bytes, _BUFFER_BYTES, "tcp", "", master)
    if failed:
        raise RuntimeError(f"MooncakeDistributedStore.setup returned {failed}")
    try:
        yield store
    finally:
        store.close()


def _layer(store: Any, workload: Workload, layer: int) -> Any:
    from mooncake.store import EngramStore, EngramStoreConfig

    config = EngramStoreConfig()
    config.table_vocab_sizes = workload.heads[layer]
    config.embedding_dim = ROW_BYTES // 4
    return EngramStore(layer, config, store)


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """The address is the master's. Memory is half as much again as the tables, so that the master evicts nothing."""
    import mooncake

    port, metrics = key_value.free_port(), key_value.free_port()
    words = [str(Path(mooncake.__file__).parent / "mooncake_master"), "-rpc_address", "127.0.0.1"]
    words += ["-rpc_port", str(port), "-metrics_port", str(metrics)]
    held_bytes = (workload.table_rows * ROW_BYTES * 3 // 2 // (16 << 20) + 16) * (16 << 20)
    with key_value.program(words, port), _store(f"127.0.0.1:{port}", held_bytes) as store:
        layers = []  # a table is owned by the object that filled it
        for layer in workload.layers:
            layers.append(_layer(store, workload, layer))
            table = workload.load(layer).view(np.float32)
            layers[-1].populate(np.split(table, np.cumsum(workload.heads[layer])[:-1]))
        yield f"127.0.0.1:{port}"


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """One lookup a layer, of row ids within each head."""
    with _store(address, 0) as store:
        layers = {layer: _layer(store, workload, layer) for layer in workload.layers}
        offsets = {layer: np.cumsum([0, *heads[:-1]]) for layer, heads in workload.heads.items()}

        def fetch(batch: Batch) -> Rows:
            return {
                layer: layers[layer].lookup((ids - offsets[layer])[None]).view(np.uint8)
                for layer, ids in batch.ids.items()
            }

        yield fetch
