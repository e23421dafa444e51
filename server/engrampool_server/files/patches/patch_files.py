"""Reads a patch: the rows that a version of a model has other than its base, every block of them under a checksum."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_server.files.manifest import IsPatchError
from engrampool_server.files.model_files import Check, ModelFiles, Wanted, open_files, open_manifest
from engrampool_server.files.patches.patch_manifest import ID_BYTES, PatchManifest, PatchTable
from engrampool_server.files.safetensors_header import Tensor
from engrampool_server.files.sources import File, Location, Source
from engrampool_server.files.table_files import ROWS_TENSOR, PackedModel

IDS_TENSOR = "ids"  # U64 [changed rows], ascending; ROWS_TENSOR has as many


@dataclass(frozen=True, slots=True)
class PatchBlock:
    """Changed rows [start, stop) of a layer, counted from its first one: the `index`-th piece with a checksum.

    first_id, last_id: of the rows, in the table.
    file, ids_offset, rows_offset: the bytes where the ids and the rows of the block begin.
    checksum: xxh3-64 of the ids' bytes and then the rows', 16 hexadecimal digits.
    """

    layer: int
    index: int
    start: int
    stop: int
    first_id: int
    last_id: int
    file: str
    ids_offset: int
    rows_offset: int
    checksum: str


class PatchFiles(ModelFiles):
    """An open patch.

    spec, version: what its base becomes by it. base_version: of the packed model that it changes.
    nbytes: of all changed rows and their ids.
    """

    def __init__(
        self, directory: Location, manifest: PatchManifest, source: Source, stamp: Hashable, opened: dict[str, File]
    ) -> None:
        super().__init__(directory, source, stamp, opened)
        self.spec: ModelSpec = manifest.spec
        self.version = manifest.version
        self.base_version = manifest.base
        self._blocks = {
            table.layer: tuple(_blocks(table, self.spec.table(table.layer).row_bytes)) for table in manifest.tables
        }
        self.nbytes = sum(nbytes for nbytes, _ in self.checks())

    @classmethod
    def open(cls, directory: Location) -> Self:
        """Open the files and check everything but ids and rows: manifest, version, each file's size and header.

        Raises TableFileError naming the file and what is wrong with it, SourceError for a URL that cannot be used.
        """
        source, stamp, manifest = open_manifest(directory, PatchManifest.decode)
        wanted = [_wanted(table, manifest.spec.table(table.layer)) for table in manifest.tables]
        return cls(directory, manifest, source, stamp, open_files(source, directory, wanted))

    @property
    def layers(self) -> Sequence[int]:
        """Those with changed rows, ascending."""
        return tuple(self._blocks)

    def num_changed(self, layer: int) -> int:
        """How many rows of a layer are changed."""
        blocks = self.blocks(layer)
        return blocks[-1].stop if blocks else 0

    def blocks(self, layer: int) -> Sequence[PatchBlock]:
        """The blocks of a layer's changed rows, in order of ids; maybe none. Raises SpecError for no such layer."""
        return self._blocks.get(self.spec.table(layer).layer, ())

    def read_block(self, block: PatchBlock, ids: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint8]) -> None:
        """Read a block into `ids`, uint64 [stop - start], and `rows`, uint8 [stop - start, row_bytes], C-contiguous.

        Raises TableFileError if they cannot be read or are not what the manifest says (both then hold what was found,
        which must not be used), ValueError for arrays of another shape.
        """
        count, width = block.stop - block.start, self._width(block)
        for out, dtype, shape in ((ids, np.uint64, (count,)), (rows, np.uint8, (count, width))):
            if out.dtype != dtype or out.shape != shape or not out.flags.c_contiguous:
                wanted = f"C-contiguous {np.dtype(dtype)} {list(shape)}"
                raise ValueError(f"ids or rows must be {wanted}; they are {out.dtype} {list(out.shape)}")
        what = f"layer {block.layer} block {block.index} (changed rows {block.first_id} .. {block.last_id})"
        pieces = [(block.ids_offset, ids.data.cast("B")), (block.rows_offset, rows.data.cast("B"))]
        self.fill(block.file, pieces, block.checksum, what)
        if (ids[0], ids[-1]) != (block.first_id, block.last_id) or not (ids[:-1] < ids[1:]).all():
            raise self.damaged(block.file, f"{what} has ids that do not ascend from the first to the last of these")

    def checks(self) -> Sequence[tuple[int, Check]]:
        """As of `ModelFiles`, in order of layer and id."""
        return [self._check(block) for blocks in self._blocks.values() for block in blocks]

    def _check(self, block: PatchBlock) -> tuple[int, Check]:
        count, width = block.stop - block.start, self._width(block)

        def check(scratch: npt.NDArray[np.uint8]) -> None:
            ids, rows = scratch[: count * ID_BYTES], scratch[count * ID_BYTES :]
            self.read_block(block, ids.view(np.uint64), rows.reshape(count, width))

        return count * (ID_BYTES + width), check

    def _width(self, block: PatchBlock) -> int:
        return self.spec.table(block.layer).row_bytes


def open_any(location: Location) -> PackedModel | PatchFiles:
    """Open whichever of the two lies there. Raises TableFileError, SourceError."""
    try:
        return PackedModel.open(location)
    except IsPatchError:
        return PatchFiles.open(location)


def _blocks(table: PatchTable, row_bytes: int) -> Iterator[PatchBlock]:
    rows_offset = table.data_offset + table.num_changed * ID_BYTES
    for index, start in enumerate(range(0, table.num_changed, table.block_rows)):
        yield PatchBlock(
            layer=table.layer,
            index=index,
            start=start,
            stop=min(start + table.block_rows, table.num_changed),
            first_id=table.first_ids[index],
            last_id=table.last_ids[index],
            file=table.file,
            ids_offset=table.data_offset + start * ID_BYTES,
            rows_offset=rows_offset + start * row_bytes,
            checksum=table.checksums[index],
        )


def _wanted(table: PatchTable, spec: TableSpec) -> Wanted:
    count, width = table.num_changed, spec.row_bytes
    ids = Tensor(IDS_TENSOR, "U64", (count,), table.data_offset, count * ID_BYTES)
    rows = Tensor(ROWS_TENSOR, "U8", (count, width), table.data_offset + ids.nbytes, count * width)
    return Wanted(table.file, spec.name, [ids, rows])
