"""Tables held in memory: with patches laid over them, and copying rows out. It imports the kernels."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import BatchError
from engrampool_proto.sharding import Part
from engrampool_proto.spec import ModelSpec, RowIds, TableSpec
from engrampool_server.answer.hasher import Hasher
from engrampool_server.files.patches.patch_files import PatchBlock, PatchFiles
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.memory.gather import first_outside, gather
from engrampool_server.memory.memory import allocate, lock_pages, populate, protect
from engrampool_server.memory.overlay import Overlay
from engrampool_server.memory.reading import each, read
from engrampool_server.memory.segments import Place


class NotHeldError(BatchError):
    """Rows of the table that this server does not hold; another one may."""


@dataclass(frozen=True, eq=False)
class HeldTable:
    """Rows [row_start, row_start + len(rows)) of a table. rows: uint8 [n, row_bytes], read-only.

    place: where others can map them, None where they cannot.
    overlay: rows that a patch gives in the place of some of `rows`, which then are not the table's.
    """

    spec: TableSpec
    rows: npt.NDArray[np.uint8]
    row_start: int = 0
    place: Place | None = None
    overlay: Overlay | None = None

    @property
    def row_stop(self) -> int:
        """One past the last row held."""
        return self.row_start + len(self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether every row of the table is held."""
        return len(self.rows) == self.spec.num_rows

    def check(self, ids: RowIds) -> None:
        """Raise BatchError naming the first id that is not held, NotHeldError if the table has it."""
        self._refuse(ids, first_outside(ids, self.row_start, self.row_stop))

    def gather(self, ids: RowIds, out: npt.NDArray[np.uint8]) -> None:
        """Copy the rows `ids` [N] into `out`, uint8 [N * row_bytes], both contiguous. Ids must have been checked.

        One that was not is still an error, BatchError, and never a read beyond the table.
        """
        if out.size != len(ids) * self.spec.row_bytes:
            raise ValueError(f"{len(ids)} rows of {self.spec.row_bytes} bytes do not fill {out.size} bytes exactly")
        self._refuse(ids, gather(self.rows, ids, self.row_start, out))
        if self.overlay is not None:
            self.overlay.copy(ids, self.row_start, out)

    def _refuse(self, ids: RowIds, at: int) -> None:
        if at >= 0:
            kind = NotHeldError if ids[at] < self.spec.num_rows else BatchError
            raise kind(
                f"row id {ids[at]} at position {at} of layer {self.spec.layer} is out of range; "
                f"this server holds rows {self.row_start} .. {self.row_stop - 1}"
            )


@dataclass(frozen=True, eq=False)
class HeldModel:
    """One version of a model, in memory.

    tables: those of which rows are held, by layer, ascending. hasher: from its tokens to its rows.
    """

    spec: ModelSpec
    version: str
    tables: Mapping[int, HeldTable]
    hasher: Hasher = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hasher", Hasher(self.spec))


def load(
    packed: PackedModel | RawModel,
    memory: str,
    lock: bool,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
    attach: str = "off",
    part: Part | None = None,
) -> HeldModel:
    """Hold what `reading.read` has in memory, and its arguments are; raises what it raises."""
    rows = read(packed, memory, lock, threads, stop, progress, attach, part)
    version = packed.version
    assert version is not None
    tables = {
        layer: HeldTable(packed.spec.table(layer), one.rows, one.row_start, one.place) for layer, one in rows.items()
    }
    return HeldModel(packed.spec, version, tables)


def load_patched(
    patch: PatchFiles,
    base: HeldModel,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
    lock: bool = False,
) -> HeldModel:
    """Hold the version that `patch` makes of `base`: the same rows in the same memory, and the changed ones beside it.

    Of each table only blocks with changed rows that are held are read, and all of these checked. Their memory is
    read-only, of this process and its forks; none of the version can be mapped by others.
    progress: called with the bytes of each block read, from any thread. lock: keep changed rows in RAM.
    Raises TableFileError for damage or if this is not the patch's base, OutOfMemoryError, and LoadCancelledError once
    `stop` is set.
    """
    if base.version != patch.base_version or base.spec.digest != patch.spec.digest:
        raise TableFileError(
            f"{patch.directory} is a patch of version {patch.base_version}, and cannot be laid over {base.spec.name} "
            f"of version {base.version}; patch that one anew"
        )
    if any(table.overlay for table in base.tables.values()):
        raise TableFileError(
            f"{patch.directory} is a patch of version {base.version}, which is a patch; patch its base"
        )
    tables = {}
    for layer, table in base.tables.items():
        overlay = _overlay(patch, table, threads, stop, progress, lock)
        # Who maps a table finds the base's version in it, changed or not.
        tables[layer] = replace(table, place=None, overlay=overlay)
    return HeldModel(patch.spec, patch.version, tables)


def _overlay(
    patch: PatchFiles,
    table: HeldTable,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
    lock: bool,
) -> Overlay | None:
    blocks = patch.blocks(table.spec.layer)
    blocks = [block for block in blocks if block.first_id < table.row_stop and block.last_id >= table.row_start]
    if not blocks:
        return None
    first, count = blocks[0].start, blocks[-1].stop - blocks[0].start
    ids = np.empty(count, np.uint64)
    flat = allocate(count * table.spec.row_bytes, "anon")
    rows = flat.reshape(count, table.spec.row_bytes)
    if lock:
        lock_pages(rows, present=False)

    def read_one(block: PatchBlock) -> None:
        part = slice(block.start - first, block.stop - first)
        populate(rows[part])
        patch.read_block(block, ids[part], rows[part])
        progress(ids[part].nbytes + rows[part].nbytes)

    each(blocks, read_one, threads * patch.reads_per_thread, stop)
    protect(rows)
    # The first block and the last may have rows of other servers.
    begin, end = np.searchsorted(ids, np.array([table.row_start, table.row_stop], np.uint64))
    if begin == end:
        return None
    return Overlay.of(ids[begin:end], rows[begin:end], range(table.row_start, table.row_stop))
