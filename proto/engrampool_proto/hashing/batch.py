"""A flattened batch of tokens as inference engines hold it, and the look-back windows hashed from it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import BatchError

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
_INT32, _BOOL = np.dtype(np.int32), np.dtype(np.bool_)
_PLAIN = (1, 1, 2, None, None)  # dimensions, and no flags


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """T tokens of R requests. Construction checks everything but the token ids, which depend on the model.

    tokens: int32 [T].
    query_start_loc: int32 [R + 1], from 0 to T without descending; request r owns
        tokens[query_start_loc[r] : query_start_loc[r + 1]].
    lookback: int32 [R, W]: column 0 is the token just before the request's chunk, column 1 the one before that;
        -1 = before the sequence start.
    dead: bool [T]: tokens that take no part in an n-gram (an image span). None: no token.
    lookback_dead: bool [R, W], likewise for `lookback`.

    `of` fills in what a caller leaves out.
    Raises BatchError for a wrong dtype or shape, and for boundaries that do not ascend from 0 to T.
    """

    tokens: Int32Array
    query_start_loc: Int32Array
    lookback: Int32Array
    dead: BoolArray | None = None
    lookback_dead: BoolArray | None = None

    def __post_init__(self) -> None:
        if not self._is_plain():
            self._check()

    def _is_plain(self) -> bool:
        """Whether it is as it should be, and all tokens take part. Found out in few steps."""
        tokens, bounds, lookback = self.tokens, self.query_start_loc, self.lookback
        for array in (tokens, bounds, lookback):
            if type(array) is not np.ndarray or array.dtype is not _INT32:
                return False
        if (tokens.ndim, bounds.ndim, lookback.ndim, self.dead, self.lookback_dead) != _PLAIN:
            return False
        count = bounds.size
        if not count or len(lookback) != count - 1 or bounds.item(0) or bounds.item(-1) != tokens.size:
            return False
        return bool(np.logical_and.reduce(bounds[1:] >= bounds[:-1]))

    def _check(self) -> None:
        _check("tokens", self.tokens, np.int32, (None,))
        length = len(self.tokens)
        bounds = self.query_start_loc
        _check("query_start_loc", bounds, np.int32, (None,))
        if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != length:
            raise BatchError(
                f"query_start_loc must run from 0 to the number of tokens ({length}); it is "
                + (f"[{bounds[0]}, ..., {bounds[-1]}]" if len(bounds) else "empty")
            )
        falls = bounds[1:] < bounds[:-1]
        if np.logical_or.reduce(falls):
            at = int(falls.argmax())
            raise BatchError(
                f"query_start_loc must ascend: entry {at + 1} is {bounds[at + 1]}, after {bounds[at]} at entry {at}"
            )
        _check("lookback", self.lookback, np.int32, (len(bounds) - 1, None))
        if self.dead is not None:
            _check("dead", self.dead, np.bool_, (length,))
        if self.lookback_dead is not None:
            _check("lookback_dead", self.lookback_dead, np.bool_, self.lookback.shape)

    @classmethod
    def of(
        cls,
        tokens: Int32Array,
        query_start_loc: Int32Array | None = None,
        lookback: Int32Array | None = None,
        dead: BoolArray | None = None,
        lookback_dead: BoolArray | None = None,
    ) -> "TokenBatch":
        """A batch from its tokens; without boundaries it is one request, without look-back requests start here."""
        if query_start_loc is None:
            _check("tokens", tokens, np.int32, (None,))
            query_start_loc = np.array([0, len(tokens)], np.int32)
        elif lookback is None:
            _check("query_start_loc", query_start_loc, np.int32, (None,))
        if lookback is None:
            lookback = np.empty((max(0, len(query_start_loc) - 1), 0), np.int32)
        return cls(tokens, query_start_loc, lookback, dead, lookback_dead)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens)

    def check_tokens(self, vocab_size: int, lookback: int) -> None:
        """Raise BatchError if a live token is outside [0, vocab_size) or the look-back is wider than `lookback`.

        Ids of dead tokens are not looked at: engines put placeholders there.
        """
        if self.lookback.shape[1] > lookback:
            raise BatchError(
                f"lookback has {self.lookback.shape[1]} columns; this model reads {lookback} tokens back at most"
            )
        live = self.tokens if self.dead is None else np.where(self.dead, 0, self.tokens)
        _check_ids("tokens", live, 0, vocab_size)
        before = self.lookback if self.lookback_dead is None else np.where(self.lookback_dead, 0, self.lookback)
        _check_ids("lookback", before, -1, vocab_size)

    def windows(self, lookback: int, token_map: Int32Array | None = None) -> "Windows":
        """The token ids at and before every position, `lookback` steps back, and what `token_map` makes of them."""
        return Windows.of(self, lookback, token_map)


@dataclass(frozen=True, eq=False)
class Windows:
    """ids: int64 [lookback + 1, T]; ids[s, t] is the token s before position t, -1 where there is none or it is dead.

    mapped: the same after the model's token map (`ids` itself where it has none); unspecified where `ids` is -1.
    Only single entries are -1 here: that everything older than a gap is unreadable too is the families' rule,
    since what ends a look-back differs between them.
    """

    ids: npt.NDArray[np.int64]
    mapped: npt.NDArray[np.int64]
    _filled: dict[tuple[int, int | None], npt.NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, batch: TokenBatch, lookback: int, token_map: Int32Array | None = None) -> "Windows":
        """Shift the batch `lookback` times; the first tokens of each request read the request's look-back."""
        bounds, before = batch.query_start_loc, batch.lookback
        requests, length = len(before), len(batch.tokens)
        tokens = batch.tokens if batch.dead is None else np.where(batch.dead, np.int32(-1), batch.tokens)
        # In one line, so that every shift is one read of it: each request's look-back, oldest first, then its tokens.
        # By methods of arrays: numpy's functions of the same names cost more than the work that a small batch is.
        line = np.empty(length + requests * lookback, np.int64)
        line.fill(-1)
        starts = bounds[:-1]
        before_them = np.arange(1, requests + 1) * lookback
        ends = before_them + starts  # of the look-backs
        at = np.arange(length) + before_them.repeat(bounds[1:] - starts)
        line[at] = tokens
        width = min(lookback, before.shape[1])
        if width:
            read = before[:, :width]
            if batch.lookback_dead is not None:
                read = np.where(batch.lookback_dead[:, :width], np.int32(-1), read)
            line[ends[:, None] - np.arange(1, width + 1)] = read
        ids = line[at - np.arange(lookback + 1)[:, None]]
        return cls(ids, ids if token_map is None else token_map[ids].astype(np.int64))

    def filled(self, fill: int, stop: int | None) -> npt.NDArray[np.int64]:
        """`mapped`, with `fill` wherever a look-back has met a gap (or `stop`): int64 [lookback + 1, T]. Read only."""
        if (fill, stop) not in self._filled:  # the tables of a model mostly share it
            self._filled[fill, stop] = np.where(self.blocked_from(stop), np.int64(fill), self.mapped)
        return self._filled[fill, stop]

    def blocked_from(self, stop: int | None) -> npt.NDArray[np.bool_]:
        """Bool [lookback + 1, T]: True where a look-back has met a gap (or, looking back, the token `stop`) already."""
        gap = self.ids < 0
        if stop is not None:
            gap[1:] |= self.ids[1:] == stop
        return np.logical_or.accumulate(gap, axis=0)


