"""Row ids and keys of token batches: the hash families of engrampool_proto.hashing, compiled, in one pass over tokens.

The numpy forms are the specification; every id and key is equal to theirs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import Identity, Polynomial, TokenBatch, XorMix
from engrampool_proto.kernels.jit import kernel, view
from engrampool_proto.spec import ModelSpec, RowIds, TableSpec

_U = np.uint64
# What every kernel takes of a batch.
BATCH = (
    view(types.int32, 1, "A"),  # tokens
    view(types.int32, 1, "A"),  # query_start_loc
    view(types.int32, 2, "A"),  # lookback
    view(types.boolean, 1, "A"),  # dead, empty for none
    view(types.boolean, 2, "A"),  # lookback_dead, empty for none
)
NONE_DEAD = np.empty(0, np.bool_)
NO_LOOKBACK_DEAD = np.empty((0, 0), np.bool_)
_NO_MAP = np.empty(0, np.int32)
_OUT = (types.uint32[:, ::1], types.uint64[:, ::1])
_KEYS = types.int64[:, ::1]


@intrinsic  # type: ignore[untyped-decorator]
def _high_product(typing: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@njit(inline="always")  # type: ignore[untyped-decorator]
def _remainder(x: Any, modulus: Any, inverse: Any) -> Any:
    """The remainder of uint64 x by modulus, for inverse = (2**64 - 1) // modulus, exactly, without a division.

    x * inverse / 2**64 is at most x / 2**64 < 1 below x / modulus, so the quotient is right or one too small (Barrett).
    """
    rest = x - _high_product(x, inverse) * modulus
    return rest - modulus if rest >= modulus else rest


@njit  # type: ignore[untyped-decorator]
def _look_back(lookback: Any, lookback_dead: Any, request: Any, ids: Any) -> None:
    """Begin a request: ids[back] becomes the token `back` + 1 before it; -1 where there is none or it is dead."""
    for back in range(ids.size):
        readable = back < lookback.shape[1] and not (lookback_dead.size and lookback_dead[request, back])
        ids[back] = lookback[request, back] if readable else -1


@njit(inline="always")  # type: ignore[untyped-decorator]
def _move_on(ids: Any, tokens: Any, dead: Any, position: Any) -> None:
    """Have ids[back] be the token `back` before `position`, of those of the position before it."""
    for back in range(ids.size - 1, 0, -1):
        ids[back] = ids[back - 1]
    ids[0] = -1 if dead.size and dead[position] else tokens[position]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _readable(ids: Any, stop: Any) -> Any:
    """How many of `ids` can be read: those before the first gap, or before `stop` further back than 0."""
    count = 0
    while count < ids.size and ids[count] >= 0 and (count == 0 or ids[count] != stop):
        count += 1
    return count


@njit(inline="always")  # type: ignore[untyped-decorator]
def row_of(mix: Any, modulus: Any, inverse: Any) -> Any:
    """The remainder of int64 `mix` by uint64 `modulus`, never negative."""
    # Of a negative x it is modulus - 1 - (~x mod modulus).
    sign = mix >> 63
    rest = _remainder(_U(mix ^ sign), modulus, inverse)
    return modulus - _U(1) - rest if sign else rest


@kernel(types.boolean(*BATCH, types.int64), counted=0)
def all_in_vocabulary(tokens: Any, bounds: Any, lookback: Any, dead: Any, lookback_dead: Any, vocab_size: Any) -> bool:
    """Whether every live token is in [0, vocab_size), and in [-1, vocab_size) for the look-back."""
    for at in range(tokens.size):
        if not (dead.size and dead[at]) and not 0 <= tokens[at] < vocab_size:
            return False
    for request in range(lookback.shape[0]):
        for column in range(lookback.shape[1]):
            is_dead = lookback_dead.size and lookback_dead[request, column]
            if not is_dead and not -1 <= lookback[request, column] < vocab_size:
                return False
    return True


@kernel(
    *(
        types.void(
            *BATCH,
            view(types.int32),
            view(types.int64),
            view(types.int64),
            view(types.uint64),
            view(types.uint64),
            view(types.uint64),
            types.int64,
            types.int64,
            out,
        )
        for out in _OUT
    ),
    counted=0,
)
def xor_mix(
    tokens: Any,
    bounds: Any,
    lookback: Any,
    dead: Any,
    lookback_dead: Any,
    token_map: Any,
    multipliers: Any,
    ends: Any,
    moduli: Any,
    inverses: Any,
    offsets: Any,
    fill: Any,
    stop: Any,
    out: Any,
) -> None:
    """`XorMix.rows`. ends[n - 2] is one past the last column of order n; stop is -1 for none."""
    ids = np.empty(multipliers.size, np.int64)
    for request in range(lookback.shape[0]):
        _look_back(lookback, lookback_dead, request, ids)
        for position in range(bounds[request], bounds[request + 1]):
            _move_on(ids, tokens, dead, position)
            mix = np.int64(0)
            column = 0
            blocked = False
            for back in range(ids.size):
                value = ids[back]
                blocked |= (value < 0) | ((back > 0) & (value == stop))
                if blocked:
                    value = fill
                elif token_map.size:
                    value = np.int64(token_map[value])
                mix ^= value * multipliers[back]
                if back == 0:
                    continue
                while column < ends[back - 1]:
                    out[position, column] = offsets[column] + row_of(mix, moduli[column], inverses[column])
                    column += 1


@kernel(
    *(
        types.void(
            *BATCH,
            view(types.uint64, 2),
            view(types.int64),
            view(types.uint64),
            view(types.uint64),
            view(types.uint64),
            types.int64,
            out,
        )
        for out in _OUT
    ),
    counted=0,
)
def polynomial(
    tokens: Any,
    bounds: Any,
    lookback: Any,
    dead: Any,
    lookback_dead: Any,
    weights: Any,
    orders: Any,
    moduli: Any,
    inverses: Any,
    offsets: Any,
    stop: Any,
    out: Any,
) -> None:
    """`Polynomial.rows`. weights: [heads][longest order]; orders: of each column; stop is -1 for none."""
    ids = np.empty(weights.shape[1], np.int64)
    for request in range(lookback.shape[0]):
        _look_back(lookback, lookback_dead, request, ids)
        for position in range(bounds[request], bounds[request + 1]):
            _move_on(ids, tokens, dead, position)
            readable = _readable(ids, stop)
            for column in range(moduli.size):
                modulus, inverse = moduli[column], inverses[column]
                total = _U(0)
                for back in range(min(readable, orders[column])):
                    # A token is below 2**31, a weight and a remainder below 2**32: product and sum fit.
                    total = _remainder(total + _U(ids[back]) * weights[column, back], modulus, inverse)
                out[position, column] = offsets[column] + total


@kernel(*(types.void(*BATCH, types.int64, types.uint64, out) for out in _OUT), counted=0)
def identity(
    tokens: Any, bounds: Any, lookback: Any, dead: Any, lookback_dead: Any, num_rows: Any, offset: Any, out: Any
) -> None:
    """`Identity.rows`."""
    for at in range(tokens.size):
        unreadable = (dead.size and dead[at]) or tokens[at] >= num_rows
        out[at, 0] = offset + (_U(0) if unreadable else _U(tokens[at]))


@kernel(types.void(*BATCH, view(types.int32), view(types.int64), types.int64, types.int64, _KEYS), counted=0)
def xor_mix_keys(
    tokens: Any,
    bounds: Any,
    lookback: Any,
    dead: Any,
    lookback_dead: Any,
    token_map: Any,
    multipliers: Any,
    fill: Any,
    stop: Any,
    out: Any,
) -> None:
    """`XorMix.keys`. stop is -1 for none."""
    ids = np.empty(multipliers.size, np.int64)
    for request in range(lookback.shape[0]):
        _look_back(lookback, lookback_dead, request, ids)
        for position in range(bounds[request], bounds[request + 1]):
            _move_on(ids, tokens, dead, position)
            readable = _readable(ids, stop)
            mix = np.int64(0)
            for back in range(ids.size):
                value = fill if back >= readable else np.int64(token_map[ids[back]]) if token_map.size else ids[back]
                mix ^= value * multipliers[back]
                if back:
                    out[back - 1, position] = mix


@kernel(
    *(types.void(view(types.int64), view(types.uint64), view(types.uint64), view(types.uint64), out) for out in _OUT),
    counted=0,
)
def _xor_mix_rows_of(keys: Any, moduli: Any, inverses: Any, offsets: Any, out: Any) -> None:
    """`XorMix.rows_of`; moduli, inverses, offsets: of the columns of `out`."""
    for at in range(keys.size):
        for column in range(moduli.size):
            out[at, column] = offsets[column] + row_of(keys[at], moduli[column], inverses[column])


@kernel(
    types.void(
        *BATCH, view(types.uint64, 2), view(types.int64), view(types.uint64), view(types.uint64), types.int64, _KEYS
    ),
    counted=0,
)
def polynomial_keys(
    tokens: Any,
    bounds: Any,
    lookback: Any,
    dead: Any,
    lookback_dead: Any,
    weights: Any,
    orders: Any,
    moduli: Any,
    inverses: Any,
    stop: Any,
    out: Any,
) -> None:
    """`Polynomial.keys`. weights, orders, stop: as of `polynomial`."""
    ids = np.empty(weights.shape[1], np.int64)
    for request in range(lookback.shape[0]):
        _look_back(lookback, lookback_dead, request, ids)
        for position in range(bounds[request], bounds[request + 1]):
            _move_on(ids, tokens, dead, position)
            readable = _readable(ids, stop)
            for column in range(moduli.size):
                total = _U(0)
                for back in range(min(readable, orders[column])):
                    total = _remainder(total + _U(ids[back]) * weights[column, back], moduli[column], inverses[column])
                out[column, position] = np.int64(total)


@kernel(types.void(*BATCH, types.int64, _KEYS), counted=0)
def identity_keys(
    tokens: Any, bounds: Any, lookback: Any, dead: Any, lookback_dead: Any, num_rows: Any, out: Any
) -> None:
    """`Identity.keys`."""
    for at in range(tokens.size):
        unreadable = (dead.size and dead[at]) or tokens[at] >= num_rows
        out[0, at] = 0 if unreadable else tokens[at]


FAMILIES: tuple[Callable[..., None], ...] = (xor_mix, polynomial, identity)


class Hasher:
    """What `ModelSpec.hash` and `HashFamily` compute, of a model whose constants were laid out for the kernels once."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        token_map = _NO_MAP if spec.token_map is None else spec.token_map.ids
        self._kernels = {table.layer: _of_table(table, token_map) for table in spec.tables}

    def rows(self, batch: TokenBatch, layers: Iterable[int] | None = None) -> dict[int, RowIds]:
        """Row ids of every token for each layer asked for (all by default), in the order asked for.

        Returns {layer: uint32 or uint64 [T, heads]}, C-contiguous.
        Raises BatchError for token ids out of range or a look-back too wide, SpecError for an unknown layer.
        """
        tables = self._tables(layers)
        rows: dict[int, RowIds] = {
            table.layer: np.empty((batch.num_tokens, table.heads), table.id_dtype) for table in tables
        }
        arrays = self._checked(batch)
        for layer, out in rows.items():
            kernels = self._kernels[layer]
            kernels.rows(*arrays, *kernels.rows_constants, out)
        return rows

    def constants(self, layer: int) -> tuple[int, tuple[Any, ...]]:
        """The place in FAMILIES of the kernel that makes a layer's row ids, and what it takes besides."""
        kernels = self._kernels[layer]
        return FAMILIES.index(kernels.rows), kernels.rows_constants

    def key_constants(self, layer: int) -> tuple[int, tuple[Any, ...], int]:
        """The same of the one that makes a layer's keys, and how many groups it makes."""
        kernels = self._kernels[layer]
        return FAMILIES.index(kernels.rows), kernels.keys_constants, kernels.groups

    def reduced(self, layer: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]] | None:
        """Moduli of the layer's columns, whose rows are keys modulo these, and inverses; None where keys are rows."""
        return self._kernels[layer].reduced

    def keys(self, batch: TokenBatch, layers: Iterable[int] | None = None) -> dict[int, npt.NDArray[np.int64]]:
        """`HashFamily.keys` of each layer's family: int64 [groups, T]. layers, errors: as of `rows`."""
        arrays = self._checked(batch)
        keys = {}
        for table in self._tables(layers):
            kernels = self._kernels[table.layer]
            out = np.empty((kernels.groups, batch.num_tokens), np.int64)
            kernels.keys(*arrays, *kernels.keys_constants, out)
            keys[table.layer] = out
        return keys

    def rows_of(self, table: TableSpec, columns: slice, keys: npt.NDArray[np.int64], out: RowIds) -> None:
        """`HashFamily.rows_of`, `out` C-contiguous."""
        reduced = self._kernels[table.layer].reduced
        if reduced is None:
            table.hash.rows_of(columns, keys, table.head_offsets, out)
        else:
            moduli, inverses = reduced
            _xor_mix_rows_of(keys, moduli[columns], inverses[columns], table.head_offsets[columns], out)

    def _tables(self, layers: Iterable[int] | None) -> Iterable[TableSpec]:
        spec = self.spec
        return spec.tables if layers is None else [spec.table(layer) for layer in layers]

    def _checked(self, batch: TokenBatch) -> tuple[npt.NDArray[Any], ...]:
        """What kernels take of a batch. Raises BatchError as `rows` does."""
        spec = self.spec
        arrays = (
            batch.tokens,
            batch.query_start_loc,
            batch.lookback,
            NONE_DEAD if batch.dead is None else batch.dead,
            NO_LOOKBACK_DEAD if batch.lookback_dead is None else batch.lookback_dead,
        )
        if batch.lookback.shape[1] > spec.lookback or not all_in_vocabulary(*arrays, spec.vocab_size):
            batch.check_tokens(spec.vocab_size, spec.lookback)  # which says what is wrong, and where
        return arrays


