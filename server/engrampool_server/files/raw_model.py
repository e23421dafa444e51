"""A checkpoint that is served as it is: the same rows, blocks and version as packing it would give."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_server.files.checkpoint import Checkpoint
from engrampool_server.files.manifest import MANIFEST_NAME, Manifest, ManifestTable
from engrampool_server.files.sources import Location
from engrampool_server.files.table_files import Block
from engrampool_server.files.table_writer import BLOCK_BYTES


class RawModel:
    """An open checkpoint, read as `PackedModel` is. Its checksums are what was read: there is nothing to compare with.

    directory: where it lies. files: names of those with tensors that are read. reads_per_thread: as of `PackedModel`.
    """

    reads_per_thread = 1

    def __init__(self, directory: Path, block_bytes: int = BLOCK_BYTES) -> None:
        """Read config, tokenizer and headers; no rows. Raises CheckpointError."""
        self.directory = directory
        self._checkpoint = Checkpoint.open(directory)
        self.spec = self._checkpoint.spec
        self.files: Sequence[str] = [str(name) for name, *_ in self._checkpoint.source["checkpoint files"]]
        self._block_rows = {table.layer: max(1, block_bytes // table.row_bytes) for table in self.spec.tables}
        self._checksums = {layer: [""] * len(self.blocks(layer)) for layer in self.spec.layers}

    @staticmethod
    def lies_in(directory: Location) -> TypeGuard[Path]:
        """Whether `directory` holds a checkpoint, and no packed model. One in an object store is to be packed first."""
        if not isinstance(directory, Path):
            return False
        try:
            return (directory / "config.json").is_file() and not (directory / MANIFEST_NAME).exists()
        except PermissionError:  # who opens it as a packed model will say so
            return False

    @property
    def version(self) -> str | None:
        """As of the packed model; None until every block was read."""
        if not all(all(checksums) for checksums in self._checksums.values()):
            return None
        tables = [
            ManifestTable(layer, self._block_rows[layer], tuple(self._checksums[layer]), ())
            for layer in self.spec.layers
        ]
        return Manifest(self.spec, tuple(tables)).version

    def blocks(self, layer: int) -> Sequence[Block]:
        """The blocks of a layer's table, in order of rows. Raises SpecError if there is no such layer."""
        table, rows = self.spec.table(layer), self._block_rows[layer]
        return [
            Block(layer, index, start, min(start + rows, table.num_rows), "", 0, "")
            for index, start in enumerate(range(0, table.num_rows, rows))
        ]

    def read_block(self, block: Block, out: npt.NDArray[np.uint8]) -> None:
        """Assemble the rows of `block` in `out`, uint8 [stop - start, row_bytes], C-contiguous. From any thread.

        Raises CheckpointError if they cannot be read.
        """
        self._checkpoint.read_rows(self.spec.table(block.layer), block.start, out)
        self._checksums[block.layer][block.index] = xxhash.xxh3_64_hexdigest(out.data.cast("B"))

    def close(self) -> None:
        """Close the files; no read may be under way. A second call does nothing."""
        self._checkpoint.close()
