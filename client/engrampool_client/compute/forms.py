"""The form by numpy, which is the specification of the compiled one, and which of the two a client takes."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.index import Bytes, Index, Keys
from engrampool_client.compute.layout import Layout
from engrampool_client.config import Compiled
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec, RowIds, TableSpec

Flags = npt.NDArray[np.bool_]

_log = logging.getLogger("engrampool")
_DISABLED = "NUMBA_DISABLE_JIT is set (or disable_jit in .numba_config.yaml), so that numba compiles nothing"


class Hashing(Protocol):
    """From the tokens of one model to keys and row ids; `Hasher` in engrampool_proto.kernels has it compiled."""

    def rows(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, RowIds]:
        """As `ModelSpec.hash`: layer -> row ids [T, heads]. Raises BatchError."""

    def keys(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, Keys]:
        """As `HashFamily.keys`: layer -> int64 [groups, T]. Raises BatchError."""

    def rows_of(self, table: TableSpec, columns: slice, keys: Keys, out: npt.NDArray[Any]) -> None:
        """As `HashFamily.rows_of`, of a table of the model. out: C-contiguous."""


class IdWriter(Protocol):
    """Writes the row ids of some layers and columns; `Ids` and `GivenIds` in engrampool_proto.kernels."""

    def put(self, batch: Sequence[npt.NDArray[Any]], out: Bytes) -> bool:
        """Whether the batch can be. Else nothing is to be made of what was written."""


class KeyWriter(Protocol):
    """Writes the keys of some layers and columns; `BatchKeys` in engrampool_proto.kernels."""

    def put(
        self, batch: Sequence[npt.NDArray[Any]], out: Keys
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
        """Gives tokens, boundaries and look-back, copied; None for a batch that cannot be."""


class Entries(Protocol):
    """Finds, places and keeps the entries of small batches; `Entries` in engrampool_proto.kernels, which says how.

    each: how many entries a token has.
    """

    each: int

    def state(self, tokens: int, to: Sequence[int]) -> Keys:
        """What is known of a lookup. to: of each layer the address of its rows. The key of each entry comes first."""

    def find(self, index: Index, rows: Bytes, tokens: int, state: Keys, ids: Bytes) -> tuple[int, int, int, int, int]:
        """Copy what a cache has to its places, and write the ids of what it lacks."""

    def missing(self, state: Keys) -> list[int]:
        """How many rows are asked for, of each layer."""

    def place(self, layer: int, tokens: int, state: Keys, fetched: Bytes) -> None:
        """Copy what came of a layer to its places."""

    def keep(self, index: Index, rows: Bytes, tokens: int, state: Keys) -> tuple[int, int, int]:
        """Let a cache have what came."""

    def whole(self, layer: int, tokens: int, state: Keys) -> Flags:
        """Which tokens the cache had all of a layer of."""


class _NumpyHashing:
    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def rows(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, RowIds]:
        return self._spec.hash(batch, layers)

    def keys(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, Keys]:
        spec = self._spec
        batch.check_tokens(spec.vocab_size, spec.lookback)
        windows = batch.windows(spec.lookback, None if spec.token_map is None else spec.token_map.ids)
        return {layer: spec.table(layer).hash.keys(windows) for layer in layers}

    def rows_of(self, table: TableSpec, columns: slice, keys: Keys, out: npt.NDArray[Any]) -> None:
        table.hash.rows_of(columns, keys, table.head_offsets, out)


class Form:
    """What is computed, by numpy.

    compiled: whether it is by kernels. why: it is this form, for people. index: that of a cache. id_writer: of what
    `hashing` gave, some layers, and columns of every table, None for all; where it is by kernels. given_writer:
    likewise, of row ids of these tables, which are known. small_entries: of small batches, likewise.

    An entry is what one key decides, of `nbytes` bytes. T tokens have `groups` entries each.
    """

    compiled = False
    index: type[Index] = Index
    id_writer: Callable[[Any, Sequence[int], slice | None], IdWriter] | None = None
    given_writer: Callable[[Sequence[TableSpec]], IdWriter] | None = None
    small_entries: Callable[[Any, Sequence[int], Layout], tuple[KeyWriter, Entries]] | None = None

    def __init__(self, why: str) -> None:
        self.why = why

    def hashing(self, spec: ModelSpec) -> Hashing:
        """Of one model, to be kept: what it needs is laid out once."""
        return _NumpyHashing(spec)

    def distinct(self, keys: Keys, hit: Flags | None) -> tuple[Keys, list[int], Keys]:
        """Each key of a group once, in any order, one group after the other; those that `hit` has are left out.

        keys: int64 [groups, T]. hit: [T * groups], of equal keys all or none; None for none.
        Gives the keys, int64 [N]; how many of them each group has; and where among them each entry's is, int64
        [T * groups], unspecified for what is left out.
        """
        groups = len(keys)
        order = keys.argsort(axis=1)
        ascending = np.take_along_axis(keys, order, 1)
        first = np.ones(keys.shape, np.bool_)
        np.not_equal(ascending[:, 1:], ascending[:, :-1], out=first[:, 1:])
        if hit is not None:
            first &= ~np.take_along_axis(hit.reshape(-1, groups).T, order, 1)
        inverse = np.empty(keys.shape, np.int64)
        np.put_along_axis(inverse, order, (first.cumsum() - 1).reshape(keys.shape), 1)
        return ascending[first], first.sum(axis=1).tolist(), inverse.T.reshape(-1)

    def holds(self, ids: RowIds, start: int, stop: int) -> bool:
        """Whether every id, [N] with N > 0, is in [start, stop)."""
        return int(ids.max()) < stop and (not start or int(ids.min()) >= start)

    def gather(self, rows: Bytes, ids: RowIds, row_start: int, out: Bytes) -> None:
        """Copy rows of a table, which `holds` them all, into `out`, uint8 [N, row_bytes], C-contiguous.

        rows: uint8 [n, row_bytes], those from `row_start` on.
        """
        if row_start:
            ids = ids - ids.dtype.type(row_start)
        # "raise" would gather into a buffer first, and the ids are known to be good.
        rows.take(ids, 0, out, "clip")

    def gather_held(self, rows: Bytes, ids: RowIds, row_start: int, out: Bytes) -> bool:
        """As `gather`, of what may not be held; whether all is. Else nothing is to be made of what was written."""
        if not self.holds(ids, row_start, row_start + len(rows)):
            return False
        self.gather(rows, ids, row_start, out)
        return True

    def place(self, fetched: Bytes, inverse: Keys, hit: Flags | None, to: Bytes) -> None:
        """Write entries to every place that they belong; those that `hit` has are there already.

        fetched: uint8 [N, nbytes]. inverse, hit: as of `distinct`. to: uint8 [T, groups * nbytes], which may be columns
        of a wider array.
        """
        entries, write_back = _entries_of(to, fetched.shape[1], whole=hit is None)
        if hit is None:
            np.take(fetched, inverse, axis=0, out=entries, mode="clip")
        else:
            missing = np.flatnonzero(~hit)
            entries[missing] = fetched[inverse[missing]]
        write_back()

    def first_places(
        self, inverse: Keys, count: int, groups: int, heads: int, first: int, width: int
    ) -> npt.NDArray[np.int64]:
        """Where each of the entries that are asked for, `count` of them, belongs first: its first row among [T, heads].

        inverse: of `distinct`, negative for what is left out. groups: each of `width` columns, from column `first` on.
        """
        places = np.empty(count, np.int64)
        found = np.flatnonzero(inverse >= 0)[::-1]
        places[inverse[found]] = found // groups * heads + first + found % groups * width
        return places

    def repeat(self, rows: Bytes, places: Keys, inverse: Keys, groups: int, heads: int, first: int, width: int) -> None:
        """Copy entries from their `first_places` to all others that they belong to. rows: uint8 [T * heads, bytes]."""
        found = np.flatnonzero(inverse >= 0)
        columns = np.arange(width)
        source = places[inverse[found]][:, None] + columns
        rows[(found // groups * heads + first + found % groups * width)[:, None] + columns] = rows[source]

    def copy_found(
        self, rows: Bytes, slots: Keys, nbytes: int, hit: Flags | None, to: Bytes | None
    ) -> tuple[Flags | None, int]:
        """Write what a cache has to its places, but for what `hit` has; gives what `hit` is by then, and how many came.

        rows: the cache's, uint8 [rows, nbytes at least]. slots: [T * groups], its row of each entry; -1 for none.
        to: as of `place`; None to write nothing.
        """
        found = slots >= 0
        if hit is not None:
            found &= ~hit
        count = int(np.count_nonzero(found))
        if not count:
            return hit, 0
        if to is not None:
            entries, write_back = _entries_of(to, nbytes)
            if hit is None and 2 * count > found.size and nbytes == rows.shape[1]:
                # In one go, with some row or other where none was found.
                rows.take(slots, 0, entries, "clip")
            else:
                where = np.flatnonzero(found)
                entries[where] = rows[slots[where], :nbytes]
            write_back()
        return found if hit is None else hit | found, count


def _entries_of(to: Bytes, nbytes: int, whole: bool = False) -> tuple[Bytes, Callable[[], None]]:
    """The entries of `to`, uint8 [T * groups, nbytes], and what to call when they are written.

    whole: all of them will be, so that it does not matter what they are now.
    """
    if to.flags.c_contiguous:
        return to.reshape(-1, nbytes), _nothing
    entries = np.empty_like(to, order="C") if whole else np.ascontiguousarray(to)
    return entries.reshape(-1, nbytes), lambda: np.copyto(to, entries)


def _nothing() -> None:
    return


NUMPY = Form('compiled="off"')


def choose(setting: Compiled) -> Form:
    """What a client with this setting computes by, said in the log. Raises ValueError for "on" where that cannot be."""
    form = form_of(setting)
    _log.info("a client computes by %s: %s", "compiled kernels" if form.compiled else "numpy", form.why)
    return form


@cache
def form_of(setting: Compiled) -> Form:
    """As `choose`, without a word."""
    if setting == "off":
        return NUMPY
    try:
        return _compiled(must=setting == "on")
    except ImportError as error:
        reason = f"numba cannot be imported ({error}); pip install '.[fast]' brings it"
    except Exception as error:  # whatever numba raises, of a file that is damaged for one
        reason = str(error) or repr(error)
    if setting == "on":
        raise ValueError(f'compiled="on" cannot be: {reason}')
    return Form(reason)


def _compiled(must: bool) -> Form:
    """Raises what numba does, and EngrampoolError where it compiles nothing.

    must: also where compiled kernels cannot be kept, so that each start compiles them, for many seconds; else
    EngrampoolError is raised there.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):  # before numba is imported for nothing
        raise EngrampoolError(_DISABLED)
    # Before our kernels: they leave the settings alone in a process that has numba already, and this one is a host's.
    import numba

    if numba.config.DISABLE_JIT:
        raise EngrampoolError(_DISABLED)
    from engrampool_proto.kernels import jit

    if not must:
        jit.require_cache()
    from engrampool_client.compute.compiled import CompiledForm

    reason = jit.not_kept()
    if reason is not None and not must:
        raise EngrampoolError(f"compiled kernels cannot be kept ({reason})")
    kept = "" if reason is None else f", whose kernels cannot be kept and are compiled at each start ({reason})"
    return CompiledForm(f"numba {numba.__version__}{kept}")
