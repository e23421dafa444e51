"""Tokens of an engine's requests, from which batches are made: whatever is fetched, it is hashed from here."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import BatchError

Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]

_NO_TOKEN = -2


class Batch(NamedTuple):
    """What `Client.prefetch` takes, in its order."""

    tokens: Ids
    query_start_loc: Ids
    lookback: Ids
    dead: Flags | None
    lookback_dead: Flags | None


class Histories:
    """Every request's tokens, by the number that the engine keeps it under. Not thread-safe.

    requests: how many numbers there are, from 0 on. longest: tokens of a request at most; what is beyond is let go.
    depth: how many tokens hashing looks back.
    dead: a token id that takes part in no n-gram, as that of images; None: every token does.
    compiled: whether kernels do most of it, as `Client.compiled` says; what they leave, errors among it, is numpy's.

    Numbers of one call are different from each other. lengths: how many tokens of each request are known.
    """

    def __init__(
        self, requests: int, longest: int, depth: int, dead: int | None = None, compiled: bool = False
    ) -> None:
        # The system gives memory to those parts only that are written.
        self._tokens = np.zeros((requests, longest), np.int32)
        self.lengths = np.zeros(requests, np.int64)
        self._before, self._dead = np.arange(1, depth + 1), dead
        self._kernels: Any = None
        if compiled:
            from engrampool_proto.kernels import histories

            self._kernels = histories

    def add(self, number: int, tokens: npt.ArrayLike, first: int = 0) -> None:
        """A request's prompt, or all that is known of one that goes on; in the place of the number's last request.

        first: the position of the first of them; those before are of no request, and not to be read.
        """
        given = np.asarray(tokens, np.int32)[: max(0, self._tokens.shape[1] - first)]
        self._tokens[number, first : first + len(given)] = given
        self.lengths[number] = first + len(given)

    def holds(self, number: int, first: int, tokens: npt.NDArray[np.integer[Any]]) -> bool:
        """Whether a request has just these tokens from position `first` on."""
        stop = first + len(tokens)
        return bool(stop <= self.lengths[number] and (self._tokens[number, first:stop] == tokens).all())

    def remove(self, number: int) -> None:
        """Forget a request."""
        self.lengths[number] = 0

    def put(self, numbers: Numbers, starts: Numbers, counts: Numbers, tokens: npt.NDArray[np.integer]) -> Flags:
        """Write some tokens of each request from a position on; what was behind them is forgotten, as drafts are.

        tokens: of all requests, one after the other, int32 or int64. Gives, for each request, whether it had just these
        there.
        Raises BatchError if there is a gap between what is known of a request and its tokens.
        """
        if self._kernels is not None:
            held: Flags = np.empty(len(numbers), np.bool_)
            if self._kernels.put(self._tokens, self.lengths, numbers, starts, counts, tokens, held):
                return held
        known = self.lengths[numbers]
        if (starts > known).any():
            at = int((starts > known).argmax())
            raise BatchError(f"request {numbers[at]} goes on at token {starts[at]}, and {known[at]} are known of it")
        stops = starts + counts
        owners, positions = _spread(starts, counts)
        if len(stops) and stops.max() > self._tokens.shape[1]:
            stops = np.minimum(stops, self._tokens.shape[1])
            kept = positions < self._tokens.shape[1]
            owners, positions, tokens = owners[kept], positions[kept], tokens[kept]
        rows = numbers[owners]
        held = stops <= known
        other = self._tokens[rows, positions] != tokens
        if other.any():
            held[owners[other]] = False
            self._tokens[rows, positions] = tokens
        self.lengths[numbers] = stops
        return held

    def batch(self, numbers: Numbers, starts: Numbers, counts: Numbers) -> Batch:
        """A batch of one chunk of each request. Raises BatchError for tokens that are not known."""
        if self._kernels is not None:
            batch, found = self._cut(numbers, starts, counts)
            if found >= 0:
                return batch if not found else self._with_dead(batch)
        stops = starts + counts
        if (stops > self.lengths[numbers]).any():
            at = int((stops > self.lengths[numbers]).argmax())
            known = self.lengths[numbers[at]]
            raise BatchError(f"request {numbers[at]} is read up to token {stops[at]}, and {known} are known of it")
        bounds = np.zeros(len(numbers) + 1, np.int32)
        counts.cumsum(out=bounds[1:])
        owners, positions = _spread(starts, counts)
        tokens = self._tokens[numbers[owners], positions]
        before = starts[:, None] - self._before
        lookback = self._tokens[numbers[:, None], np.maximum(before, 0)]
        lookback[before < 0] = -1
        return self._with_dead(Batch(tokens, bounds, lookback, None, None))

    def _cut(self, numbers: Numbers, starts: Numbers, counts: Numbers) -> tuple[Batch, int]:
        """The batch, but for its flags, and how many are to be set; -1 where it cannot be."""
        requests = len(numbers)
        batch = Batch(
            np.empty(int(counts.sum()), np.int32),
            np.empty(requests + 1, np.int32),
            np.empty((requests, len(self._before)), np.int32),
            None,
            None,
        )
        dead = _NO_TOKEN if self._dead is None else self._dead
        return batch, self._kernels.cut(self._tokens, self.lengths, numbers, starts, counts, dead, *batch[:3])

    def _with_dead(self, batch: Batch) -> Batch:
        """The same, with flags where some are to be set."""
        if self._dead is None:
            return batch
        dead, lookback_dead = batch.tokens == self._dead, batch.lookback == self._dead
        if not (dead.any() or lookback_dead.any()):
            return batch
        return Batch(batch.tokens, batch.query_start_loc, batch.lookback, dead, lookback_dead)


def _spread(starts: Numbers, counts: Numbers) -> tuple[Numbers, Numbers]:
    """Of every token of some chunks, which chunk it is in, and its position in its request."""
    owners = np.arange(len(counts))
    if (counts == 1).all():
        return owners, starts
    owners = owners.repeat(counts)
    return owners, np.arange(len(owners)) + (starts - counts.cumsum() + counts)[owners]
