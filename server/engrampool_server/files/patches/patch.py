"""`engrampool patch`: writes the rows of a model that differ from another version of it, and nothing else."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.spec import TableSpec
from engrampool_server.files.manifest import MANIFEST_NAME
from engrampool_server.files.patches.patch_files import IDS_TENSOR
from engrampool_server.files.patches.patch_manifest import ID_BYTES, MAX_CHANGED, PatchManifest, PatchTable
from engrampool_server.files.safetensors_header import DATA_ALIGNMENT, encode_header
from engrampool_server.files.sources import Location
from engrampool_server.files.staging import Staging, staging
from engrampool_server.files.table_files import ROWS_TENSOR, Block, PackedModel
from engrampool_server.files.table_writer import BLOCK_BYTES, write_at
from engrampool_server.telemetry.progress import byte_progress

# By layer: ids, uint64 [n], ascending; rows, uint8 [n, row_bytes].
Changed = Mapping[int, tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]

# Blocks compared for each thread before what differs is written.
_BATCH = 4


class PatchError(EngrampoolError):
    """There is no patch to make of this; the text says why and what to do."""


def patch(base: Location, new: Location, out: Path, *, block_bytes: int = BLOCK_BYTES, quiet: bool = True) -> str:
    """Write as `out` the patch that makes the packed model `new` of the packed model `base`; returns its version.

    Blocks of which both manifests say the same are not read. Memory stays bounded whatever the size: some blocks for
    each CPU. What differs lies on the disk of `out` twice until it is whole.

    Raises PatchError if they are not of one specification, if no row differs or more than half of them, TableFileError
    if either is damaged or no packed model, SourceError for a URL that cannot be used, and OutputError if `out` exists
    or cannot be written.
    """
    with PackedModel.open(base) as before, PackedModel.open(new) as after:
        if before.spec.digest != after.spec.digest:
            raise PatchError(
                f"{new} is not of the specification of {base} (`engrampool inspect` shows both); a patch changes rows, "
                f"nothing else: publish {new} under a name of its own"
            )
        with staging(out, {"base": before.version, "new": after.version}) as stage:
            with byte_progress("comparing", before.spec.nbytes, quiet=quiet) as bar:
                changed = _compare(before, after, stage.directory, bar.update)
            if not changed:
                raise PatchError(f"no row of {new} differs from {base}: there is nothing to patch")
            with byte_progress("writing", _nbytes(changed), quiet=quiet) as bar:
                return _write(stage, before, changed, block_bytes, bar.update)


def write_patch(base: PackedModel, changed: Changed, out: Path, *, block_bytes: int = BLOCK_BYTES) -> str:
    """Write as `out` the patch that gives these rows of `base` other bytes; returns its version.

    changed: by layer, ids, uint64 [n], ascending, each once, and rows, uint8 [n, row_bytes]; layers without changes
    may be left out. They may be maps of files: they are read block by block.
    block_bytes: bytes under one checksum.

    Raises PatchError if `changed` is not that or has no rows, SpecError for a layer that is not there, OutputError if
    `out` exists or cannot be written.
    """
    changed = {layer: changed[layer] for layer in sorted(changed) if len(changed[layer][0])}
    if not changed:
        raise PatchError("no rows were given: there is nothing to patch")
    for layer, (ids, rows) in changed.items():
        table = base.spec.table(layer)
        typed = ids.dtype == np.uint64 and rows.dtype == np.uint8
        if not typed or ids.ndim != 1 or rows.shape != (len(ids), table.row_bytes):
            raise PatchError(
                f"layer {layer} takes ids uint64 [n] and rows uint8 [n, {table.row_bytes}]; these are "
                f"{ids.dtype} {list(ids.shape)} and {rows.dtype} {list(rows.shape)}"
            )
        if ids[-1] >= table.num_rows or not (ids[:-1] < ids[1:]).all():
            raise PatchError(f"the ids of layer {layer} must ascend, each once, and be below {table.num_rows}")
        if len(ids) > MAX_CHANGED:
            raise PatchError(
                f"{len(ids)} rows of layer {layer} are given; a patch has at most {MAX_CHANGED} of a layer"
            )
    with staging(out, {"base": base.version}) as stage:
        return _write(stage, base, changed, block_bytes, lambda _: None)


def _nbytes(changed: Changed) -> int:
    return sum(ids.nbytes + rows.nbytes for ids, rows in changed.values())


# --- comparing


def _compare(before: PackedModel, after: PackedModel, spool: Path, progress: Callable[[int], object]) -> Changed:
    """What differs, as maps of files in the directory `spool` that have no name."""
    left = sum(table.num_rows for table in before.spec.tables) // 2
    changed = {}
    threads = len(os.sched_getaffinity(0)) * max(before.reads_per_thread, after.reads_per_thread)
    with ThreadPoolExecutor(threads, "compare") as pool:
        for table in before.spec.tables:
            with TemporaryFile(dir=spool) as ids_file, TemporaryFile(dir=spool) as rows_file:
                count = 0
                for ids, rows in _differing(before, after, table, pool, threads * _BATCH, progress):
                    ids_file.write(ids.data)
                    rows_file.write(rows.data)
                    count += len(ids)
                    if count > min(left, MAX_CHANGED):
                        raise PatchError(
                            f"too many rows of {after.directory} differ from {before.directory} (more than half, or "
                            f"{MAX_CHANGED} of a layer) for a patch to spare much: publish {after.directory} itself"
                        )
                left -= count
                if count:
                    ids_file.flush()
                    rows_file.flush()
                    changed[table.layer] = (
                        np.memmap(ids_file, np.uint64, "r", shape=(count,)),
                        np.memmap(rows_file, np.uint8, "r", shape=(count, table.row_bytes)),
                    )
    return changed


def _differing(
    before: PackedModel,
    after: PackedModel,
    table: TableSpec,
    pool: ThreadPoolExecutor,
    batch: int,
    progress: Callable[[int], object],
) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]:
    """Ids and new rows of what differs, in order of ids, `batch` blocks at a time."""
    ours, theirs = before.blocks(table.layer), after.blocks(table.layer)
    same = {(block.start, block.stop, block.checksum) for block in ours}.intersection(
        (block.start, block.stop, block.checksum) for block in theirs
    )
    # The larger blocks are read once each; of the others those that two of them share are read twice.
    blocks = min(ours, theirs, key=len)

    def compare(block: Block) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]] | None:
        if (block.start, block.stop, block.checksum) in same:
            return None
        old, new = np.empty((2, block.stop - block.start, table.row_bytes), np.uint8)
        _read_rows(before, ours, block.start, old)
        _read_rows(after, theirs, block.start, new)
        at = np.flatnonzero((old != new).any(axis=1))
        return ((at + block.start).astype(np.uint64), new[at]) if len(at) else None

    for start in range(0, len(blocks), batch):
        for block, found in zip(blocks[start:], pool.map(compare, blocks[start : start + batch]), strict=False):
            if found is not None:
                yield found
            progress((block.stop - block.start) * table.row_bytes)


def _read_rows(model: PackedModel, blocks: Sequence[Block], start: int, out: npt.NDArray[np.uint8]) -> None:
    """Read the rows of a table from `start` on. blocks: all of the table."""
    step = blocks[0].stop
    for block in blocks[start // step : -(-(start + len(out)) // step)]:
        wanted = out[max(block.start - start, 0) : block.stop - start]
        if len(wanted) == block.stop - block.start:
            model.read_block(block, wanted)
        else:
            everything = np.empty((block.stop - block.start, out.shape[1]), np.uint8)
            model.read_block(block, everything)
            wanted[:] = everything[max(start - block.start, 0) :][: len(wanted)]


# --- writing


def _write(
    stage: Staging, base: PackedModel, changed: Changed, block_bytes: int, progress: Callable[[int], object]
) -> str:
    margin = 64 << 20  # manifest, journal, headers
    stage.require_space(_nbytes(changed) + margin)
    tables = []
    for layer, (ids, rows) in changed.items():
        table = base.spec.table(layer)
        block_rows = max(1, block_bytes // (ID_BYTES + table.row_bytes))
        name = f"{table.name}-changed.safetensors"
        checksums = _write_file(stage.directory / name, ids, rows, block_rows, progress)
        first_ids = tuple(map(int, ids[::block_rows]))
        last_ids = (*map(int, ids[block_rows - 1 : -1 : block_rows]), int(ids[-1]))
        tables.append(
            PatchTable(layer, len(ids), block_rows, tuple(checksums), first_ids, last_ids, name, DATA_ALIGNMENT)
        )
    manifest = PatchManifest(base.version, base.spec, tuple(tables))
    stage.write(MANIFEST_NAME, manifest.encode())
    stage.publish()
    return manifest.version


def _write_file(
    path: Path,
    ids: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.uint8],
    block_rows: int,
    progress: Callable[[int], object],
) -> list[str]:
    """Checksums of the blocks."""
    header, tensors = encode_header([(IDS_TENSOR, "U64", ids.shape), (ROWS_TENSOR, "U8", rows.shape)])
    offsets = [tensor.offset for tensor in tensors]
    assert offsets[0] == DATA_ALIGNMENT
    arrays: Sequence[npt.NDArray[Any]] = (ids, rows)
    checksums = []
    with path.open("wb", buffering=0) as output:
        write_at(output.fileno(), memoryview(header), 0)
        for start in range(0, len(ids), block_rows):
            hasher = xxhash.xxh3_64()
            nbytes = 0
            for at, array in enumerate(arrays):
                data = np.ascontiguousarray(array[start : start + block_rows]).data.cast("B")
                hasher.update(data)
                write_at(output.fileno(), data, offsets[at])
                offsets[at] += len(data)
                nbytes += len(data)
            checksums.append(hasher.hexdigest())
            progress(nbytes)
        os.fsync(output.fileno())
    return checksums
