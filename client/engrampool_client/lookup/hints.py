"""Which n-grams end at tokens that are only guessed yet."""

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import BatchError
from engrampool_proto.hashing import TokenBatch, exactly
from engrampool_proto.spec import ModelSpec


def candidates_batch(batch: TokenBatch, candidates: npt.ArrayLike, chain: bool, spec: ModelSpec) -> TokenBatch:
    """The tokens that may follow each request of `batch`, as a batch of their own.

    candidates: integers [R, K], -1 for none. Alternatives of the next token become a request each; with `chain` a row
    is one request, which ends at its first -1. Raises BatchError.
    """
    requests = len(batch.query_start_loc) - 1
    tokens = exactly("candidates", candidates, np.int32)
    if tokens.ndim != 2 or len(tokens) != requests:
        raise BatchError(f"candidates must be int32 [{requests}, *], a row a request; they are {list(tokens.shape)}")
    given = tokens >= 0
    if chain:
        given = np.logical_and.accumulate(given, axis=1)
    recent = _recent(batch, spec.lookback)
    if chain:
        bounds = np.concatenate(([0], np.cumsum(given.sum(axis=1))))
        lookback = recent
    else:
        bounds = np.arange(np.count_nonzero(given) + 1)
        lookback = np.repeat(recent, given.sum(axis=1), axis=0)
    guessed = TokenBatch(tokens[given], bounds.astype(np.int32), lookback)
    guessed.check_tokens(spec.vocab_size, spec.lookback)
    return guessed


def _recent(batch: TokenBatch, lookback: int) -> npt.NDArray[np.int32]:
    """The last tokens of each request, the newest first: int32 [R, lookback], -1 for a gap or before the start."""
    if not lookback:
        return np.empty((len(batch.query_start_loc) - 1, 0), np.int32)
    # One more token a request: what is before it are the last ones.
    requests = len(batch.query_start_loc) - 1
    ends = batch.query_start_loc[1:]
    tokens = np.insert(batch.tokens, ends, 0)
    dead = None if batch.dead is None else np.insert(batch.dead, ends, False)
    bounds = (batch.query_start_loc + np.arange(requests + 1)).astype(np.int32)
    one_more = TokenBatch(tokens, bounds, batch.lookback, dead, batch.lookback_dead)
    return one_more.windows(lookback).ids[1:, bounds[1:] - 1].T.astype(np.int32)
