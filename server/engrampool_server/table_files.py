"""Reads a packed model: a directory of manifest.json and safetensors files, every block under a checksum."""

from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_server.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, TableFile, TableFileError
from engrampool_server.safetensors_header import HeaderError, Tensor, header_of
from engrampool_server.sources import File, Location, NotThereError, ReadError, Source, open_source
from engrampool_server.staging import JOURNAL_NAME, PARTIAL_SUFFIX

__all__ = ["ROWS_TENSOR", "Block", "PackedModel", "TableFileError"]

ROWS_TENSOR = "rows"  # U8 [rows of the file, row_bytes]
_ADVICE = "copy it again from where it was packed, or pack the model again"
_REPLACED = f"{MANIFEST_NAME} was replaced since it was read, so another model is being put in its place; start again"


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [start, stop) of a layer's table: the `index`-th piece that has a checksum of its own.

    offset: byte of the file `file` where row `start` begins.
    checksum: xxh3-64 of the rows' bytes, 16 hexadecimal digits.
    """

    layer: int
    index: int
    start: int
    stop: int
    file: str
    offset: int
    checksum: str


class PackedModel:
    """An open packed model. Reading is safe from several threads; `close` it (or leave its `with`) after the last.

    directory: where it lies, here or in an object store.
    spec, version: what it is; the version is a digest over specification and all block checksums.
    reads_per_thread: how many blocks each thread should read at a time, more than one where that takes waiting.
    """

    def __init__(
        self, directory: Location, manifest: Manifest, source: Source, stamp: Hashable, opened: dict[str, File]
    ) -> None:
        self.directory = directory
        self.spec: ModelSpec = manifest.spec
        self.version = manifest.version
        self.reads_per_thread = source.reads_per_thread
        self._source, self._stamp, self._opened = source, stamp, opened
        self._files = tuple(file for table in manifest.tables for file in table.files)
        self._blocks = {
            table.layer: tuple(_blocks(spec, table.block_rows, table.checksums, table.files))
            for table, spec in zip(manifest.tables, manifest.spec.tables, strict=True)
        }

    @classmethod
    def open(cls, directory: Location) -> "PackedModel":
        """Open the files and check everything but the rows: manifest, version, each file's size and header.

        Raises TableFileError naming the file and what is wrong with it, SourceError for a URL that cannot be used.
        """
        source = open_source(directory)
        # The journal goes only after the rename: until then even a directory with its manifest is unfinished.
        if directory.name.endswith(PARTIAL_SUFFIX):
            with suppress(NotThereError):
                source.open(JOURNAL_NAME).close()
                raise TableFileError(f"{directory} was not finished; run the command that began it again")
        path = directory / MANIFEST_NAME
        try:
            with closing(source.open(MANIFEST_NAME)) as manifest_file:
                stamp, raw = manifest_file.stamp, _read_head(manifest_file, MAX_MANIFEST_BYTES + 1)
        except NotThereError as error:
            raise TableFileError(
                f"{directory} is no packed model: there is no {MANIFEST_NAME} in it ({error}); see `engrampool pack`"
            ) from error
        except ReadError as error:
            raise TableFileError(f"{path} cannot be read: {error}") from error
        try:
            manifest = Manifest.decode(raw)
        except TableFileError as error:
            raise TableFileError(f"{path} {error}; {_ADVICE}") from error
        tables = zip(manifest.tables, manifest.spec.tables, strict=True)
        wanted = [(file, spec) for table, spec in tables for file in table.files]
        opened: dict[str, File] = {}

        def open_one(one: tuple[TableFile, TableSpec]) -> File:
            return _open(source, directory, *one)

        try:
            with ThreadPoolExecutor(source.reads_per_thread, "open") as pool:
                # Where each takes a round trip or two, not one after the other.
                files = (map if source.reads_per_thread == 1 else pool.map)(open_one, wanted)
                for (table_file, _), file in zip(wanted, files, strict=True):
                    opened[table_file.name] = file
        except BaseException:
            _close(opened)
            raise
        return cls(directory, manifest, source, stamp, opened)

    @property
    def files(self) -> Sequence[TableFile]:
        """All files, in order of layer and row."""
        return self._files

    def blocks(self, layer: int) -> Sequence[Block]:
        """The blocks of a layer's table, in order of rows. Raises SpecError if there is no such layer."""
        return self._blocks[self.spec.table(layer).layer]

    def read_block(self, block: Block, out: npt.NDArray[np.uint8]) -> None:
        """Read the rows of `block` straight into `out`, uint8 [stop - start, row_bytes], C-contiguous.

        Raises TableFileError if they cannot be read or are not what the manifest says (`out` then holds what was
        found, which must not be used), ValueError for an `out` of another shape.
        """
        shape = (block.stop - block.start, self.spec.table(block.layer).row_bytes)
        if out.dtype != np.uint8 or out.shape != shape or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous uint8 {list(shape)}; it is {out.dtype} {list(out.shape)}")
        file = self._opened.get(block.file)
        if file is None:
            raise TableFileError(f"{self.directory} was closed before {_describe(block)} was read")
        view = out.data.cast("B")
        found = self._read(file, block, view)
        if found != block.checksum and not isinstance(self.directory, Path):
            found = self._read(file, block, view)  # it may have been damaged on its way, or by a proxy
        if found != block.checksum:
            raise self._damaged(block, f"has checksum {found}, the manifest says {block.checksum}")

    def _read(self, file: File, block: Block, view: memoryview) -> str:
        """The checksum of what was read."""
        try:
            missing = len(view) - file.read(block.offset, view)
        except ReadError as error:
            raise self._damaged(block, f"cannot be read ({error})") from error
        if missing:
            raise self._damaged(block, f"ends {missing} bytes too early")
        return xxhash.xxh3_64_hexdigest(view)

    def drop_cached(self, block: Block) -> None:
        """Have the page cache forget what `read_block` read."""
        length = (block.stop - block.start) * self.spec.table(block.layer).row_bytes
        self._opened[block.file].drop_cached(block.offset, length)

    def _damaged(self, block: Block, problem: str) -> TableFileError:
        advice = _REPLACED if self._replaced() else _ADVICE
        return TableFileError(f"{self.directory / block.file}: {_describe(block)} {problem}; {advice}")

    def _replaced(self) -> bool:
        """Whether the manifest is another by now, as far as can be found out."""
        try:
            with closing(self._source.open(MANIFEST_NAME)) as file:
                return file.stamp != self._stamp
        except ReadError as error:
            return isinstance(error, NotThereError)

    def close(self) -> None:
        """Close the files; no read may be under way. A second call does nothing."""
        _close(self._opened)
        self._source.close()

    def __enter__(self) -> "PackedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _describe(block: Block) -> str:
    return f"layer {block.layer} block {block.index} (rows {block.start} .. {block.stop - 1})"


