"""Tables held in memory: loading them from packed files, and copying rows out."""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import BatchError, EngrampoolError
from engrampool_proto.spec import ModelSpec, RowIds, TableSpec
from engrampool_server.gather import first_outside, gather
from engrampool_server.hasher import Hasher
from engrampool_server.memory import allocate
from engrampool_server.table_files import Block, PackedModel


class LoadCancelledError(EngrampoolError):
    """Loading was given up because the server is to stop."""


@dataclass(frozen=True, eq=False)
class HeldTable:
    """Rows [row_start, row_start + len(rows)) of a table. rows: uint8 [n, row_bytes], read-only."""

    spec: TableSpec
    rows: npt.NDArray[np.uint8]
    row_start: int = 0

    @property
    def row_stop(self) -> int:
        """One past the last row held."""
        return self.row_start + len(self.rows)

    def check(self, ids: RowIds) -> None:
        """Raise BatchError naming the first id that is not held."""
        self._refuse(ids, first_outside(ids, self.row_start, self.row_stop))

    def gather(self, ids: RowIds, out: npt.NDArray[np.uint8]) -> None:
        """Copy the rows `ids` [N] into `out`, uint8 [N * row_bytes], both contiguous. Ids must have been checked.

        One that was not is still an error, BatchError, and never a read beyond the table.
        """
        if out.size != len(ids) * self.spec.row_bytes:
            raise ValueError(f"{len(ids)} rows of {self.spec.row_bytes} bytes do not fill {out.size} bytes exactly")
        self._refuse(ids, gather(self.rows, ids, self.row_start, out))

    def _refuse(self, ids: RowIds, at: int) -> None:
        if at >= 0:
            raise BatchError(
                f"row id {ids[at]} at position {at} of layer {self.spec.layer} is out of range; "
                f"this server holds rows {self.row_start} .. {self.row_stop - 1}"
            )


@dataclass(frozen=True, eq=False)
class HeldModel:
    """One version of a model, in memory. tables: by layer, ascending. hasher: from its tokens to its rows."""

    spec: ModelSpec
    version: str
    tables: Mapping[int, HeldTable]
    hasher: Hasher = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hasher", Hasher(self.spec))


def load(
    packed: PackedModel,
    memory: str,
    lock: bool,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> HeldModel:
    """Read every block of every table into fresh memory, each checked against its checksum.

    progress: called with the bytes of each block read, from any thread.
    Raises TableFileError for damage, OutOfMemoryError, LoadCancelledError once `stop` is set.
    """
    tables = {}
    for spec in packed.spec.tables:
        if stop.is_set():
            raise LoadCancelledError("loading was cancelled")
        rows = allocate(spec.nbytes, memory, lock).reshape(spec.num_rows, spec.row_bytes)
        _read_blocks(packed, packed.blocks(spec.layer), rows, threads, stop, progress)
        rows.flags.writeable = False
        tables[spec.layer] = HeldTable(spec, rows)
    return HeldModel(packed.spec, packed.version, tables)


def _read_blocks(
    packed: PackedModel,
    blocks: Iterable[Block],
    rows: npt.NDArray[np.uint8],
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> None:
    failed = threading.Event()

    def read(block: Block) -> None:
        if stop.is_set():
            raise LoadCancelledError("loading was cancelled")
        if failed.is_set():
            return
        out = rows[block.start : block.stop]
        try:
            packed.read_block(block, out)
        except BaseException:
            failed.set()
            raise
        progress(out.nbytes)

    with ThreadPoolExecutor(threads, "load") as pool:
        futures = [pool.submit(read, block) for block in blocks]
    for future in futures:
        future.result()
