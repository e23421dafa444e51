"""A small lookup from a batch to its frame: batches that cannot be, and what is sent. test_hasher.py has the ids."""

import socket

import numpy as np
import pytest

from engrampool_proto import frames
from engrampool_proto.errors import BatchError
from engrampool_proto.hashing import TokenBatch, XorMix
from engrampool_proto.kernels.ask import Ids, send_lookup
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec

BYTES = RowFormat((Segment("values", "uint8", 4),))
SPEC = ModelSpec("small", 1000, (TableSpec(3, 30, BYTES, XorMix((3, 5, 7), ((11,), (13,)), 2)),))
NO_FLAGS = np.empty(0, np.bool_), np.empty((0, 0), np.bool_)


@pytest.mark.parametrize(
    ("tokens", "bounds", "lookback"),
    [
        ([1, 2], [0, 1], np.zeros((1, 2))),
        ([1, 2], [1, 2], np.zeros((1, 2))),
        ([1, 2], [0, 2, 1, 2], np.zeros((3, 2))),
        ([1, 2], [0, 3, 2], np.zeros((2, 2))),
        ([1, 2], [0, -1, 2], np.zeros((2, 0))),
        ([1, 2], [0, 2**31 - 1, 2], np.zeros((2, 0))),
        ([1, 2], [0, 2], np.zeros((2, 2))),
        ([1, 2], [], np.zeros((0, 2))),
        ([1, 2], [0], np.zeros((0, 2))),
        ([1, 2], [0, 2], np.zeros((1, 3))),
        ([1, 1000], [0, 2], np.zeros((1, 2))),
        ([-1, 1], [0, 2], np.zeros((1, 2))),
        ([1, 2], [0, 2], np.full((1, 2), 1000)),
        ([1, 2], [0, 2], np.full((1, 2), -2)),
    ],
)
def test_a_batch_that_cannot_be_is_refused_as_its_check_refuses_it(tokens, bounds, lookback):
    arrays = [np.array(one, np.int32) for one in (tokens, bounds, lookback)]
    with pytest.raises(BatchError):
        TokenBatch(*arrays).check_tokens(SPEC.vocab_size, SPEC.lookback)
    memory = np.full(64, 0xA5, np.uint8)
    assert not Ids(Hasher(SPEC), SPEC.layers, None).put((*arrays, *NO_FLAGS), memory[16:32])
    assert (memory == 0xA5).all()  # the last that is found out is found out before any is written


def test_the_frame_is_that_of_the_protocol_under_a_number_of_its_own():
    ids, numbers = np.arange(24, dtype=np.uint8), set()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for counts in ([3], [1, 2], [1] * 300):
            number = send_lookup(ours.fileno(), 7, 250_000, np.array(counts), ids)
            start = frames.lookup_start(7, number, 250_000, counts, len(ids))
            assert theirs.recv(10_000) == start + ids.tobytes()
            numbers.add(number)
    assert len(numbers - {0}) == 3


def test_what_the_system_does_not_take_at_once_or_at_all_was_not_sent():
    ours, theirs = socket.socketpair()
    counts, ids = np.ones(1, np.int64), np.zeros(1 << 20, np.uint8)
    with theirs:
        with ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            assert send_lookup(ours.fileno(), 0, 1, counts, ids) == 0
            theirs.close()
            assert send_lookup(ours.fileno(), 0, 1, counts, ids[:8]) == 0  # and no signal
        assert send_lookup(ours.fileno(), 0, 1, counts, ids[:8]) == 0
