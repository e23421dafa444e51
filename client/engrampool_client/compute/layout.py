"""How a client's columns are made of entries: runs of columns that one key decides, and that lie side by side.

An entry is the rows of the columns that one key decides (`HashFamily.groups`). It is asked for once a lookup, and not
at all if the cache has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.spec import ModelSpec, TableSpec

Keys = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Columns of one table whose groups are all of one width, side by side in the answer.

    columns: of the table, by group. first: the first column in the answer. number: of the first group, over all tables.
    """

    table: TableSpec
    groups: tuple[int, ...]
    columns: tuple[slice, ...]
    first: int
    number: int

    def pick(self, keys: Keys) -> Keys:
        """The keys of its groups, int64 [groups, T], of those of all groups of the family."""
        first, last = self.groups[0], self.groups[-1]
        # A group that is cut between shards stands in `groups` more than once.
        return keys[first : last + 1] if last - first + 1 == len(self.groups) else keys[list(self.groups)]

    def keys_of(self, ids: npt.NDArray[Any]) -> Keys | None:
        """Int64 [groups, T] of the layer's ids [T, heads]; None if they are not as hashing gives them."""
        keys = []
        for at, columns in enumerate(self.columns):
            first = self.first + at * self.width
            found = self.table.hash.keys_of(columns, ids[:, first : first + self.width], self.table.head_offsets)
            if found is None:
                return None
            keys.append(found)
        return np.stack(keys)

    @cached_property
    def width(self) -> int:
        """Columns of one group."""
        return int(self.columns[0].stop - self.columns[0].start)

    @cached_property
    def entry_bytes(self) -> int:
        """Bytes of one group's rows of one token."""
        return self.width * self.table.row_bytes

    @cached_property
    def stop(self) -> int:
        """One past the last column in the answer."""
        return self.first + len(self.groups) * self.width


class Layout:
    """How the rows of a client's columns are made of entries.

    heads: those asked for, of every table; None for all. cuts: layer -> rows at which another shard begins; where that
    is a head's first row, no entry is of two shards.
    """

    def __init__(self, spec: ModelSpec, heads: slice | None, cuts: Mapping[int, Sequence[int]] | None = None) -> None:
        self.heads = heads
        self.parts: dict[int, list[Part]] = {}
        number = 0
        for table in spec.tables:
            wanted = heads or slice(0, table.heads)
            cut = []
            rows = np.array((cuts or {}).get(table.layer, ()), np.uint64)
            edges = set(np.flatnonzero(np.isin(table.head_offsets, rows)).tolist())
            for group, columns in enumerate(table.hash.groups()):
                start, stop = max(columns.start, wanted.start), min(columns.stop, wanted.stop)
                if start < stop:
                    inside = [start, *sorted(edge for edge in edges if start < edge < stop), stop]
                    cut += [(group, slice(*two)) for two in pairwise(inside)]
            parts = self.parts[table.layer] = []
            for _, run in groupby(cut, lambda one: one[1].stop - one[1].start):
                groups, columns_of = zip(*run, strict=True)
                parts.append(Part(table, groups, columns_of, columns_of[0].start - wanted.start, number))
                number += len(groups)
        self.groups = number
        self.entry_bytes = max(part.entry_bytes for parts in self.parts.values() for part in parts)

    def columns(self, table: TableSpec) -> slice:
        """The columns of `table` that are asked for."""
        return self.heads or slice(0, table.heads)

    def num_columns(self, table: TableSpec) -> int:
        """How many columns of `table` are asked for."""
        return table.heads if self.heads is None else int(self.heads.stop - self.heads.start)

    def to_json(self) -> dict[str, Any]:
        """What two caches must have in common for one to read the other's entries."""
        parts = [part for parts in self.parts.values() for part in parts]
        columns = [[part.table.layer, one.start, one.stop] for part in parts for one in part.columns]
        return {"columns": columns, "entry_bytes": self.entry_bytes}
