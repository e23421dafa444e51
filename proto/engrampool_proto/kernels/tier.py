"""Emulated memory, without Python: when rows would be there, and sleeping until then."""

from typing import Any

import numpy as np
from numba import njit, types

from engrampool_proto.kernels.jit import kernel, view
from engrampool_proto.kernels.sockets import ENDED, LATE, add_at, descriptor, now, replace_at

# int64 [TIER_WORDS]: of a `tiers.tier.Tier`; and the address of an int64, when the link that all requests share is
# free, as of `now`, in memory that forks share. 0 for that: nothing is emulated.
LATENCY, GROUP, RATE, LINK = range(4)
TIER_WORDS = 4
# Sleeping ends late by some tens of microseconds; so much of a wait is looked at without.
_AWAKE_NS = 30_000
# Of poll: the other side sends no more; an error, the end, or no socket.
_PEER_LEFT, _OVER = 0x2000, 0x38

_U = np.uint64
_ppoll = types.ExternalFunction("ppoll", types.int32(types.uint64, types.uint64, types.uint64, types.uint64))


@njit  # type: ignore[untyped-decorator]
def _transfer(tier: Any, nbytes: Any) -> Any:
    return np.int64(nbytes * 1e9 / tier[RATE])


@njit  # type: ignore[untyped-decorator]
def take_turn(tier: Any, nbytes: Any, begin: Any) -> Any:
    """Have the link for a request's bytes, behind those of others that came before; gives from when on."""
    link, takes = _U(tier[LINK]), _transfer(tier, nbytes)
    while True:
        seen = add_at(link, 0)
        turn = max(seen, begin)
        if replace_at(link, seen, turn + takes) == seen:
            return turn


@njit  # type: ignore[untyped-decorator]
def rows_due(tier: Any, begin: Any, turn: Any, so_far: Any, start: Any, nbytes: Any) -> Any:
    """When `nbytes` that are read from `start` on are there, the last of `so_far` of a request.

    begin: of the request. turn: of `take_turn`.
    """
    groups = begin + tier[LATENCY]
    if tier[GROUP]:
        groups = start + (nbytes + tier[GROUP] - 1) // tier[GROUP] * tier[LATENCY]
    return max(groups, turn + tier[LATENCY] + _transfer(tier, so_far))


@njit  # type: ignore[untyped-decorator]
def sleep_until(fd: Any, due: Any, until: Any, leaving: Any, scratch: Any) -> Any:
    """Sleep until `due`: 1 then, LATE if `until` comes first (-1 for none), ENDED if the connection is over by then.

    due, until: as of `now`. leaving: int64 [1], not 0 once this side takes no more requests, but still answers.
    """
    first = until if 0 <= until < due else due
    while True:
        left = first - now(scratch)
        if left <= 0:
            return LATE if first < due else 1
        if left > _AWAKE_NS:
            left -= _AWAKE_NS
            events = _PEER_LEFT if leaving[0] == 0 else 0  # its end is told anyway
            scratch[0] = np.int64(descriptor(fd)) | (np.int64(events) << 32)
            scratch[1], scratch[2] = left // 1_000_000_000, left % 1_000_000_000
            at = _U(scratch.ctypes.data)
            if _ppoll(at, _U(1), at + _U(8), _U(0)) > 0 and (leaving[0] == 0 or scratch[0] >> 48 & _OVER):
                return ENDED


@kernel(types.int64(view(types.int64), types.int64, types.int64))
def turn_of(tier: Any, nbytes: Any, begin: Any) -> int:
    """`take_turn`, for Python."""
    turn: int = take_turn(tier, nbytes, begin)
    return turn


@kernel(types.int64(view(types.int64), *(types.int64,) * 5))
def due_of(tier: Any, begin: Any, turn: Any, so_far: Any, start: Any, nbytes: Any) -> int:
    """`rows_due`, for Python."""
    due: int = rows_due(tier, begin, turn, so_far, start, nbytes)
    return due


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64[::1], types.int64[::1]))
def await_due(fd: Any, due: Any, until: Any, leaving: Any, scratch: Any) -> int:
    """`sleep_until`, for Python."""
    woke: int = sleep_until(fd, due, until, leaving, scratch)
    return woke
