"""Tokens of an engine's requests, kept and cut into batches: in one pass each, for every forward of an engine."""

from typing import Any

from numba import types

from engrampool_proto.kernels.jit import kernel, view

_NUMBERS = view(types.int64, layout="A")
_CHUNKS = (_NUMBERS, _NUMBERS, _NUMBERS)


@kernel(
    *(
        types.boolean(
            types.Array(types.int32, 2, "C"),
            types.Array(types.int64, 1, "C"),
            *_CHUNKS,
            view(given, layout="A"),
            types.boolean[::1],
        )
        for given in (types.int32, types.int64)
    ),
    nogil=False,
)
def put(history: Any, lengths: Any, numbers: Any, starts: Any, counts: Any, tokens: Any, held: Any) -> bool:
    """Write tokens of each request from `starts` on, where each is known up to there and has room for them.

    history: [requests, longest]. lengths: what of it is known. tokens: of all chunks, one after the other.
    held: is set, for each chunk, to whether the request had just these there. False, with nothing written, where
    something is otherwise than that.
    """
    requests, total = numbers.size, 0
    if starts.size != requests or counts.size != requests or held.size != requests:
        return False
    for at in range(requests):
        number, start, count = numbers[at], starts[at], counts[at]
        if not 0 <= number < history.shape[0] or not 0 <= start <= lengths[number]:
            return False
        if not 0 <= count <= history.shape[1] - start:
            return False
        total += count
    if total != tokens.size:
        return False
    source = 0
    for at in range(requests):
        number, start, stop = numbers[at], starts[at], starts[at] + counts[at]
        same = stop <= lengths[number]
        for position in range(start, stop):
            same &= history[number, position] == tokens[source]
            history[number, position] = tokens[source]
            source += 1
        lengths[number] = stop
        held[at] = same
    return True


@kernel(
    types.int64(
        types.Array(types.int32, 2, "C"),
        types.Array(types.int64, 1, "C"),
        *_CHUNKS,
        types.int64,
        types.int32[::1],
        types.int32[::1],
        types.int32[:, ::1],
    ),
    nogil=False,
)
def cut(
    history: Any,
    lengths: Any,
    numbers: Any,
    starts: Any,
    counts: Any,
    dead: Any,
    tokens: Any,
    bounds: Any,
    lookback: Any,
) -> int:
    """A batch of one chunk of each request: its tokens, boundaries and look-back.

    Gives how many of all of these are `dead`; -1 where a chunk is not known, or arrays do not fit together.
    """
    requests = numbers.size
    if starts.size != requests or counts.size != requests or bounds.size != requests + 1:
        return -1
    if lookback.shape[0] != requests:
        return -1
    end = bounds[0] = 0
    for at in range(requests):
        number, start, count = numbers[at], starts[at], counts[at]
        if not 0 <= number < history.shape[0] or count < 0 or start < 0 or count > lengths[number] - start:
            return -1
        end += count
        if end > tokens.size:
            return -1
        bounds[at + 1] = end
    if end != tokens.size:
        return -1
    found = 0
    for at in range(requests):
        number, start, begin = numbers[at], starts[at], bounds[at]
        for one in range(counts[at]):
            token = history[number, start + one]
            tokens[begin + one] = token
            found += token == dead
        for back in range(lookback.shape[1]):
            before = start - 1 - back
            token = history[number, before] if before >= 0 else -1
            lookback[at, back] = token
            found += token == dead
    return found
