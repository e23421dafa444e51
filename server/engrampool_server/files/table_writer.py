"""Writes packed models: rows from any source, block by block, in bounded memory, whole or not at all."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_server.files.manifest import MANIFEST_NAME, Manifest, ManifestTable, TableFile
from engrampool_server.files.safetensors_header import DATA_ALIGNMENT, encode_header
from engrampool_server.files.staging import Staging, staging
from engrampool_server.files.table_files import ROWS_TENSOR
from engrampool_server.telemetry.progress import byte_progress

BLOCK_BYTES = 4 << 20
FILE_BYTES = 2 << 30

# fill(table, start, out): write rows start .. start + len(out) into `out`, uint8 [n, row_bytes]. From several threads.
Fill = Callable[[TableSpec, int, npt.NDArray[np.uint8]], None]


def write_tables(
    out: Path,
    spec: ModelSpec,
    source: Mapping[str, Any],
    fill: Fill,
    *,
    file_bytes: int = FILE_BYTES,
    block_bytes: int = BLOCK_BYTES,
    quiet: bool = True,
) -> str:
    """Write the packed model `out` with the rows that `fill` gives; returns its version.

    source: JSON types that tell where the rows come from; an interrupted run is taken up if it is the same.
    file_bytes: a file's largest size, unless one block is larger. block_bytes: bytes under one checksum.

    Raises OutputError if `out` exists or cannot be written, and whatever `fill` raises.
    """
    # A version must not depend on the machine, and so blocks must not.
    plan = {table.layer: _plan(table, file_bytes, max(1, block_bytes // table.row_bytes)) for table in spec.tables}
    settings = {"model": spec.digest, "file_bytes": file_bytes, "block_bytes": block_bytes}
    with staging(out, {**source, **settings}) as stage:
        done = sum(
            (file.stop - file.start) * table.row_bytes
            for table in spec.tables
            for file in plan[table.layer]
            if file.name in stage.finished
        )
        margin = 64 << 20  # manifest, journal, headers
        stage.require_space(spec.nbytes - done + margin)
        threads = len(os.sched_getaffinity(0))
        with byte_progress("writing", spec.nbytes, done, quiet) as bar, ThreadPoolExecutor(threads) as pool:
            writer = _FileWriter(stage, fill, pool, bar.update)
            tables = []
            for table in spec.tables:
                rows = max(1, block_bytes // table.row_bytes)
                checksums = [c for file in plan[table.layer] for c in writer.write(file, table, rows)]
                tables.append(ManifestTable(table.layer, rows, tuple(checksums), tuple(plan[table.layer])))
        manifest = Manifest(spec, tuple(tables))
        stage.write(MANIFEST_NAME, manifest.encode())
        stage.publish()
    return manifest.version


def _plan(table: TableSpec, file_bytes: int, block_rows: int) -> list[TableFile]:
    """The files of a table, cut between blocks."""
    blocks = max(1, (file_bytes - DATA_ALIGNMENT) // (block_rows * table.row_bytes))
    starts = range(0, table.num_rows, blocks * block_rows)
    return [
        TableFile(
            name=f"{table.name}-{number:05}-of-{len(starts):05}.safetensors",
            start=start,
            stop=min(start + starts.step, table.num_rows),
            data_offset=DATA_ALIGNMENT,
        )
        for number, start in enumerate(starts, start=1)
    ]


class _FileWriter:
    """Fills, checksums and writes the blocks of a file in parallel; each thread owns one block's buffer."""

    def __init__(self, stage: Staging, fill: Fill, pool: ThreadPoolExecutor, progress: Callable[[int], object]) -> None:
        self._stage, self._fill, self._pool, self._progress = stage, fill, pool, progress
        self._buffers = threading.local()

    def write(self, file: TableFile, table: TableSpec, block_rows: int) -> list[str]:
        """Checksums of the file's blocks; it is written unless the journal has it."""
        if file.name in self._stage.finished:
            return self._stage.finished[file.name]
        header, (tensor,) = encode_header([(ROWS_TENSOR, "U8", (file.stop - file.start, table.row_bytes))])
        assert tensor.offset == file.data_offset
        with (self._stage.directory / file.name).open("wb", buffering=0) as output:
            write_at(output.fileno(), memoryview(header), 0)
            checksums = list(self._write_blocks(output.fileno(), file, table, block_rows))
            os.fsync(output.fileno())
        self._stage.record(file.name, checksums)
        return checksums

    def _write_blocks(self, descriptor: int, file: TableFile, table: TableSpec, block_rows: int) -> Iterator[str]:
        def write_block(start: int) -> tuple[str, int]:
            count = min(block_rows, file.stop - start)
            rows = self._buffer(block_rows * table.row_bytes)[: count * table.row_bytes].reshape(count, -1)
            self._fill(table, start, rows)
            data = rows.data.cast("B")
            write_at(descriptor, data, file.data_offset + (start - file.start) * table.row_bytes)
            return xxhash.xxh3_64_hexdigest(data), len(data)

        for checksum, nbytes in self._pool.map(write_block, range(file.start, file.stop, block_rows)):
            self._progress(nbytes)
            yield checksum

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        buffer: npt.NDArray[np.uint8] | None = getattr(self._buffers, "block", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._buffers.block = np.empty(nbytes, np.uint8)
        return buffer


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`, as often as the system writes only a part."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
