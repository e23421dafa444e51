"""What a model's tables are: frozen, validated, with a JSON round trip and a digest.

A specification holds *resolved* constants only. `builders` derives one from a model's config.json; after that, nobody's
random number generator or prime search is asked again.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import HashFamily, TokenBatch, Windows, family_from_json
from engrampool_proto.token_map import TokenMap

# Bytes an element; the names are torch's.
DTYPE_BYTES = {
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,  # two values a byte; `length` counts bytes
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
}
MAX_ROW_BYTES = 1 << 20
MAX_LAYER = (1 << 31) - 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

RowIds = npt.NDArray[np.unsignedinteger[Any]]


def canonical_json(document: Any) -> bytes:
    """The one byte string that a JSON document is digested as: sorted keys, no spaces, ASCII."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(document: Any) -> str:
    """xxh3-128 of `canonical_json`, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(canonical_json(document))


@dataclass(frozen=True)
class Segment:
    """`length` elements of `dtype` in a row. Raises SpecError for an unknown dtype or no length."""

    name: str
    dtype: str
    length: int

    def __post_init__(self) -> None:
        if not self.name:
            raise SpecError("a segment needs a name")
        if self.dtype not in DTYPE_BYTES:
            raise SpecError(f"segment {self.name!r}: unknown dtype {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        if self.length <= 0:
            raise SpecError(f"segment {self.name!r}: length must be positive, it is {self.length}")

    @property
    def nbytes(self) -> int:
        """Bytes in a row."""
        return self.length * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class RowFormat:
    """How a consumer reads a row: named segments, one after the other, without padding.

    Raises SpecError for no segments, two of one name, or more than MAX_ROW_BYTES.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        if not names or len(set(names)) != len(names):
            raise SpecError(f"a row needs segments of different names; it has {names}")
        if self.row_bytes > MAX_ROW_BYTES:
            raise SpecError(f"a row of {self.row_bytes} bytes is over the limit of {MAX_ROW_BYTES}")

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(segment.nbytes for segment in self.segments)

    def slice_of(self, name: str) -> slice:
        """The bytes of segment `name` within a row. Raises SpecError if there is none."""
        start = 0
        for segment in self.segments:
            if segment.name == name:
                return slice(start, start + segment.nbytes)
            start += segment.nbytes
        raise SpecError(f"a row has no segment {name!r}; it has {', '.join(s.name for s in self.segments)}")

    def to_json(self) -> list[dict[str, Any]]:
        """One object a segment."""
        return [{"name": s.name, "dtype": s.dtype, "length": s.length} for s in self.segments]

    @classmethod
    def from_json(cls, document: Iterable[Mapping[str, Any]]) -> "RowFormat":
        """Inverse of `to_json`."""
        return cls(tuple(Segment(str(s["name"]), str(s["dtype"]), int(s["length"])) for s in document))


@dataclass(frozen=True)
class TableSpec:
    """The rows of one layer and the hash that addresses them.

    layer: the layer's number as the model's config names it.
    num_rows: all rows, padding after the last head included.
    hash: the family with its constants; head h owns rows [head_offsets[h], head_offsets[h + 1]).
    scale: one factor for every value of the table, applied by the consumer; None where rows carry their own or none.

    Raises SpecError if the heads need more rows than there are, or the scale is not finite.
    """

    layer: int
    num_rows: int
    row_format: RowFormat
    hash: HashFamily
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.layer <= MAX_LAYER:
            raise SpecError(f"layer must be in 0 .. {MAX_LAYER}, it is {self.layer}")
        if self.scale is not None:
            # A factor given as an integer is the same factor, and equal specifications have equal digests.
            object.__setattr__(self, "scale", float(self.scale))
            if not math.isfinite(self.scale):
                raise SpecError(f"{self.name}: scale must be a finite number, it is {self.scale}")
        needed = sum(self.hash.head_rows())
        if not needed <= self.num_rows < 2**63:
            raise SpecError(f"{self.name}: heads need {needed} rows, the table has {self.num_rows}")

    @property
    def name(self) -> str:
        """`layer_1`, as arrays in .npz files and tables in files are called."""
        return f"layer_{self.layer}"

    @cached_property
    def heads(self) -> int:
        """Rows that one token asks for."""
        return len(self.hash.head_rows())

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.row_format.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.row_bytes

    @cached_property
    def head_offsets(self) -> npt.NDArray[np.uint64]:
        """uint64 [heads]: the first row of each head."""
        return np.cumsum([0, *self.hash.head_rows()[:-1]]).astype(np.uint64)

    @cached_property
    def id_dtype(self) -> type[np.uint32] | type[np.uint64]:
        """Uint32 while every row id fits, uint64 beyond."""
        return np.uint32 if self.num_rows <= 2**32 else np.uint64

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "layer": self.layer,
            "num_rows": self.num_rows,
            "row_format": self.row_format.to_json(),
            "hash": self.hash.to_json(),
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "TableSpec":
        """Inverse of `to_json`."""
        scale = document["scale"]
        return cls(
            layer=int(document["layer"]),
            num_rows=int(document["num_rows"]),
            row_format=RowFormat.from_json(document["row_format"]),
            hash=family_from_json(document["hash"]),
            scale=None if scale is None else float(scale),
        )


