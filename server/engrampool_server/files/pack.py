"""`engrampool pack`: streams a checkpoint's tables into a packed model."""

from pathlib import Path

from engrampool_server.files.checkpoint import Checkpoint
from engrampool_server.files.table_writer import BLOCK_BYTES, FILE_BYTES, write_tables


def pack(
    checkpoint: Path,
    out: Path,
    name: str | None = None,
    *,
    eos_token_id: int | None = None,
    file_bytes: int = FILE_BYTES,
    block_bytes: int = BLOCK_BYTES,
    quiet: bool = True,
) -> str:
    """Write the tables of the checkpoint directory as the packed model `out`; returns its version.

    eos_token_id: the token that ends a text, where config.json lists several.

    Memory stays bounded whatever the size: a block and its segments for each CPU. An interrupted run left nothing at
    `out`; called again, it goes on with the first unfinished file.

    Raises CheckpointError, or OutputError if `out` exists or cannot be written. The checkpoint is only read.
    """
    with Checkpoint.open(checkpoint, name, eos_token_id) as source:
        return write_tables(
            out,
            source.spec,
            source.source,
            source.read_rows,
            file_bytes=file_bytes,
            block_bytes=block_bytes,
            quiet=quiet,
        )
