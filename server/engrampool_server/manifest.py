"""manifest.json of a packed model: what its tables are, which files hold them, and what every block must hash to.

docs/FORMAT.md describes the fields.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from engrampool_proto.errors import EngrampoolError, SpecError
from engrampool_proto.spec import ModelSpec, TableSpec, canonical_json, digest

MANIFEST_NAME = "manifest.json"
FORMAT = "engrampool-tables"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
MAX_BLOCK_BYTES = 64 << 20  # what a reader must be ready to buffer
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_KEYS = {"format", "format_version", "version", "spec", "tables"}


class TableFileError(EngrampoolError):
    """A packed model is damaged, incomplete or not one; the text names the file, the block and what to do."""


@dataclass(frozen=True)
class TableFile:
    """Rows [start, stop) of a table, at byte `data_offset` of the file `name`."""

    name: str
    start: int
    stop: int
    data_offset: int


@dataclass(frozen=True)
class ManifestTable:
    """Where one layer's rows lie.

    block_rows: rows of every block but the last, counted from row 0 of the table whatever the files.
    checksums: xxh3-64 of each block, 16 hexadecimal digits.
    files: in ascending order of rows; each begins on a block.
    """

    layer: int
    block_rows: int
    checksums: tuple[str, ...]
    files: tuple[TableFile, ...]

    def digested(self) -> dict[str, Any]:
        """The part that the version depends on; how rows are split into files is not."""
        return {"layer": self.layer, "block_rows": self.block_rows, "checksums": list(self.checksums)}


@dataclass(frozen=True)
class Manifest:
    """One entry in `tables` for each of `spec.tables`, in the same order."""

    spec: ModelSpec
    tables: tuple[ManifestTable, ...]

    @cached_property
    def version(self) -> str:
        """xxh3-128 of specification and checksums, 32 hexadecimal digits: equal versions hold equal rows."""
        return _version(self.spec.to_json(), [table.digested() for table in self.tables])

    def encode(self) -> bytes:
        """The bytes of manifest.json."""
        tables = [{**table.digested(), "files": [vars(file) for file in table.files]} for table in self.tables]
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "spec": self.spec.to_json(),
            "tables": tables,
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, raw: bytes) -> "Manifest":
        """Inverse of `encode`. Raises TableFileError for anything else, without the directory's name."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise TableFileError(f"is {len(raw)} bytes long; the limit is {MAX_MANIFEST_BYTES}")
        try:
            document = json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise TableFileError(f"is not JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise TableFileError(f"is not the manifest of a packed model: it has no format {FORMAT!r}")
        if document.get("format_version") != FORMAT_VERSION:
            found = document.get("format_version")
            raise TableFileError(f"has format version {found!r}; this program reads version {FORMAT_VERSION}")
        if document.keys() != _KEYS or not isinstance(document["tables"], list):
            raise TableFileError(f"must have {', '.join(sorted(_KEYS))}; it has {', '.join(sorted(document))}")
        try:
            manifest = cls(
                spec=ModelSpec.from_json(document["spec"]),
                tables=tuple(_table_from_json(table) for table in document["tables"]),
            )
            # A value that was read as another (10.0 as 10) would pass here unseen and differ in the version.
            faithful = canonical_json(manifest.spec.to_json()) == canonical_json(document["spec"])
        except (SpecError, OverflowError, ValueError, RecursionError) as error:
            raise TableFileError(f"holds no valid specification: {error}") from error
        if not faithful or manifest.version != document["version"]:
            raise TableFileError(f"is damaged: its contents digest to {manifest.version}, not {document['version']!r}")
        if [table.layer for table in manifest.tables] != list(manifest.spec.layers):
            raise TableFileError(f"must list the files of layers {list(manifest.spec.layers)}, in this order")
        for table, spec in zip(manifest.tables, manifest.spec.tables, strict=True):
            _check_table(table, spec)
        names = [file.name for table in manifest.tables for file in table.files]
        if len(set(names)) != len(names):
            raise TableFileError("names a file twice")
        return manifest


def _version(spec: Mapping[str, Any], tables: list[dict[str, Any]]) -> str:
    return digest({"spec": spec, "tables": tables})


def _table_from_json(document: Any) -> ManifestTable:
    try:
        files = tuple(TableFile(**file) for file in document["files"])
        table = ManifestTable(document["layer"], document["block_rows"], tuple(document["checksums"]), files)
    except (TypeError, KeyError) as error:
        raise TableFileError(f"describes a table without layer, block_rows, checksums and files: {error!r}") from error
    numbers = [table.layer, table.block_rows, *(n for f in files for n in (f.start, f.stop, f.data_offset))]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise TableFileError(f"describes table {table.layer!r} with numbers that are no row or byte counts")
    for checksum in table.checksums:
        if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
            raise TableFileError(f"has a checksum in layer {table.layer} that is not 16 hexadecimal digits")
    for file in files:
        # A name is a name, never a way out of the directory.
        if not isinstance(file.name, str) or not _FILE_NAME.fullmatch(file.name):
            raise TableFileError(f"names a file {file.name!r}, which cannot be one of a packed model")
    return table


def _check_table(table: ManifestTable, spec: TableSpec) -> None:
    rows = table.block_rows
    if rows < 1 or (rows > 1 and rows * spec.row_bytes > MAX_BLOCK_BYTES):
        raise TableFileError(f"gives {spec.name} blocks of {rows} rows; a block is at most {MAX_BLOCK_BYTES} bytes")
    blocks = -(-spec.num_rows // rows)
    if len(table.checksums) != blocks:
        raise TableFileError(f"has {len(table.checksums)} checksums for the {blocks} blocks of {spec.name}")
    bounds = [(0, 0), *((file.start, file.stop) for file in table.files)]
    covered = all(a[1] == b[0] < b[1] and b[0] % rows == 0 for a, b in pairwise(bounds))
    if not covered or bounds[-1][1] != spec.num_rows:
        raise TableFileError(f"must cover the {spec.num_rows} rows of {spec.name} file by file, cut between blocks")
