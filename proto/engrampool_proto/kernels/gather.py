"""Copying rows of a table by id: the work that a lookup is for.

A table is far larger than the caches, so every row is a wait for DRAM, and a processor overlaps such waits only as far
as it looks ahead by itself. Asking for rows well before they are copied keeps more of them on the way.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engrampool_proto.kernels.jit import kernel, view
from engrampool_proto.spec import RowIds

# 8 to 32 rows of 264 bytes measured alike, more was slower on a large table; narrow rows gained up to 32.
_AHEAD, _NARROW_AHEAD = 16, 32
LINE = np.uint64(64)
_NARROW = np.uint64(128)
_WORD = np.uint64(32)
# A row's bit is in the word of this many, at this place in it.
_BITS_SHIFT, _BIT = np.uint64(6), np.uint64(63)
# Mixed with signed integers, uint64 becomes float64 in numba as in numpy; addresses stay in one type throughout.
_U = np.uint64

_BYTE_POINTER = ir.IntType(8).as_pointer()
_INT32 = ir.IntType(32)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, to be read soon. Any address will do: a wrong one is no fault."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        declared = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, _INT32, _INT32, _INT32])
        prefetch = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        # For reading, into all caches, data.
        builder.call(prefetch, [builder.inttoptr(args[0], _BYTE_POINTER), _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _copy_32(typing: Any, to: Any, source: Any) -> Any:
    """Copy 32 bytes between any two addresses, in whatever registers the processor has for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.VectorType(ir.IntType(8), 32).as_pointer()
        value = builder.load(builder.inttoptr(args[1], pointer), align=1)
        builder.store(value, builder.inttoptr(args[0], pointer), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _copy(typing: Any, to: Any, source: Any, nbytes: Any) -> Any:
    """C's memcpy."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, source = (builder.inttoptr(address, _BYTE_POINTER) for address in args[:2])
        cgutils.raw_memcpy(builder, to, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _bit_count(typing: Any, word: Any) -> Any:
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@njit(inline="always")  # type: ignore[untyped-decorator]
def copy_row(to: Any, source: Any, nbytes: Any) -> None:
    """Words of 32 bytes, the last one overlapping the one before it, so that no width has a slow tail."""
    if nbytes < _WORD:
        _copy(to, source, nbytes)
        return
    last = nbytes - _WORD
    at = _U(0)
    while at < last:
        _copy_32(to + at, source + at)
        at += _WORD
    _copy_32(to + last, source + last)


_GATHER = tuple(
    types.int64(view(types.uint8, 2), view(ids), types.int64, types.uint8[::1]) for ids in (types.uint32, types.uint64)
)


@kernel(*_GATHER)
def gather(rows: npt.NDArray[np.uint8], ids: RowIds, row_start: int, out: npt.NDArray[np.uint8]) -> int:
    """Copy rows `ids` [N] into `out`. Gives the position of the first id that is not held and stops there; -1 for none.

    rows: uint8 [n, row_bytes], C-contiguous: rows row_start .. row_start + n - 1.
    ids: uint32 or uint64 [N], C-contiguous.
    out: uint8 [N * row_bytes], at least; its length is the caller's to check.
    """
    count, width = _U(ids.size), _U(rows.shape[1])
    held, first = _U(rows.shape[0]), _U(row_start)
    source, to = _U(rows.ctypes.data), _U(out.ctypes.data)
    narrow = width <= _NARROW
    middle, end = min(LINE, width - _U(1)), width - _U(1)
    ahead = _U(_NARROW_AHEAD) if narrow else _U(_AHEAD)
    for step in range(count + ahead):
        if step < count:
            start = source + (_U(ids[step]) - first) * width
            if narrow:
                # One to three lines. Asking twice costs less than a wrong guess of how many there are.
                prefetch(start)
                prefetch(start + middle)
                prefetch(start + end)
            else:
                line = start & ~(LINE - _U(1))
                while line < start + width:
                    prefetch(line)
                    line += LINE
        if step >= ahead:
            at = step - ahead
            row = _U(ids[at]) - first  # below `first` it wraps, beyond `held`
            if row >= held:
                return int(at)
            copy_row(to + at * width, source + row * width, width)
    return -1


@kernel(*_GATHER, nogil=False)
def gather_few(rows: npt.NDArray[np.uint8], ids: RowIds, row_start: int, out: npt.NDArray[np.uint8]) -> int:
    """As `gather`, with the GIL: for few rows, which take microseconds."""
    return gather(rows, ids, row_start, out)


@kernel(
    *(
        types.void(
            view(types.uint8, 2), view(types.uint64), view(types.uint32), view(ids), types.int64, types.uint8[::1]
        )
        for ids in (types.uint32, types.uint64)
    )
)
def lay_over(
    changed: npt.NDArray[np.uint8],
    words: npt.NDArray[np.uint64],
    ranks: npt.NDArray[np.uint32],
    ids: RowIds,
    row_start: int,
    out: npt.NDArray[np.uint8],
) -> None:
    """Copy those of the rows `ids` [N] that are changed into `out`, over what `gather` copied there.

    changed, words, ranks: as of `Overlay`, all C-contiguous. ids, row_start, out: those that `gather` found no fault
    with. Where one row in a hundred is changed, this costs less than to choose for every row where it is copied from.
    """
    count, width = _U(ids.size), _U(changed.shape[1])
    first, bits = _U(row_start), _U(words.ctypes.data)
    source, to = _U(changed.ctypes.data), _U(out.ctypes.data)
    ahead = _U(_NARROW_AHEAD)
    for step in range(count + ahead):
        if step < count:
            prefetch(bits + ((_U(ids[step]) - first) >> _BITS_SHIFT << _U(3)))
        if step >= ahead:
            at = step - ahead
            row = _U(ids[at]) - first
            word, bit = words[row >> _BITS_SHIFT], _U(1) << (row & _BIT)
            if word & bit:
                place = _U(ranks[row >> _BITS_SHIFT]) + _bit_count(word & (bit - _U(1)))
                copy_row(to + at * width, source + place * width, width)


@kernel(types.void(view(types.uint64), types.int64, types.uint64[::1], types.uint32[::1]))
def index_changed(
    ids: npt.NDArray[np.uint64], row_start: int, words: npt.NDArray[np.uint64], ranks: npt.NDArray[np.uint32]
) -> None:
    """Fill `words`, which must be zeros, and `ranks`, both as of `Overlay`. ids: all of them held, ascending."""
    for at in range(ids.size):
        row = ids[at] - _U(row_start)
        words[row >> _BITS_SHIFT] |= _U(1) << (row & _BIT)
    changed = _U(0)
    for word in range(words.size):
        ranks[word] = changed
        changed += _bit_count(words[word])


@kernel(*(types.int64(view(ids), types.int64, types.int64) for ids in (types.uint32, types.uint64)))
def first_outside(ids: RowIds, start: int, stop: int) -> int:
    """The position of the first id that is not in [start, stop); -1 if all are.

    ids: uint32 or uint64 [N], C-contiguous. start, stop: 0 <= start <= stop < 2**63.
    """
    first, held = _U(start), _U(stop - start)
    # Without a branch in it the loop is done in vectors; where it finds something, a second one looks for it.
    outside: Any = False
    for at in range(ids.size):
        outside |= _U(ids[at]) - first >= held
    if outside:
        for at in range(ids.size):
            if _U(ids[at]) - first >= held:
                return at
    return -1
