"""manifest.json of a packed model: what its tables are, which files hold them, and what every block must hash to.

docs/FORMAT.md describes the fields.
"""

import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from engrampool_proto.errors import EngrampoolError, SpecError
from engrampool_proto.spec import ModelSpec, TableSpec, canonical_json, digest

MANIFEST_NAME = "manifest.json"
FORMAT = "engrampool-tables"
PATCH_FORMAT = "engrampool-patch"
FORMAT_VERSION = 1  # of either
MAX_MANIFEST_BYTES = 256 << 20
MAX_BLOCK_BYTES = 64 << 20  # what a reader must be ready to buffer
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_KEYS = {"format", "format_version", "version", "spec", "tables"}


class TableFileError(EngrampoolError):
    """A packed model or patch is damaged, incomplete or not one; the text names the file, the block and what to do."""


class IsPatchError(TableFileError):
    """A packed model was wanted, and this is a patch, which is nothing without its base."""


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
        return digest({"spec": self.spec.to_json(), "tables": [table.digested() for table in self.tables]})

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
        document = decode_document(raw, FORMAT, _KEYS)
        manifest = cls(decode_spec(document["spec"]), tuple(_table_from_json(table) for table in document["tables"]))
        check_version(manifest.version, document)
        if [table.layer for table in manifest.tables] != list(manifest.spec.layers):
            raise TableFileError(f"must list the files of layers {list(manifest.spec.layers)}, in this order")
        for table, spec in zip(manifest.tables, manifest.spec.tables, strict=True):
            _check_table(table, spec)
        names = [file.name for table in manifest.tables for file in table.files]
        if len(set(names)) != len(names):
            raise TableFileError("names a file twice")
        return manifest


def decode_document(raw: bytes, wanted: str, keys: Set[str]) -> dict[str, Any]:
    """The object that a manifest of the format `wanted` is, with these keys; `tables` is a list.

    Raises TableFileError, IsPatchError for a patch that was not wanted, without the directory's name.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise TableFileError(f"is {len(raw)} bytes long; the limit is {MAX_MANIFEST_BYTES}")
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TableFileError(f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        document = {}
    found = document.get("format")
    if found == PATCH_FORMAT != wanted:
        raise IsPatchError(
            f"is a patch of version {document.get('base')!r}, not a packed model; it is served only together with that "
            f"version, by servers that share a registry: `engrampool publish` it there"
        )
    if found != wanted:
        what = "patch" if wanted == PATCH_FORMAT else "packed model"
        raise TableFileError(f"is not the manifest of a {what}: it has no format {wanted!r}")
    if document.get("format_version") != FORMAT_VERSION:
        version = document.get("format_version")
        raise TableFileError(f"has format version {version!r}; this program reads version {FORMAT_VERSION}")
    if document.keys() != keys or not isinstance(document["tables"], list):
        raise TableFileError(f"must have {', '.join(sorted(keys))}; it has {', '.join(sorted(document))}")
    return document


def decode_spec(document: Any) -> ModelSpec:
    """The specification in a manifest. Raises TableFileError."""
    try:
        spec = ModelSpec.from_json(document)
        # A value that was read as another (10.0 as 10) would pass unseen and differ in the version.
        faithful = canonical_json(spec.to_json()) == canonical_json(document)
    except (SpecError, OverflowError, ValueError, RecursionError) as error:
        raise TableFileError(f"holds no valid specification: {error}") from error
    if not faithful:
        raise TableFileError("holds no valid specification: it has values that would be written otherwise")
    return spec


def check_version(found: str, document: Mapping[str, Any]) -> None:
    """Raise TableFileError unless the document claims the version that its contents digest to."""
    if found != document["version"]:
        raise TableFileError(f"is damaged: its contents digest to {found}, not {document['version']!r}")


def _table_from_json(document: Any) -> ManifestTable:
    try:
        files = tuple(TableFile(**file) for file in document["files"])
        table = ManifestTable(document["layer"], document["block_rows"], tuple(document["checksums"]), files)
    except (TypeError, KeyError) as error:
        raise TableFileError(f"describes a table without layer, block_rows, checksums and files: {error!r}") from error
    numbers = [table.layer, table.block_rows, *(n for f in files for n in (f.start, f.stop, f.data_offset))]
    check_values(table.layer, numbers, table.checksums, [file.name for file in files])
    return table


def check_values(layer: Any, numbers: Iterable[Any], checksums: Iterable[Any], names: Iterable[Any]) -> None:
    """Raise TableFileError unless these values of a layer's table have the types and forms that they must have."""
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise TableFileError(f"describes table {layer!r} with numbers that are no row or byte counts")
    for checksum in checksums:
        if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
            raise TableFileError(f"has a checksum in layer {layer} that is not 16 hexadecimal digits")
    for name in names:
        # A name is a name, never a way out of the directory.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise TableFileError(f"names a file {name!r}, which cannot be one of a packed model")


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
