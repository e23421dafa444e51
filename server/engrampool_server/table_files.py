"""Reads a packed model: a directory of manifest.json and safetensors files, every block under a checksum."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_server.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, TableFile, TableFileError
from engrampool_server.safetensors_header import HeaderError, Tensor, read_header
from engrampool_server.staging import JOURNAL_NAME, PARTIAL_SUFFIX

__all__ = ["ROWS_TENSOR", "Block", "PackedModel", "TableFileError"]

ROWS_TENSOR = "rows"  # U8 [rows of the file, row_bytes]
_ADVICE = "copy it again from where it was packed, or pack the model again"


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

    directory: where it lies.
    spec, version: what it is; the version is a digest over specification and all block checksums.
    """

    def __init__(self, directory: Path, manifest: Manifest, descriptors: dict[str, int]) -> None:
        self.directory = directory
        self.spec: ModelSpec = manifest.spec
        self.version = manifest.version
        self._descriptors = descriptors
        self._files = tuple(file for table in manifest.tables for file in table.files)
        self._blocks = {
            table.layer: tuple(_blocks(spec, table.block_rows, table.checksums, table.files))
            for table, spec in zip(manifest.tables, manifest.spec.tables, strict=True)
        }

    @classmethod
    def open(cls, directory: Path) -> "PackedModel":
        """Open the files and check everything but the rows: manifest, version, each file's size and header.

        Raises TableFileError naming the file and what is wrong with it.
        """
        # The journal goes only after the rename: until then even a directory with its manifest is unfinished.
        if directory.name.endswith(PARTIAL_SUFFIX) and (directory / JOURNAL_NAME).exists():
            raise TableFileError(f"{directory} was not finished; run the command that began it again")
        path = directory / MANIFEST_NAME
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError as error:
            raise TableFileError(
                f"{directory} is no packed model: there is no {MANIFEST_NAME} in it; see `engrampool pack`"
            ) from error
        except OSError as error:
            raise TableFileError(f"{path} cannot be read: {error.strerror}") from error
        try:
            manifest = Manifest.decode(raw)
        except TableFileError as error:
            raise TableFileError(f"{path} {error}; {_ADVICE}") from error
        descriptors: dict[str, int] = {}
        try:
            for table, spec in zip(manifest.tables, manifest.spec.tables, strict=True):
                for table_file in table.files:
                    descriptors[table_file.name] = _open(directory / table_file.name, table_file, spec)
        except BaseException:
            _close(descriptors)
            raise
        return cls(directory, manifest, descriptors)

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
        descriptor = self._descriptors.get(block.file)
        if descriptor is None:
            raise TableFileError(f"{self.directory} was closed before {_describe(block)} was read")
        view = out.data.cast("B")
        done = 0
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], block.offset + done)
                if count == 0:
                    raise self._damaged(block, f"ends {len(view) - done} bytes too early")
                done += count
        except OSError as error:
            raise self._damaged(block, f"cannot be read ({error.strerror})") from error
        found = xxhash.xxh3_64_hexdigest(view)
        if found != block.checksum:
            raise self._damaged(block, f"has checksum {found}, the manifest says {block.checksum}")

    def drop_cached(self, block: Block) -> None:
        """Have the page cache forget what `read_block` read."""
        length = (block.stop - block.start) * self.spec.table(block.layer).row_bytes
        os.posix_fadvise(self._descriptors[block.file], block.offset, length, os.POSIX_FADV_DONTNEED)

    def _damaged(self, block: Block, problem: str) -> TableFileError:
        return TableFileError(f"{self.directory / block.file}: {_describe(block)} {problem}; {_ADVICE}")

    def close(self) -> None:
        """Close the files; no read may be under way. A second call does nothing."""
        _close(self._descriptors)

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


def _open(path: Path, expected: TableFile, spec: TableSpec) -> int:
    try:
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise TableFileError(f"{path} is not a regular file; {_ADVICE}")
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise TableFileError(f"{path}, with {spec.name}, cannot be opened: {error.strerror}; {_ADVICE}") from error
    try:
        rows = (expected.stop - expected.start, spec.row_bytes)
        wanted = Tensor(ROWS_TENSOR, "U8", rows, expected.data_offset, rows[0] * rows[1])
        found = read_header(descriptor)
        if found != {ROWS_TENSOR: wanted}:
            raise HeaderError(f"holds {list(found.values())}, the manifest says {wanted}")
    except (HeaderError, OSError) as error:
        os.close(descriptor)
        raise TableFileError(f"{path} {error}; {_ADVICE}") from error
    return descriptor


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
