"""Answers put together from their messages: any cut gives the rows, and nothing but the rows asked for is taken."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import BatchError, ProtocolError
from engrampool_client.compute.layout import Layout
from engrampool_client.compute.served import ServedModel
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange, Route
from engrampool_client.lookup.plan import Planner
from engrampool_client.lookup.query import TokenQuery, row_ids, token_batch
from engrampool_proto import wire
from engrampool_proto.hashing import Identity, TokenBatch
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.v1 import pool_pb2
from exchanges import add, exchange_of

INTEGERS = [np.dtype(order + kind) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8") for order in "<>"]
ROWS = RowFormat((Segment("values", "uint8", 3),))
SPEC = ModelSpec("m", 50, tuple(TableSpec(layer, 50, ROWS, Identity(50)) for layer in (2, 9)))
SERVED = ServedModel(SPEC, "v", max_rows=1000, max_answer_bytes=10_000, server_version="")


LAYOUT = Layout(SPEC, None)


def exchange(num_tokens: int) -> Exchange:
    return exchange_of(SERVED, {layer: np.arange(num_tokens) for layer in (2, 9)})


def message(*tables: tuple[int, int, bytes], times: bool = False) -> bytes:
    rows = [pool_pb2.TableRows(layer=layer, first=first, rows=data) for layer, first, data in tables]
    sent = pool_pb2.ServerTimes(queue_us=1, gather_us=2, total_us=3) if times else None
    return pool_pb2.LookupResponse(tables=rows, times=sent).SerializeToString()


@given(st.integers(1, 40), st.data())
def test_any_cut_into_messages_gives_the_rows(num_tokens, data):
    wanted = {layer: np.random.default_rng(layer).integers(0, 256, (num_tokens, 3), np.uint8) for layer in (2, 9)}
    pieces = []
    for layer in (2, 9):
        cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens - 1)))) if num_tokens > 1 else []
        for start, stop in zip([0, *cuts], [*cuts, num_tokens], strict=True):
            pieces.append((layer, start, wanted[layer][start:stop].tobytes()))
    together = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    messages: list[list] = []
    for piece, same_message in zip(pieces, together, strict=True):
        if same_message and messages:
            messages[-1].append(piece)
        else:
            messages.append([piece])
    taken, complete = exchange(num_tokens), []
    for at, parts in enumerate(messages):
        complete += add(taken, message(*parts, times=at == len(messages) - 1))
        assert [layer for layer in (2, 9) if layer not in dict(taken.landing.missing())] == complete
    taken.landing.check_complete()
    assert complete == [2, 9]
    assert taken.times == wire.ServerTimes(1, 2, 3)
    for layer in (2, 9):
        assert np.array_equal(taken.delivery.rows[layer], wanted[layer])


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([message((3, 0, b"abcabc"))], "layer 3, which was not asked for"),
        ([message((2, 1, b"abc"))], "layer 2: 3 bytes at row 1 do not follow the 0 bytes"),
        ([message((2, 0, b"abc")), message((2, 0, b"abc"))], "do not follow the 3 bytes"),
        ([message((2, 0, b"abcabcabc"))], "6 were asked for"),
        ([message((2, 0, b"abcabc")), message((2, 2, b"abc"))], "6 were asked for"),
        ([b"\x0a\xff"], "the answer cannot be read"),
        ([message((2, 0, b"abcabc")), message((9, 0, b"abc"))], "ended before the rows of layer 9"),
        ([], "ended before the rows of layer 2"),
    ],
)
def test_answers_that_break_the_contract(messages, text):
    def take_all():
        taken = exchange(2)
        for one in messages:
            taken.add(one)
        taken.landing.check_complete()

    with pytest.raises(ProtocolError, match=text):
        take_all()


@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error(garbage):
    taken = exchange(2)
    try:
        taken.add(garbage)
    except ProtocolError:
        return
    with pytest.raises(ProtocolError):  # what could be read was, and it is not all the rows
        taken.landing.check_complete()


def test_a_table_in_one_message_is_not_copied():
    taken = exchange(2)
    answer = message((2, 0, b"abcabc"), (9, 0, b"defdef"))
    add(taken, answer)
    assert np.shares_memory(taken.delivery.rows[2], np.frombuffer(answer, np.uint8))


def test_no_rows_are_complete_at_once():
    taken = exchange(0)
    assert add(taken, message((2, 0, b""), (9, 0, b""), times=True)) == [2, 9]
    taken.landing.check_complete()
    assert taken.delivery.rows[9].shape == (0, 3)


def answer_of(request: bytes, rows: dict[int, np.ndarray]) -> bytes:
    """What a server that holds `rows` says."""
    asked = wire.parse_request(request)
    return message(*((layer, 0, rows[layer][ids].tobytes()) for layer, ids in asked.tables), times=True)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7), st.randoms(use_true_random=False))
def test_parts_land_in_order_whichever_comes_first(few, many, count, random):
    rows = {layer: np.random.default_rng(layer).integers(0, 256, (50, 3), np.uint8) for layer in (2, 9)}
    ids = {2: np.random.default_rng(0).integers(0, 50, few), 9: np.random.default_rng(1).integers(0, 50, many)}
    whole = exchange_of(SERVED, ids)
    parts = whole.split(count)
    assert len(parts) == (count if max(few, many) >= count else 1)
    assert sum(part.answer_bytes for part in parts) == whole.answer_bytes
    random.shuffle(parts)
    whole.landing.hand_over()
    told = list(whole.delivery.rows)
    for part in parts:
        told += add(part, answer_of(part.encode(), rows))
        part.landing.check_complete()
    assert sorted(told) == [2, 9]  # each said to be complete once
    found = whole.delivery.rows
    assert all(np.array_equal(found[layer], rows[layer][ids[layer]]) for layer in (2, 9))


def test_a_lookup_by_tokens_is_not_split():
    planner = Planner(SERVED, LAYOUT, "server", True, None, None, 1)
    query = TokenQuery(SPEC, TokenBatch.of(np.arange(40, dtype=np.int32)), (2, 9))
    whole = planner.exchange(Delivery([2, 9]), query)
    assert whole.split(4) == [whole]


def test_asking_again_leaves_complete_layers_alone():
    rows = {layer: np.random.default_rng(layer).integers(0, 256, (50, 3), np.uint8) for layer in (2, 9)}
    out = {2: np.empty((4, 3), np.uint8)}
    taken = exchange_of(SERVED, {2: np.arange(4), 9: np.arange(6)}, out)
    assert add(taken, message((2, 0, rows[2][:4].tobytes()), (9, 0, rows[9][:5].tobytes()))) == [2]
    out[2][:] = 0  # in use, and changed by who uses it
    taken.restart()
    assert [layer for layer, _ in wire.parse_request(taken.encode()).tables] == [9]
    assert taken.answer_bytes == 18
    assert not taken.landing.complete
    assert add(taken, answer_of(taken.encode(), rows)) == [9]
    taken.landing.check_complete()
    assert taken.landing.complete
    assert not out[2].any()
    assert np.array_equal(taken.delivery.rows[9], rows[9][:6])


@pytest.mark.parametrize("given_out", [False, True])
def test_asking_again_for_what_was_split_leaves_complete_layers_alone(given_out):
    rows = {layer: np.random.default_rng(layer).integers(0, 256, (50, 3), np.uint8) for layer in (2, 9)}
    out = {2: np.empty((4, 3), np.uint8)} if given_out else None
    whole = exchange_of(SERVED, {2: np.arange(4), 9: np.arange(6)}, out)
    first, second = whole.split(2)
    assert add(first, message((2, 0, rows[2][:2].tobytes()), (9, 0, rows[9][:3].tobytes()))) == []
    assert add(second, message((2, 0, rows[2][2:4].tobytes()), (9, 0, rows[9][3:5].tobytes()))) == [2]
    delivered = whole.delivery.rows
    if given_out:
        delivered[2][:] = 0  # in use, and changed by who uses it
    whole.restart()
    assert (whole.answer_bytes, whole.landing.complete) == (18, False)
    for part in whole.split(3):
        assert [layer for layer, _ in wire.parse_request(part.encode()).tables] == [9]
        told = add(part, answer_of(part.encode(), rows))
    assert told == [9]
    assert whole.landing.complete
    assert np.array_equal(delivered[9], rows[9][:6])
    assert np.array_equal(delivered[2], np.zeros((4, 3)) if given_out else rows[2][:4])


@pytest.mark.parametrize("ascending", [False, True])
def test_a_shard_part_may_be_split_in_turn(ascending):
    rows = {layer: np.random.default_rng(layer).integers(0, 256, (50, 3), np.uint8) for layer in (2, 9)}
    ids = {layer: np.arange(50) if ascending else np.random.default_rng(0).permutation(50) for layer in (2, 9)}
    whole = exchange_of(SERVED, ids)
    route = Route(np.array([0, 20], np.uint64), np.array([0, 1]))
    for shard in whole.spread({2: route, 9: route}).values():
        for part in shard.split(3):
            add(part, answer_of(part.encode(), rows))
    assert all(np.array_equal(whole.delivery.rows[layer], rows[layer][ids[layer]]) for layer in (2, 9))


def test_a_shard_is_asked_for_nothing_of_a_layer_without_ids():
    whole = exchange_of(SERVED, {2: np.arange(4), 9: np.arange(0)})
    whole.landing.hand_over()
    route = Route(np.array([0, 20], np.uint64), np.array([0, 1]))
    ((shard, part),) = whole.spread({2: route, 9: route}).items()
    assert shard == 0
    assert [layer for layer, _ in part.asked_tables] == [2]
    rows = {2: np.arange(150, dtype=np.uint8).reshape(50, 3)}
    assert add(part, answer_of(part.encode(), rows)) == [2]
    assert np.array_equal(whole.delivery.rows[2], rows[2][:4])
    assert whole.delivery.rows[9].shape == (0, 3)


@pytest.mark.parametrize(
    ("layer", "array", "text"),
    [
        (2, np.empty((5, 3), np.int8), r"must be a uint8 array \[5, 3\]; it is int8 \[5, 3\]"),
        (2, np.empty((5, 4), np.uint8), r"it is uint8 \[5, 4\]"),
        (2, bytearray(15), "it is bytearray"),
        (2, np.empty((5, 6), np.uint8)[:, ::2], "must be C-contiguous"),
        (2, np.lib.stride_tricks.as_strided(np.empty(9, np.uint8), (5, 3), (1, 1)), "overlaps itself"),
        (2, np.broadcast_to(np.empty((1, 3), np.uint8), (5, 3)), "must be writable"),
        (2, np.frombuffer(bytes(15), np.uint8).reshape(5, 3), "must be writable"),
        (3, np.empty((5, 3), np.uint8), r"layer 3, which is not asked for; \[2, 9\] are"),
    ],
)
def test_arrays_that_cannot_take_the_rows_are_refused(layer, array, text):
    with pytest.raises(BatchError, match=text):
        exchange_of(SERVED, {2: np.arange(5), 9: np.arange(5)}, {layer: array})


@st.composite
def arrays(draw, dtype, low, high):
    """Any shape and any strides; mostly values from low to high, and any others that the type has."""
    info = np.iinfo(dtype)
    near = st.integers(max(low - 2, int(info.min)), min(high + 2, int(info.max)))
    values = st.one_of(near, near, st.integers(int(info.min), int(info.max)))
    shape = draw(st.sampled_from([(), (0,), (1,), (5,), (3, 2), (2, 0), (2, 2, 2)]))
    size = int(np.prod(shape))
    array = np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype).reshape(shape)
    how = draw(st.sampled_from(["plain", "strided", "reversed", "transposed", "read-only"]))
    if how == "strided" and shape:
        wide = np.full((*shape[:-1], 2 * shape[-1]), info.max, dtype)
        wide[..., ::2] = array
        array = wide[..., ::2]
    elif how == "reversed" and shape:
        array = array[::-1]
    elif how == "transposed":
        array = array.T
    array.flags.writeable = how != "read-only"
    return array


@given(st.data(), st.sampled_from(INTEGERS), st.sampled_from([1, 100, 127, 128, 200, 2**16 - 1, 2**31 + 9, 2**32 + 9]))
def test_row_ids_are_what_python_says_they_are(data, dtype, num_rows):
    table = TableSpec(2, num_rows, ROWS, Identity(min(num_rows, 1000)))
    ids = data.draw(arrays(dtype, 0, num_rows - 1))
    plain = ids.reshape(-1).tolist()
    bad = next((at for at, one in enumerate(plain) if not 0 <= one < num_rows), None)
    if bad is None:
        found = row_ids(table, ids)
        assert (found.dtype, found.shape, found.reshape(-1).tolist()) == (table.id_dtype, ids.shape, plain)
    else:
        with pytest.raises(BatchError) as caught:
            row_ids(table, ids)
        assert f"row id {plain[bad]} at position {bad} of" in str(caught.value)


class Tensor:
    """What of torch.Tensor numpy sees: no array, and one that has the memory."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None):
        return self._array if dtype is None else self._array.astype(dtype)


