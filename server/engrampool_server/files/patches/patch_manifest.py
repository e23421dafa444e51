"""manifest.json of a patch: which version it changes, in which rows, and what every block of them must hash to.

docs/FORMAT.md describes the fields.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engrampool_proto.spec import ModelSpec, TableSpec, digest
from engrampool_server.files.manifest import (
    FORMAT_VERSION,
    MAX_BLOCK_BYTES,
    PATCH_FORMAT,
    TableFileError,
    check_values,
    check_version,
    decode_document,
    decode_spec,
)

ID_BYTES = 8
MAX_CHANGED = 2**32 - 1  # of a table; a server counts them in 32 bits
_KEYS = {"format", "format_version", "version", "base", "spec", "tables"}
_VERSION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class PatchTable:
    """The changed rows of one layer, in ascending order of their ids.

    block_rows: changed rows of every block but the last.
    checksums: xxh3-64 of each block, its ids and then its rows, 16 hexadecimal digits.
    first_ids, last_ids: of each block.
    file, data_offset: where the ids begin; the rows follow them.
    """

    layer: int
    num_changed: int
    block_rows: int
    checksums: tuple[str, ...]
    first_ids: tuple[int, ...]
    last_ids: tuple[int, ...]
    file: str
    data_offset: int

    def digested(self) -> dict[str, Any]:
        """The part that the version depends on."""
        return {
            "layer": self.layer,
            "num_changed": self.num_changed,
            "block_rows": self.block_rows,
            "checksums": list(self.checksums),
            "first_ids": list(self.first_ids),
            "last_ids": list(self.last_ids),
        }


@dataclass(frozen=True)
class PatchManifest:
    """base: the version of the packed model that is changed. tables: those with changes, by layer, ascending."""

    base: str
    spec: ModelSpec
    tables: tuple[PatchTable, ...]

    @cached_property
    def version(self) -> str:
        """xxh3-128 of base, specification and checksums, 32 hexadecimal digits."""
        tables = [table.digested() for table in self.tables]
        return digest({"base": self.base, "spec": self.spec.to_json(), "tables": tables})

    def encode(self) -> bytes:
        """The bytes of manifest.json."""
        document = {
            "format": PATCH_FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "base": self.base,
            "spec": self.spec.to_json(),
            "tables": [
                {**table.digested(), "file": table.file, "data_offset": table.data_offset} for table in self.tables
            ],
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, raw: bytes) -> "PatchManifest":
        """Inverse of `encode`. Raises TableFileError for anything else, without the directory's name."""
        document = decode_document(raw, PATCH_FORMAT, _KEYS)
        base = document["base"]
        if not isinstance(base, str) or not _VERSION.fullmatch(base):
            raise TableFileError(f"names as base {base!r}, which is no version")
        manifest = cls(base, decode_spec(document["spec"]), tuple(map(_table_from_json, document["tables"])))
        check_version(manifest.version, document)
        specs = {table.layer: table for table in manifest.spec.tables}
        layers = [table.layer for table in manifest.tables]
        if not layers or layers != [layer for layer in specs if layer in layers]:
            raise TableFileError(f"must list changed layers out of {list(specs)}, in this order; it lists {layers}")
        for table in manifest.tables:
            _check_table(table, specs[table.layer])
        if len({table.file for table in manifest.tables}) != len(layers):
            raise TableFileError("names a file twice")
        return manifest


def _table_from_json(document: Any) -> PatchTable:
    try:
        lists = {key: tuple(document[key]) for key in ("checksums", "first_ids", "last_ids")}
        table = PatchTable(**{**document, **lists})
    except (TypeError, KeyError) as error:
        raise TableFileError(f"describes a table by other fields than a patch has: {error!r}") from error
    numbers = (table.layer, table.num_changed, table.block_rows, table.data_offset)
    check_values(table.layer, (*numbers, *table.first_ids, *table.last_ids), table.checksums, [table.file])
    return table


def _check_table(table: PatchTable, spec: TableSpec) -> None:
    rows = table.block_rows
    if rows < 1 or (rows > 1 and rows * (ID_BYTES + spec.row_bytes) > MAX_BLOCK_BYTES):
        raise TableFileError(f"gives {spec.name} blocks of {rows} rows; a block is at most {MAX_BLOCK_BYTES} bytes")
    if not 0 < table.num_changed <= min(spec.num_rows, MAX_CHANGED):
        raise TableFileError(f"changes {table.num_changed} of the {spec.num_rows} rows of {spec.name}")
    blocks = -(-table.num_changed // rows)
    if {len(table.checksums), len(table.first_ids), len(table.last_ids)} != {blocks}:
        raise TableFileError(f"must have a checksum, a first and a last id for the {blocks} blocks of {spec.name}")
    previous = -1
    for index, (first, last) in enumerate(zip(table.first_ids, table.last_ids, strict=True)):
        count = min(rows, table.num_changed - index * rows)
        if not previous < first <= last - (count - 1) < last + 1 <= spec.num_rows:
            raise TableFileError(
                f"gives block {index} of {spec.name} {count} rows of the ids {first} .. {last}: they must ascend from "
                f"block to block, and be below {spec.num_rows}"
            )
        previous = last