@dataclass(frozen=True)
class ModelSpec:
    """The tables that one language model reads.

    name: 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit.
    vocab_size: token ids are in [0, vocab_size).
    tables: in ascending order of layer, which is the order the model needs them in.
    token_map: applied to token ids before hashing; None where raw ids are hashed.

    Raises SpecError for a bad name, no tables, layers out of order, or a token map of another vocabulary.
    """

    name: str
    vocab_size: int
    tables: tuple[TableSpec, ...]
    token_map: TokenMap | None = None
    _by_layer: dict[int, TableSpec] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SpecError(
                f"a model's name is 1 to 128 of A-Z a-z 0-9 . _ -, starting with one of A-Z a-z 0-9: not {self.name!r}"
            )
        if not 0 < self.vocab_size < 2**31:
            raise SpecError(f"vocab_size must be in 1 .. 2**31 - 1, it is {self.vocab_size}")
        layers = [table.layer for table in self.tables]
        if not layers or any(a >= b for a, b in pairwise(layers)):
            raise SpecError(f"tables must be of different layers in ascending order; they are {layers}")
        if self.token_map is not None and self.token_map.vocab_size != self.vocab_size:
            raise SpecError(
                f"the token map is for {self.token_map.vocab_size} token ids, the model has {self.vocab_size}"
            )
        self._by_layer.update((table.layer, table) for table in self.tables)

    def table(self, layer: int) -> TableSpec:
        """The table of `layer`. Raises SpecError naming the layers there are."""
        table = self._by_layer.get(layer)
        if table is None:
            raise SpecError(f"model {self.name} has no layer {layer}; it has {', '.join(map(str, self.layers))}")
        return table

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have tables, ascending."""
        return tuple(self._by_layer)

    @cached_property
    def lookback(self) -> int:
        """Tokens before the current one that hashing reads, n - 1 of the longest n-gram of any table."""
        return max(table.hash.lookback for table in self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows of all tables."""
        return sum(table.nbytes for table in self.tables)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the canonical JSON: equal digests hash alike and lay rows out alike."""
        return digest(self.to_json())

    def hash(self, batch: TokenBatch, layers: Iterable[int] | None = None) -> dict[int, RowIds]:
        """Row ids of every token for each layer asked for (all by default), in the order asked for.

        Returns {layer: uint32 or uint64 [T, heads]}, C-contiguous.
        Raises BatchError for token ids out of range or a look-back too wide, SpecError for an unknown layer.
        """
        tables = self.tables if layers is None else list(map(self.table, layers))
        batch.check_tokens(self.vocab_size, self.lookback)
        windows = Windows.of(batch, self.lookback, None if self.token_map is None else self.token_map.ids)
        rows: dict[int, RowIds] = {}
        for table in tables:
            family, offsets = table.hash, table.head_offsets
            out = np.empty((len(batch.tokens), table.heads), table.id_dtype)
            for columns, keys in zip(family.groups(), family.keys(windows), strict=True):
                family.rows_of(columns, keys, offsets, out[:, columns])
            rows[table.layer] = out
        return rows

    def fingerprint(self) -> dict[str, Any]:
        """What two sides must agree on, field by field, for the same tokens to read the same rows.

        The name is left out: it may differ where the tables are the same.
        """
        fields: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "layers": list(self.layers),
            "token_map.size": self.token_map.size if self.token_map else None,
            "token_map.digest": self.token_map.digest if self.token_map else None,
        }
        for table in self.tables:
            constants = table.hash.to_json()
            fields[f"{table.name}.num_rows"] = table.num_rows
            fields[f"{table.name}.row_format"] = table.row_format.to_json()
            fields[f"{table.name}.head_sizes"] = list(table.hash.head_rows())
            fields.update((f"{table.name}.hash.{key}", value) for key, value in constants.items())
        return fields

    def differences(self, other: "ModelSpec") -> list[str]:
        """The fingerprint's fields in which the two differ, each as one readable line; empty if they agree."""
        ours, theirs = self.fingerprint(), other.fingerprint()
        return [
            f"{name}: {_shorten(ours.get(name))} here, {_shorten(theirs.get(name))} there"
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON types only; docs/FORMAT.md describes the fields."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "token_map": self.token_map.to_json() if self.token_map else None,
            "tables": [table.to_json() for table in self.tables],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "ModelSpec":
        """Inverse of `to_json`. Raises SpecError for anything that `to_json` could not have written."""
        try:
            token_map = document["token_map"]
            spec = cls(
                name=document["name"],
                vocab_size=int(document["vocab_size"]),
                token_map=None if token_map is None else TokenMap.from_json(token_map),
                tables=tuple(TableSpec.from_json(table) for table in document["tables"]),
            )
            given = canonical_json(document)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"not a model specification: {error!r}") from error
        # Numbers of another type, fields that nobody knows: what is read differently from how it is written is refused.
        if given != canonical_json(spec.to_json()):
            raise SpecError("not a model specification: it has unknown fields, or values of another type than written")
        return spec


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of one layer's table, held by the server at `target`. Raises SpecError if there are none."""

    target: str
    layer: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise SpecError(f"a shard holds rows start < stop; {self.target} claims {self.start} .. {self.stop}")