@dataclass(frozen=True)
class _Kernels:
    """Those of one table: each one's constants stand between the batch and the output.

    groups: of the family. reduced: moduli and inverses of the columns whose rows are keys modulo these; None where keys
    are rows.
    """

    groups: int
    rows: Callable[..., None]
    rows_constants: tuple[Any, ...]
    keys: Callable[..., None]
    keys_constants: tuple[Any, ...]
    reduced: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]] | None = None


def _of_table(table: TableSpec, token_map: npt.NDArray[np.int32]) -> _Kernels:
    """By the table's family. Raises SpecError for one that there are none for."""
    family, offsets = table.hash, table.head_offsets
    groups = len(family.groups())
    if isinstance(family, Identity):
        return _Kernels(groups, identity, (family.num_rows, offsets[0]), identity_keys, (family.num_rows,))
    moduli = np.array(family.head_rows(), np.uint64)
    inverses = np.uint64(2**64 - 1) // moduli
    if isinstance(family, XorMix):
        ends = np.cumsum([len(heads) for heads in family.primes])
        multipliers, stop = np.array(family.multipliers, np.int64), _or_none(family.stop)
        rows = (token_map, multipliers, ends, moduli, inverses, offsets, family.fill, stop)
        keys = (token_map, multipliers, family.fill, stop)
        return _Kernels(groups, xor_mix, rows, xor_mix_keys, keys, (moduli, inverses))
    if isinstance(family, Polynomial):
        orders = np.repeat(np.arange(2, len(family.moduli) + 2), [len(heads) for heads in family.moduli])
        weights = np.zeros((len(moduli), family.lookback + 1), np.uint64)
        for column, factors in enumerate(f for heads in family.weights for f in heads):
            weights[column, : orders[column]] = factors[: orders[column]]
        constants, stop = (weights, orders, moduli, inverses), _or_none(family.stop)
        return _Kernels(groups, polynomial, (*constants, offsets, stop), polynomial_keys, (*constants, stop))
    raise SpecError(f"there is no kernel for hash family {family.FAMILY!r}; update the server, or this client")


def _or_none(stop: int | None) -> int:
    return -1 if stop is None else stop
