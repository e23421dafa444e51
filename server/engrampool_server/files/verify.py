"""`engrampool verify` and `inspect`: what a packed model or patch is, and whether every block is what it was."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_server.files.manifest import TableFileError
from engrampool_server.files.model_files import Check, ModelFiles
from engrampool_server.files.patches.patch_files import PatchFiles
from engrampool_server.files.table_files import PackedModel


def damaged_blocks(
    model: ModelFiles, progress: Callable[[int], object], threads: int | None = None
) -> list[TableFileError]:
    """Read every block, on `threads` (one a CPU by default); returns one error for each that is damaged.

    progress: called with the bytes of each block, from the calling thread.
    """
    buffers = threading.local()

    def read(one: tuple[int, Check]) -> TableFileError | None:
        nbytes, check = one
        buffer: npt.NDArray[np.uint8] | None = getattr(buffers, "block", None)
        if buffer is None or buffer.size < nbytes:
            buffer = buffers.block = np.empty(nbytes, np.uint8)
        try:
            check(buffer[:nbytes])
        except TableFileError as error:
            return error
        return None

    errors = []
    checks = model.checks()
    threads = threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads * model.reads_per_thread) as pool:
        for (nbytes, _), error in zip(checks, pool.map(read, checks), strict=True):
            progress(nbytes)
            if error is not None:
                errors.append(error)
    return errors


def summary(model: PackedModel | PatchFiles) -> dict[str, Any]:
    """What the model or patch is, as JSON types, without the long lists (token map, head sizes, checksums)."""
    return _summary_of_patch(model) if isinstance(model, PatchFiles) else _summary(model)


def _summary_of_patch(patch: PatchFiles) -> dict[str, Any]:
    return {
        "name": patch.spec.name,
        "version": patch.version,
        "base": patch.base_version,
        "nbytes": patch.nbytes,
        "tables": [
            {
                "layer": layer,
                "num_rows": patch.spec.table(layer).num_rows,
                "num_changed": patch.num_changed(layer),
                "row_bytes": patch.spec.table(layer).row_bytes,
                "num_blocks": len(patch.blocks(layer)),
                "file": patch.blocks(layer)[0].file,
            }
            for layer in patch.layers
        ],
    }


def _summary(model: PackedModel) -> dict[str, Any]:
    token_map = model.spec.token_map
    return {
        "name": model.spec.name,
        "version": model.version,
        "nbytes": model.spec.nbytes,
        "num_files": len(model.files),
        "vocab_size": model.spec.vocab_size,
        "lookback": model.spec.lookback,
        "token_map": None if token_map is None else {"size": token_map.size, "digest": token_map.digest},
        "tables": [
            {
                "layer": table.layer,
                "num_rows": table.num_rows,
                "row_bytes": table.row_bytes,
                "nbytes": table.nbytes,
                "row_format": table.row_format.to_json(),
                "scale": table.scale,
                "heads": table.heads,
                "hash_family": table.hash.FAMILY,
                "num_blocks": len(model.blocks(table.layer)),
                "files": sorted({block.file for block in model.blocks(table.layer)}),
            }
            for table in model.spec.tables
        ],
    }


def summary_text(model: PackedModel | PatchFiles) -> str:
    """The same, for people."""
    facts = summary(model)
    if isinstance(model, PatchFiles):
        lines = [
            f"patch    of {facts['name']}",
            f"version  {facts['version']}",
            f"base     {facts['base']}",
            f"changes  {_bytes(facts['nbytes'])}",
        ]
        for table in facts["tables"]:
            part = f"{table['num_changed']} of {table['num_rows']} rows, {table['num_blocks']} blocks"
            lines.append(f"layer {table['layer']}: {part}")
        return "\n".join(lines)
    token_map = facts["token_map"]
    mapped = f", mapped to {token_map['size']} (digest {token_map['digest']})" if token_map else ", hashed as they are"
    lines = [
        f"model    {facts['name']}",
        f"version  {facts['version']}",
        f"rows     {_bytes(facts['nbytes'])} in {facts['num_files']} files",
        f"tokens   ids below {facts['vocab_size']}{mapped}; {facts['lookback']} looked back on",
    ]
    for table in facts["tables"]:
        segments = " + ".join(f"{s['name']} {s['dtype']} x {s['length']}" for s in table["row_format"])
        scale = "" if table["scale"] is None else f", times {table['scale']:g}"
        lines += [
            "",
            f"layer {table['layer']}",
            f"  rows   {table['num_rows']} of {table['row_bytes']} bytes: {segments}{scale}",
            f"  hash   {table['hash_family']}, {table['heads']} heads",
            f"  files  {len(table['files'])}, {table['num_blocks']} blocks, {_bytes(table['nbytes'])}",
        ]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
