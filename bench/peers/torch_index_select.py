"""torch.index_select in the caller's own process, on one thread as numpy is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from peers import not_installed
from workload import ROW_BYTES, Batch, Rows, Workload


def missing() -> str | None:
    """Needs torch."""
    return not_installed("torch")


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """Into tensors that are there already; torch wants ids as int64."""
    import torch

    torch.set_num_threads(1)
    tables = {layer: torch.from_numpy(workload.load(layer)) for layer in workload.layers}
    out = {
        layer: torch.zeros(tokens * len(heads), ROW_BYTES, dtype=torch.uint8) for layer, heads in workload.heads.items()
    }
    rows = {layer: tensor.numpy() for layer, tensor in out.items()}

    def fetch(batch: Batch) -> Rows:
        for layer, ids in batch.ids.items():
            index = torch.from_numpy(ids.reshape(-1).astype(np.int64))
            torch.index_select(tables[layer], 0, index, out=out[layer])
        return rows

    yield fetch