def one_each(columns: int) -> tuple[slice, ...]:
    """`HashFamily.groups` of a family whose every column is a group."""
    return tuple(slice(column, column + 1) for column in range(columns))


def rows_from_keys(
    columns: slice, keys: npt.NDArray[np.int64], head_offsets: npt.NDArray[np.uint64], out: npt.NDArray[Any]
) -> None:
    """`HashFamily.rows_of` of a family whose keys are rows within their head."""
    out[:] = keys.view(np.uint64)[:, None] + head_offsets[columns]


def keys_from_rows(
    columns: slice, rows: npt.NDArray[Any], head_offsets: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """`HashFamily.keys_of` of a family whose keys are rows within their head."""
    found: npt.NDArray[np.int64] = (rows.astype(np.uint64) - head_offsets[columns]).view(np.int64)[:, 0]
    return found


def exactly(name: str, values: Any, dtype: type[np.int32] | type[np.bool_]) -> npt.NDArray[Any]:
    """A copy of `values` as `dtype`, int32 or bool: C-contiguous, of their shape, and none of them changed.

    values: an array of integers, of any type and byte order, or what numpy makes one of: sequences, tensors on the CPU.
    A bool is made of bools, and of 0 and 1. Raises BatchError for what is no integer, and for values that `dtype` does
    not hold, naming the first.
    """
    wanted = _INT32 if dtype is np.int32 else _BOOL
    if type(values) is np.ndarray and values.dtype is wanted:
        return values.copy()
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: torch's
        raise BatchError(f"{name} cannot be made {wanted.name}: {error}") from error
    if found.dtype != wanted and found.size:
        if found.dtype.kind not in "iu":
            raise BatchError(f"{name} cannot be made {wanted.name}: they are {found.dtype.name}")
        low, stop = (0, 2) if wanted.kind == "b" else (-(2**31), 2**31)
        if int(found.min()) < low or int(found.max()) >= stop:
            raise BatchError(f"{name} cannot be made {wanted.name}: {_first_outside(name, found, low, stop)}")
    return found.astype(wanted, order="C")


def is_token_id(value: object) -> bool:
    """Whether `value` can be a token id of some model: an int in 0 .. 2**31 - 1."""
    return type(value) is int and 0 <= value < 2**31


def _check(name: str, array: Any, dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    if isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == len(shape):
        for length, found in zip(shape, array.shape, strict=True):
            if length is not None and length != found:
                break
        else:
            return
    wanted = f"{np.dtype(dtype).name} [{', '.join('*' if n is None else str(n) for n in shape)}]"
    if not isinstance(array, np.ndarray):
        raise BatchError(f"{name} must be a numpy array, {wanted}; it is a {type(array).__name__}")
    order = "" if array.dtype.isnative else " in the other byte order"
    raise BatchError(f"{name} must be {wanted}; it is {array.dtype.name}{order} {list(array.shape)}")


def _check_ids(name: str, ids: npt.NDArray[Any], low: int, stop: int) -> None:
    if ids.size == 0 or (np.minimum.reduce(ids, None) >= low and np.maximum.reduce(ids, None) < stop):
        return
    raise BatchError(f"{_first_outside(name, ids, low, stop)}; this model's token ids are {low} .. {stop - 1}")


def _first_outside(name: str, values: npt.NDArray[Any], low: int, stop: int) -> str:
    where = np.argwhere((values < low) | (values >= stop))[0]
    return f"{name}[{', '.join(str(int(i)) for i in where)}] is {values[tuple(where)]}"
