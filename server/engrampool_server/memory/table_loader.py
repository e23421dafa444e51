"""Tables held in memory: with patches laid over them. It imports the kernels, as whatever is held may be asked for."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engrampool_proto.sharding import Part
from engrampool_server.files.patches.patch_files import PatchBlock, PatchFiles
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.memory.memory import allocate, lock_pages, populate, protect
from engrampool_server.memory.overlay import Overlay
from engrampool_server.memory.reading import each, read
from engrampool_server.memory.tables import LoadedModel, LoadedTable


def load(
    packed: PackedModel | RawModel,
    memory: str,
    lock: bool,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
    attach: str = "off",
    part: Part | None = None,
) -> LoadedModel:
    """Hold what `reading.read` has in memory, and its arguments are; raises what it raises."""
    rows = read(packed, memory, lock, threads, stop, progress, attach, part)
    version = packed.version
    assert version is not None
    tables = {
        layer: LoadedTable(packed.spec.table(layer), one.rows, one.row_start, one.place) for layer, one in rows.items()
    }
    return LoadedModel(packed.spec, version, tables)


def load_patched(
    patch: PatchFiles,
    base: LoadedModel,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
    lock: bool = False,
) -> LoadedModel:
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
    return LoadedModel(patch.spec, patch.version, tables)


def _overlay(
    patch: PatchFiles,
    table: LoadedTable,
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