def _blocks(spec: TableSpec, block_rows: int, checksums: Sequence[str], files: Sequence[TableFile]) -> Iterator[Block]:
    for file in files:
        for start in range(file.start, file.stop, block_rows):
            index, stop = start // block_rows, min(start + block_rows, file.stop)
            offset = file.data_offset + (start - file.start) * spec.row_bytes
            yield Block(spec.layer, index, start, stop, file.name, offset, checksums[index])


def _open(source: Source, directory: Location, expected: TableFile, spec: TableSpec) -> File:
    path = directory / expected.name
    try:
        file = source.open(expected.name)
    except ReadError as error:
        raise TableFileError(f"{path}, with {spec.name}, cannot be opened: {error}; {_ADVICE}") from error

    try:
        rows = (expected.stop - expected.start, spec.row_bytes)
        wanted = Tensor(ROWS_TENSOR, "U8", rows, expected.data_offset, rows[0] * rows[1])
        found = header_of(file.size, lambda nbytes: _read_head(file, nbytes))
        if found != {ROWS_TENSOR: wanted}:
            raise HeaderError(f"holds {list(found.values())}, the manifest says {wanted}")
    except (HeaderError, ReadError) as error:
        file.close()
        raise TableFileError(f"{path} {error}; {_ADVICE}") from error
    return file


def _read_head(file: File, nbytes: int) -> bytes:
    raw = bytearray(min(file.size, nbytes))
    return bytes(raw[: file.read(0, memoryview(raw))])


def _close(opened: dict[str, File]) -> None:
    while opened:
        opened.popitem()[1].close()