@given(st.data(), st.sampled_from(INTEGERS), st.sampled_from([np.asarray, Tensor, lambda array: array.tolist()]))
def test_tokens_are_what_python_says_they_are(data, dtype, given_as):
    tokens = data.draw(arrays(dtype, -(2**31), 2**31 - 1).filter(lambda array: array.ndim == 1))
    plain = tokens.tolist()
    bad = next((at for at, one in enumerate(plain) if not -(2**31) <= one < 2**31), None)
    if bad is None:
        found = token_batch(given_as(tokens), np.array([0, len(plain)], dtype)).tokens
        assert (found.dtype, found.tolist()) == (np.int32, plain)
        assert not np.shares_memory(found, tokens)
    else:
        with pytest.raises(BatchError) as caught:
            token_batch(given_as(tokens))
        # Of a list no type holds both, numpy makes no integers.
        assert f"tokens[{bad}] is {plain[bad]}" in str(caught.value) or given_as not in (np.asarray, Tensor)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_look_back_and_flags_may_come_as_any_integers(dtype):
    ones, flags = np.array([[1, 0]], dtype), np.array([1, 0, 0], dtype)
    batch = token_batch([4, 5, 6], None, ones, flags, ones)
    assert (batch.lookback.dtype, batch.lookback.tolist()) == (np.int32, [[1, 0]])
    assert (batch.dead.dtype, batch.dead.tolist()) == (np.bool_, [True, False, False])
    assert (batch.lookback_dead.dtype, batch.lookback_dead.tolist()) == (np.bool_, [[True, False]])
    with pytest.raises(BatchError, match=r"dead cannot be made bool: dead\[2\] is 2"):
        token_batch([4, 5, 6], None, ones, np.array([1, 0, 2], dtype))
