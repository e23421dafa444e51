"""Tables on their way into memory: read from packed files and patches, or adopted from segments of another start."""

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.segment import Identity
from engrampool_proto.sharding import Part, part_nbytes, whole
from engrampool_proto.spec import TableSpec
from engrampool_server.files.patches.patch_files import PatchBlock, PatchFiles
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import Block, PackedModel, TableFileError
from engrampool_server.machine import Machine
from engrampool_server.memory.memory import allocate, huge_page_bytes, lock_pages, populate, protect
from engrampool_server.memory.overlay import Overlay
from engrampool_server.memory.segments import Backing, Segment, find_backing, nameless, take
from engrampool_server.memory.tables import LoadedModel, LoadedTable

# While another server makes the same segment.
POLL_S = 0.1
_SPOT_CHECKS = 6
_Block = TypeVar("_Block", Block, PatchBlock)


class LoadCancelledError(EngrampoolError):
    """Loading was given up because the server is to stop."""


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
    """Hold every table in memory of the kind `memory` (a setting): adopted where it lies there already, else read.

    part: the rows to hold; all if it is None. Only blocks with such rows are read; of a checkpoint all are.
    Every block that is read is checked against its checksum, one that the part cuts in scratch memory; of an adopted
    table a few are. The memory is read-only.
    Where files and tables do not both fit in memory, the page cache is rid of each block once it is read: all of it
    could not stay for the next start anyway, and other things would have to go for it.
    A checkpoint's tables are always read: what version they are is known only afterwards.
    progress: called with the bytes of each block read or table adopted, from any thread.
    attach: who may read the memory (a setting), where it is of a kind that others can map.
    Raises TableFileError for damage, CheckpointError, OutOfMemoryError, SegmentError, and LoadCancelledError once
    `stop` is set.
    """
    part = whole(packed.spec) if part is None else part
    backing = find_backing(memory, attach=attach)
    drop_cache = Machine.read().available_bytes < 2 * part_nbytes(packed.spec, part)
    tables = {}
    for spec in packed.spec.tables:
        if stop.is_set():
            raise LoadCancelledError("loading was cancelled")
        held = part.get(spec.layer, range(0))
        blocks = packed.blocks(spec.layer)
        # A checkpoint's version is that of all its rows, whichever are held.
        if not isinstance(packed, RawModel):
            blocks = [block for block in blocks if block.start < held.stop and block.stop > held.start]

        def fill(rows: npt.NDArray[np.uint8], blocks: Sequence[Block] = blocks, first: int = held.start) -> None:
            if lock and rows.size:
                lock_pages(rows, present=False)
            _read_blocks(packed, blocks, rows, first, threads, stop, progress, drop_cache)

        if not held:
            fill(np.empty((0, spec.row_bytes), np.uint8))
        elif backing is None or isinstance(packed, RawModel):
            nbytes = len(held) * spec.row_bytes
            flat = allocate(nbytes, memory) if backing is None else nameless(backing, nbytes)
            rows = flat.reshape(len(held), spec.row_bytes)
            fill(rows)
            protect(rows, huge_page_bytes() if memory == "hugetlb" else mmap.PAGESIZE)
            tables[spec.layer] = LoadedTable(spec, rows, held.start)
        else:
            identity = _identity(packed, spec, held)
            segment = _segment(packed, identity, blocks, backing, lock, stop, progress, fill)
            tables[spec.layer] = LoadedTable(spec, segment.rows, held.start, segment.place)
    version = packed.version
    assert version is not None
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

    def read(block: PatchBlock) -> None:
        part = slice(block.start - first, block.stop - first)
        populate(rows[part])
        patch.read_block(block, ids[part], rows[part])
        progress(ids[part].nbytes + rows[part].nbytes)

    _each(blocks, read, threads * patch.reads_per_thread, stop)
    protect(rows)
    # The first block and the last may have rows of other servers.
    begin, end = np.searchsorted(ids, np.array([table.row_start, table.row_stop], np.uint64))
    if begin == end:
        return None
    return Overlay.of(ids[begin:end], rows[begin:end], range(table.row_start, table.row_stop))


def identities(packed: PackedModel | RawModel, part: Part | None = None) -> list[Identity]:
    """What the segments of a model's part are (None: of all of it), in order of layers; none of a checkpoint."""
    if isinstance(packed, RawModel):
        return []
    part = whole(packed.spec) if part is None else part
    return [_identity(packed, packed.spec.table(layer), rows) for layer, rows in part.items()]