@dataclass(frozen=True)
class ShardMap:
    """Which server holds which rows of one version of a model. Replicas state equal ranges."""

    model: str
    version: str
    shards: tuple[Shard, ...]

    def check(self, spec: ModelSpec) -> None:
        """Raise SpecError unless every row of every table is held, and ranges are equal or apart."""
        for table in spec.tables:
            # Of replicas one is enough to be named.
            ranges = {(s.start, s.stop): s.target for s in self.shards if s.layer == table.layer}
            expected, before = 0, ""
            for (start, stop), target in sorted(ranges.items()):
                if start < expected:
                    raise SpecError(
                        f"{table.name}: shards overlap at row {start}, {before} and {target} rows {start} .. {stop - 1}"
                        "; they must be equal or apart: are all servers given the same number of shards?"
                    )
                if start > expected:
                    raise SpecError(f"{table.name}: no server holds rows {expected} .. {start - 1}")
                expected, before = stop, f"{target} rows {start} .. {stop - 1}"
            if expected != table.num_rows:
                gap = f"rows {expected} .. {table.num_rows - 1}"
                raise SpecError(
                    f"{table.name}: no server holds {gap}"
                    if expected < table.num_rows
                    else f"{table.name}: shards reach row {expected - 1}, the table ends at {table.num_rows - 1}"
                )

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        shards = [{"target": s.target, "layer": s.layer, "start": s.start, "stop": s.stop} for s in self.shards]
        return {"model": self.model, "version": self.version, "shards": shards}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "ShardMap":
        """Inverse of `to_json`. Raises SpecError for anything else."""
        try:
            shards = tuple(
                Shard(str(s["target"]), int(s["layer"]), int(s["start"]), int(s["stop"])) for s in document["shards"]
            )
            shard_map = cls(str(document["model"]), str(document["version"]), shards)
            given = canonical_json(document)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SpecError(f"not a shard map: {error!r}") from error
        if given != canonical_json(shard_map.to_json()):
            raise SpecError("not a shard map: it has unknown fields, or values of another type than written")
        return shard_map


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... (digest {digest(value)[:8]})"
