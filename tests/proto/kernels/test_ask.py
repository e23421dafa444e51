"""A small lookup from a batch to its frame: batches that cannot be, and what is sent. test_hasher.py has the ids."""

import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engrampool_proto import frames
from engrampool_proto.errors import BatchError
from engrampool_proto.hashing import TokenBatch, XorMix
from engrampool_proto.kernels.ask import GivenIds, Ids, send_lookup
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


@pytest.mark.parametrize("id_dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("given", [np.uint32, np.uint64, np.int64, np.int32, np.uint8, ">i8", "strided"])
def test_ids_that_are_given_go_into_the_frame_as_they_are(id_dtype, given):
    table: Any = SimpleNamespace(num_rows=24, id_dtype=id_dtype)
    ids = np.arange(12, dtype=np.int64 if given == "strided" else given).reshape(3, 4)
    if given == "strided":
        ids = ids.T
    nbytes = 12 * np.dtype(id_dtype).itemsize
    memory = np.full(nbytes + 32, 0xA5, np.uint8)
    took = GivenIds([table]).put([ids], memory[16 : 16 + nbytes])
    assert took == (given in (np.uint32, np.uint64, np.int64, "strided"))  # of the others numpy's way is
    assert (memory[:16] == 0xA5).all()
    assert (memory[16 + nbytes :] == 0xA5).all()
    if took:
        assert np.array_equal(memory[16 : 16 + nbytes].view(id_dtype), ids.reshape(-1))


@pytest.mark.parametrize("bad", [-1, 30, 2**32, -(2**63)])
def test_ids_that_a_table_has_not_are_not_put_there(bad):
    memory = np.zeros(16, np.uint8)
    writer, rows = GivenIds(SPEC.tables), [[0, 1]]
    assert writer.put([np.array([29, 0])], memory)
    assert not writer.put([np.array([0, bad])], memory)
    assert not writer.put(rows, memory)