def _identity(packed: PackedModel, spec: TableSpec, held: range) -> Identity:
    return Identity(packed.spec.name, packed.version, spec.layer, len(held), spec.row_bytes, held.start)


def _segment(
    packed: PackedModel,
    identity: Identity,
    blocks: Sequence[Block],
    backing: Backing,
    lock: bool,
    stop: threading.Event,
    progress: Callable[[int], None],
    fill: Callable[[npt.NDArray[np.uint8]], None],
) -> Segment:
    """The segment, adopted or filled. blocks: those with rows of it."""

    def wait() -> None:
        if stop.wait(POLL_S):
            raise LoadCancelledError("loading was cancelled")

    segment = take(backing, identity, lambda rows: _spot_check(packed, blocks, rows, identity.row_start), wait)
    if segment.adopted:
        if lock:
            lock_pages(segment.rows, present=True)
        progress(identity.nbytes)
        return segment
    try:
        fill(segment.rows)
        segment.finish()
    except BaseException:
        segment.abandon()
        raise
    return segment


def _spot_check(packed: PackedModel, blocks: Sequence[Block], rows: npt.NDArray[np.uint8], row_start: int) -> bool:
    """Whether the first block, the last and some at random are as the manifest says. rows: from `row_start` on."""
    picked = {0, len(blocks) - 1, *map(int, np.random.default_rng().integers(0, len(blocks), _SPOT_CHECKS))}
    return all(_is_right(packed, blocks[at], rows, row_start) for at in picked)


def _is_right(packed: PackedModel, block: Block, rows: npt.NDArray[np.uint8], row_start: int) -> bool:
    held = _held_of(block, rows, row_start)
    if len(held) == block.stop - block.start:
        return bool(xxhash.xxh3_64_hexdigest(held.data) == block.checksum)
    # Its checksum is of rows that are not here; of a table there are two such blocks at most.
    return np.array_equal(held, _read_cut(packed, block, held, row_start))


def _held_of(block: Block, rows: npt.NDArray[np.uint8], row_start: int) -> npt.NDArray[np.uint8]:
    """Those of `rows`, which are from `row_start` on, that are of the block; maybe none."""
    return rows[max(block.start - row_start, 0) : max(block.stop - row_start, 0)]


def _read_cut(
    packed: PackedModel | RawModel, block: Block, held: npt.NDArray[np.uint8], row_start: int
) -> npt.NDArray[np.uint8]:
    """Read all of a block, which checks it; gives what belongs in `held`, its rows from `row_start` on."""
    everything = np.empty((block.stop - block.start, held.shape[1]), np.uint8)
    packed.read_block(block, everything)
    return everything[max(row_start - block.start, 0) :][: len(held)]


def _read_blocks(
    packed: PackedModel | RawModel,
    blocks: Iterable[Block],
    rows: npt.NDArray[np.uint8],
    row_start: int,
    threads: int,
    stop: threading.Event,
    progress: Callable[[int], None],
    drop_cache: bool,
) -> None:
    def read(block: Block) -> None:
        held = _held_of(block, rows, row_start)
        if held.size:
            populate(held)
        if len(held) == block.stop - block.start:
            packed.read_block(block, held)
        else:
            held[:] = _read_cut(packed, block, held, row_start)
        if drop_cache and isinstance(packed, PackedModel):
            packed.drop_cached(block)
        if held.size:
            progress(held.nbytes)

    _each(blocks, read, threads * packed.reads_per_thread, stop)


def _each(blocks: Iterable[_Block], read: Callable[[_Block], None], threads: int, stop: threading.Event) -> None:
    """Read the blocks, in order; none any more after one that failed, whose error is raised, or once `stop` is set."""
    failed = threading.Event()

    def read_one(block: _Block) -> None:
        if stop.is_set():
            raise LoadCancelledError("loading was cancelled")
        if failed.is_set():
            return
        try:
            read(block)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads, "load") as pool:
        futures = deque(pool.submit(read_one, block) for block in blocks)
    while futures:
        # Taken out: an error that refers to this frame, and the frame to it, would keep the memory of a failed load.
        futures.popleft().result()
