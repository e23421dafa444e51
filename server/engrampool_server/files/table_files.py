"""Reads a packed model: a directory of manifest.json and safetensors files, every block under a checksum."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_server.files.manifest import Manifest, TableFile, TableFileError
from engrampool_server.files.model_files import Check, ModelFiles, Wanted, open_files, open_manifest
from engrampool_server.files.safetensors_header import Tensor
from engrampool_server.files.sources import File, Location, Source

__all__ = ["ROWS_TENSOR", "Block", "PackedModel", "TableFileError"]

ROWS_TENSOR = "rows"  # U8 [rows of the file, row_bytes]


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


class PackedModel(ModelFiles):
    """An open packed model.

    spec, version: what it is; the version is a digest over specification and all block checksums.
    """

    def __init__(
        self, directory: Location, manifest: Manifest, source: Source, stamp: Hashable, opened: dict[str, File]
    ) -> None:
        super().__init__(directory, source, stamp, opened)
        self.spec: ModelSpec = manifest.spec
        self.version = manifest.version
        self._files = tuple(file for table in manifest.tables for file in table.files)
        self._blocks = {
            table.layer: tuple(_blocks(spec, table.block_rows, table.checksums, table.files))
            for table, spec in zip(manifest.tables, manifest.spec.tables, strict=True)
        }

    @classmethod
    def open(cls, directory: Location) -> Self:
        """Open the files and check everything but the rows: manifest, version, each file's size and header.

        Raises TableFileError naming the file and what is wrong with it, IsPatchError if it is a patch, SourceError for
        a URL that cannot be used.
        """
        source, stamp, manifest = open_manifest(directory, Manifest.decode)
        tables = zip(manifest.tables, manifest.spec.tables, strict=True)
        wanted = [_wanted(file, spec) for table, spec in tables for file in table.files]
        return cls(directory, manifest, source, stamp, open_files(source, directory, wanted))

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.spec.nbytes

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
        self.fill(block.file, [(block.offset, out.data.cast("B"))], block.checksum, _describe(block))

    def checks(self) -> Sequence[tuple[int, Check]]:
        """As of `ModelFiles`, in order of layer and row."""
        return [self._check(block) for layer in self.spec.layers for block in self.blocks(layer)]

    def _check(self, block: Block) -> tuple[int, Check]:
        shape = (block.stop - block.start, self.spec.table(block.layer).row_bytes)
        return shape[0] * shape[1], lambda scratch: self.read_block(block, scratch.reshape(shape))

    def drop_cached(self, block: Block) -> None:
        """Have the page cache forget what `read_block` read."""
        length = (block.stop - block.start) * self.spec.table(block.layer).row_bytes
        self.forget(block.file, block.offset, length)


def _describe(block: Block) -> str:
    return f"layer {block.layer} block {block.index} (rows {block.start} .. {block.stop - 1})"


def _blocks(spec: TableSpec, block_rows: int, checksums: Sequence[str], files: Sequence[TableFile]) -> Iterator[Block]:
    for file in files:
        for start in range(file.start, file.stop, block_rows):
            index, stop = start // block_rows, min(start + block_rows, file.stop)
            offset = file.data_offset + (start - file.start) * spec.row_bytes
            yield Block(spec.layer, index, start, stop, file.name, offset, checksums[index])


def _wanted(file: TableFile, spec: TableSpec) -> Wanted:
    rows = (file.stop - file.start, spec.row_bytes)
    return Wanted(file.name, spec.name, [Tensor(ROWS_TENSOR, "U8", rows, file.data_offset, rows[0] * rows[1])])
