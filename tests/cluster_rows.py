"""Three versions of one model, whose rows tell from their last byte which version they are of."""

from pathlib import Path
from typing import Any

import numpy as np

from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.files.patches.patch import write_patch
from engrampool_server.files.table_files import PackedModel
from engrampool_server.files.table_writer import write_tables

FIRST, SECOND, PATCHED = VERSIONS = ("first", "second", "patched")
# Of the first version's rows, one in so many is another in the patched one.
_PATCHED_EVERY = 100


def rows_of(version: str, table: TableSpec, ids: Any) -> np.ndarray:
    """The rows `ids`, [..., row_bytes]."""
    rows = synthetic_rows(table, ids)
    rows[..., -1] ^= _change(version, ids)
    return rows


def versions_of(table: TableSpec, ids: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """By version, which of `rows` are its rows `ids`: bool [tokens, heads]."""
    difference = rows ^ synthetic_rows(table, ids)
    known = ~difference[..., :-1].any(axis=-1)
    return {version: known & (difference[..., -1] == _change(version, ids)) for version in VERSIONS}


def _change(version: str, ids: Any) -> np.ndarray:
    """By which a last byte is another than in the first version."""
    changed = {FIRST: 0, SECOND: 1, PATCHED: np.where(np.asarray(ids) % _PATCHED_EVERY == 0, 2, 0)}
    return np.broadcast_to(changed[version], np.shape(ids)).astype(np.uint8)


def write_versions(where: Path, spec: ModelSpec) -> dict[str, str]:
    """Pack them into directories of their names; gives the version digest of each."""
    for version in (FIRST, SECOND):

        def fill(table: TableSpec, start: int, out: np.ndarray, version: str = version) -> None:
            out[:] = rows_of(version, table, np.arange(start, start + len(out), dtype=np.uint64))

        write_tables(where / version, spec, {"rows": version}, fill)
    changed = {}
    for table in spec.tables:
        ids = np.arange(0, table.num_rows, _PATCHED_EVERY, dtype=np.uint64)
        changed[table.layer] = ids, rows_of(PATCHED, table, ids)
    digests = {}
    with PackedModel.open(where / FIRST) as first, PackedModel.open(where / SECOND) as second:
        digests[PATCHED] = write_patch(first, changed, where / PATCHED)
        digests |= {FIRST: first.version, SECOND: second.version}
    return digests
